"""The parts of a recipe: what a stage learns from and how, what is evaluated, what is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_serializer,
    model_validator,
)

from plmcc.pass_base import invalid as invalid
from plmcc.recipe import training_arguments
from plmcc.recipe.metrics import OF_WINDOWS, Metric, library_of
from plmcc.utils.types import Values

if TYPE_CHECKING:
    Arguments = Values
else:
    Arguments = training_arguments.typed()

# fmt: off
Task = Literal[
    "auto", "sentence-similarity", "feature-extraction", "text-classification", "fill-mask",
    "text-generation", "translation", "question-answering", "token-classification", "reranking",
]
# fmt: on
Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Text = Annotated[str, Field(min_length=1)]

# Arguments of the Trainer that decide on batches too.
_BATCHING = (
    "per_device_train_batch_size",
    "auto_find_batch_size",
    "train_sampling_strategy",
    "dataloader_drop_last",
)
_HUB = re.compile(r"hub:[\w.-]+(/[\w.-]+){0,2}(@[\w.\[\]%:+-]+)?")


def _source(text: str) -> str:
    if text.startswith("hub:") and not _HUB.fullmatch(text):
        hint = "write hub:name, hub:owner/name, hub:owner/name/config or hub:owner/name@split"
        raise invalid("PLM107", f"`{text}` is not a valid hub dataset", hint=hint)
    return text


Source = Annotated[Text, AfterValidator(_source)]


class Node(BaseModel):
    """A section of a recipe: frozen, with exact types and without unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> Values:
        # None and an empty list mean "not given" everywhere in a recipe.
        return {key: value for key, value in handler(self).items() if value not in (None, [])}


class Synthetic(Node):
    """Token sequences drawn from a Zipf distribution, where there is no text to train on."""

    sequences: PositiveInt = 2000
    """How many sequences."""
    length: Annotated[int, Field(ge=4)] = 32
    """Tokens in a sequence."""
    exponent: Weight = 1.0
    """Exponent of the Zipf distribution over token ranks; 0 is uniform."""


class TrainTokenizer(Node):
    """A tokenizer of byte-pair pieces, trained on text: pad 0, end 1, unknown 2."""

    train: Source | Annotated[list[Source], Field(min_length=1)]
    """A file, a glob, `hub:name[/config][@split]`, or a list of files."""
    vocab_size: Annotated[int, Field(ge=16)] = 8000
    """Size of the vocabulary, special tokens included; smaller if the text has fewer pieces."""
    limit: PositiveInt | None = None
    """Use at most this many rows of each file."""


class Scratch(Node):
    """A new model with random weights, drawn by the recipe's seed."""

    config: Annotated[Values, Field(min_length=1)]
    """`model_type`, and any values of that architecture's config in transformers. The size of the
    vocabulary and the special tokens come from the tokenizer."""
    tokenizer: Text | TrainTokenizer
    """A model directory or hub id to load it from, or `{train: files, vocab_size: N}`."""


class ShrinkFor(Node):
    """Which models `plmcc shrink` tries a recipe on. It gives the text files of the command line to
    every value `TEXT` of the recipe."""

    tasks: list[Task] = Field(default_factory=list)
    """Tasks; by default all."""
    table: Annotated[float, Field(ge=0, le=1)] = 0
    """Models whose token table is at least this part of their bytes."""


class Data(Node):
    """What a stage learns from."""

    train: Source | Annotated[list[Source], Field(min_length=1)]
    """A file, a glob, `hub:name[/config][@split]`, the word `synthetic`, or a list of files."""
    target: Source | Annotated[list[Source], Field(min_length=1)] | None = None
    """The translations of `train`, if they are in separate files, line by line."""
    eval: Source | Annotated[list[Source], Field(min_length=1)] | None = None
    """Data to evaluate on while training, in the same forms."""
    eval_target: Source | Annotated[list[Source], Field(min_length=1)] | None = None
    """The translations of `eval`, if they are in separate files."""
    text: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """The column, or columns, that hold the text."""
    label: Text | Annotated[list[Text], Field(min_length=2)] | None = None
    """The column that holds the label; of several labels at once, a column of lists, or the columns
    that say by 0 or 1 whether a row has the label of their name."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens after which a text is cut, or a new window of it begins."""
    stride: NonNegativeInt | None = None
    """Question answering: tokens that two windows of a long context have in common; by default a
    third of `max_length`."""
    pack: bool = False
    """Text generation: the texts are joined, an end token after each, and cut into windows of
    `max_length` tokens, so that no batch is padded."""
    limit: PositiveInt | None = None
    """Use at most this many rows."""
    synthetic: Synthetic | None = None
    """Settings of `train: synthetic`."""

    @model_validator(mode="after")
    def _eval_target_is_used(self) -> Data:
        if self.eval_target and not self.eval:
            message = "`eval_target` has no effect without `eval`"
            raise invalid("PLM108", message, "eval_target", hint="add `eval:`")
        return self

    @model_validator(mode="after")
    def _synthetic_is_used(self) -> Data:
        if self.synthetic and self.train != "synthetic":
            message = "`synthetic` has no effect unless `train` is `synthetic`"
            raise invalid("PLM108", message, "synthetic", hint="write `train: synthetic`")
        return self


class Calibrate(Node):
    """What passes measure the model on, where they do; without it, the data of the next stage that
    trains."""

    data: Source | Annotated[list[Source], Field(min_length=1)]
    """A file, a glob, `hub:name[/config][@split]`, the word `synthetic` (random token ids), or a
    list of files."""
    target: Source | Annotated[list[Source], Field(min_length=1)] | None = None
    """The translations of `data`, if they are in separate files, line by line."""
    text: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """The column, or columns, that hold the text."""
    label: Text | Annotated[list[Text], Field(min_length=2)] | None = None
    """The column that holds the label; of several labels at once, a column of lists, or the columns
    that say by 0 or 1 whether a row has the label of their name."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens after which a text is cut."""
    pack: bool = False
    """Text generation: the texts are joined and cut into windows, as in `train.data`."""
    rows: PositiveInt = 480
    """Number of rows that are drawn, by the recipe's seed."""
    limit: PositiveInt | None = None
    """Draw them from at most this many rows."""
    synthetic: Synthetic | None = None
    """Settings of `data: synthetic`."""

    @model_validator(mode="after")
    def _synthetic_is_used(self) -> Calibrate:
        if self.synthetic and self.data != "synthetic":
            message = "`synthetic` has no effect unless `data` is `synthetic`"
            raise invalid("PLM108", message, "synthetic", hint="write `data: synthetic`")
        return self

    def as_data(self) -> Data:
        """Return the same as data of a stage."""
        names = ("target", "text", "label", "max_length", "pack", "limit", "synthetic")
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return Data(train=self.data, **given)


OF_PASSES: Values = {"max_length": 512, "rows": 64, "pack": True}
"""How text is read that a pass names for itself."""


class Sequences(Node):
    """Sequence-level distillation: the teacher's translations replace the targets."""

    num_beams: PositiveInt = 4
    """Width of the teacher's beam search."""
    max_new_tokens: PositiveInt = 128
    """Longest translation."""
    cache: Text = "~/.cache/plmcc/sequences"
    """Directory that keeps translations for later runs."""


class Distill(Node):
    """Learning from a teacher: each weight above zero adds a term to the loss."""

    teacher: Text = "original"
    """`original` (the uncompressed model), a model directory or a hub id."""
    logits: Weight = 0.0
    """Weight of the divergence between the output distributions."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of these distributions."""
    hidden_states: Weight = 0.0
    """Weight of the distance between hidden states; of a translation model, those of the decoder,
    and those of the encoder where the teacher's depth is a multiple of the student's."""
    pooled: Weight = 0.0
    """Weight of the distance between pooled outputs."""
    sequence: Sequences | None = None
    """Translation: learn from the teacher's own translations of the training rows."""
    task: Weight | None = None
    """Weight of the task's own loss beside the teacher."""
    layers: dict[NonNegativeInt, NonNegativeInt] | None = None
    """For `hidden_states`: which teacher layer each student layer follows (of a translation
    model, layers of the decoder)."""

    @model_validator(mode="after")
    def _has_effect(self) -> Distill:
        if not (self.logits or self.hidden_states or self.pooled or self.sequence):
            hint = "set one of logits, hidden_states, pooled above 0, or add `sequence`"
            raise invalid("PLM108", "no distillation weight is above 0", hint=hint)
        word = self.teacher.casefold()
        if self.teacher != "original" and get_close_matches(word, ["original"], 1, 0.9):
            hint = "write `original`; a directory of this name is `./NAME`"
            raise invalid("PLM107", "`teacher` is a misspelt `original`", "teacher", hint=hint)
        if self.task is not None and not (self.logits or self.hidden_states or self.pooled):
            message = "`task` has no effect: there is no other loss to weigh it against"
            raise invalid("PLM108", message, "task", hint="remove it, or set `logits` above 0")
        if self.layers and not self.hidden_states:
            message = "`layers` has no effect while `hidden_states` is 0"
            raise invalid("PLM108", message, "layers", hint="set `hidden_states` above 0")
        return self


class Lora(Node):
    """Low-rank adapters beside frozen linear layers, merged into them at the end; needs peft."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Their scale is `alpha / r`; by default 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of their inputs."""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "linears"
    """The linear layers, as in `targets` of passes."""


class Adapters(Node):
    """What is trained instead of the weights."""

    lora: Lora
    """Low-rank adapters, and what the passes put in. `{}` takes the defaults."""


class Train(Node):
    """How a stage is trained, by transformers.Trainer."""

    data: Data
    """The training data."""
    distill: Distill | None = None
    """Learn from a teacher as well."""
    trainable: Literal["all", "all_but_embeddings", "passes"] | Adapters = "all"
    """Train the whole model, all but its embedding tables (and heads tied to them), only what the
    passes put in, or `{lora: {r: 16}}`: adapters of low rank, merged at the end."""
    dropout: bool = True
    """Keep the model's dropout; matching a teacher's hidden states learns faster without."""
    tokens_per_batch: Annotated[int, Field(ge=16)] | None = None
    """Batches of rows of similar length with at most this many padded tokens, instead of a fixed
    number of rows."""
    average_last: Annotated[int, Field(ge=2, le=100)] | None = None
    """Average the weights of this many last points: ends of epochs in a run of as many whole
    epochs, otherwise points spaced evenly over the second half of the steps."""
    arguments: Arguments = {}
    """Arguments of transformers.TrainingArguments."""

    def lora(self) -> Lora | None:
        """Return the settings of adapters, where they are trained."""
        return self.trainable.lora if isinstance(self.trainable, Adapters) else None

    @model_validator(mode="after")
    def _one_way_to_batch(self) -> Train:
        others = [name for name in _BATCHING if self.tokens_per_batch and name in self.arguments]
        if others:
            message = f"`tokens_per_batch` cannot be combined with `{others[0]}`"
            raise invalid("PLM108", message, "tokens_per_batch", hint="keep one of them")
        for name in ("max_steps", "num_train_epochs"):
            if self.arguments.get(name) == 0:
                message = f"a training with `{name}: 0` changes nothing"
                raise invalid("PLM108", message, "arguments", name, hint="remove `train`")
        return self


_OF_LIBRARIES = r"^(mteb|lm_eval):[\w./-]+$"


def _metric(given: object, named: Callable[[object], Metric]) -> object:
    """Let the tasks of libraries be metrics beside those that have a name of their own."""
    of_library = isinstance(given, str) and re.match(_OF_LIBRARIES, given)
    return given if of_library else named(given)


class Evaluate(Node):
    """One metric of the report."""

    metric: Annotated[
        Metric,
        WrapValidator(_metric),
        WithJsonSchema({"anyOf": [{"enum": [*get_args(Metric)]}, {"pattern": _OF_LIBRARIES}]}),
    ]
    """What is computed; `fidelity` and `kl_divergence` compare with the original model. `f1` counts
    words of answers (question answering, like `exact_match`), entities (token classification),
    classes (of two the second, of more the mean), or labels (micro). `spearman`, `pearson` and
    `mse` are of similarities or of a head that predicts a number. `bleu`, `chrf` and entities need
    the extra `eval`. `mteb:TASK` and `lm_eval:TASK` are scores of these libraries, with their own
    datasets; `lm_eval:TASK/METRIC` names one of the task's metrics."""
    data: Source = ""
    """A file, a glob or `hub:name[/config][@split]`. Scores of libraries have none."""
    tasks: Text | None = None
    """For `lm_eval`: a folder with definitions of further tasks."""
    target: Source | None = None
    """The translations of `data` where they are a file of their own, line by line."""
    text: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """The column, or columns, that hold the text."""
    label: Text | Annotated[list[Text], Field(min_length=2)] | None = None
    """The column that holds the label; of several labels at once, a column of lists, or the columns
    that say by 0 or 1 whether a row has the label of their name."""
    limit: PositiveInt | None = None
    """Use at most this many rows."""
    sample: PositiveInt | None = None
    """Use at most this many rows, evenly spaced over the data; `limit` takes the first ones, which
    are no sample where rows are sorted."""
    num_beams: PositiveInt = 4
    """For `bleu` and `chrf`: width of the beam search; 1 is greedy."""
    max_new_tokens: PositiveInt = 128
    """For `bleu` and `chrf`: longest translation."""
    context: Annotated[int, Field(ge=2)] | None = None
    """Text generation: the texts are joined, and read in windows of so many tokens; usual are 1024
    and 2048. Without it, each row is read by itself."""
    stride: PositiveInt | None = None
    """With `context`: by how many tokens a window follows the last one. A window's last tokens
    count, that many, after the others as context. By default `context`: no token is read twice."""

    @model_validator(mode="after")
    def _windows_fit(self) -> Evaluate:
        if self.context and self.metric not in OF_WINDOWS:
            message = f"`context` has no effect on {self.metric}"
            raise invalid("PLM108", message, "context", hint="remove it")
        if self.stride and not self.context:
            message = "`stride` has no effect without `context`"
            raise invalid("PLM108", message, "stride", hint="add `context: 2048`")
        if self.stride and self.context and self.stride > self.context:
            message = "`stride` is longer than `context`: tokens between would be left out"
            raise invalid("PLM107", message, "stride", hint=f"at most {self.context}")
        return self

    @model_validator(mode="after")
    def _data_fits_the_metric(self) -> Evaluate:
        library = library_of(self.metric)
        if not (library or self.data):
            message = f"`{self.metric}` needs the key `data`"
            raise invalid("PLM102", message, hint="add `data: ...`")
        useless = ["data", "target", "text", "label", "sample"] if library else ["tasks"]
        useless += ["limit", "tasks"] if library == "mteb" else []
        for name in useless:
            if getattr(self, name):
                message = f"`{name}` has no effect on {self.metric}"
                raise invalid("PLM108", message, name, hint="remove it")
        return self

    @model_validator(mode="after")
    def _search_is_used(self) -> Evaluate:
        for name in ("num_beams", "max_new_tokens") if self.metric not in ("bleu", "chrf") else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                message = f"`{name}` has no effect on {self.metric}"
                raise invalid("PLM108", message, name, hint="remove it")
        return self


class Lower(Node):
    """What the finished model is compiled to."""

    to: list[Literal["compile", "aoti", "onnx", "executorch"]] = Field(default_factory=list)
    """The targets. `compile`: latency is measured with torch.compile. Each of the others: the
    result has a directory of that name, as `plmcc export` writes it."""
    quantize: Literal["int8", "int4", "int8_dynamic"] | None = None
    """Quantize the remaining linear layers, like the pass `quantized_linears` with this scheme."""
    train: Train | None = None
    """Train the quantized layers in a last stage (quantization-aware training)."""

    @model_validator(mode="after")
    def _has_effect(self) -> Lower:
        if not (self.to or self.quantize):
            raise invalid(
                "PLM108", "`lower` does nothing", hint="add `to: [compile]` or `quantize`"
            )
        if self.train and not self.quantize:
            message = "`train` has no effect without `quantize`"
            raise invalid("PLM108", message, "train", hint="add `quantize: int8`")
        return self
