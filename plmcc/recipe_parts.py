"""The parts of a recipe: what a stage learns from and how, what is evaluated, what is compiled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from plmcc import training_arguments

if TYPE_CHECKING:
    Arguments = dict[str, Any]
else:
    Arguments = training_arguments.typed()

# fmt: off
Task = Literal[
    "auto", "sentence-similarity", "feature-extraction", "text-classification", "fill-mask",
    "text-generation",
]
Metric = Literal["accuracy", "f1", "matthews", "spearman", "pearson", "perplexity", "fidelity"]
# fmt: on
Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Text = Annotated[str, Field(min_length=1)]

_HUB = re.compile(r"hub:[\w.-]+(/[\w.-]+){0,2}(@[\w.\[\]%:+-]+)?")


def _source(text: str) -> str:
    if text.startswith("hub:") and not _HUB.fullmatch(text):
        cure = "write hub:name, hub:owner/name, hub:owner/name/config or hub:owner/name@split"
        raise invalid("PLM107", f"`{text}` is not a dataset of the hub", cure=cure)
    return text


Source = Annotated[Text, AfterValidator(_source)]


def invalid(code: str, message: str, *at: str | int, cure: str = "") -> PydanticCustomError:
    """Return an error for a validator to raise, `at` a place below the model being validated."""
    context = {"text": message, "code": code, "at": at, "cure": cure}
    return PydanticCustomError("plmcc", "{text}", context)


class Node(BaseModel):
    """A part of a recipe: frozen, of exact types, without unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
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


class Data(Node):
    """What a stage learns from."""

    train: Source | Annotated[list[Source], Field(min_length=1)]
    """A file, a glob, `hub:name[/config][@split]`, the word `synthetic`, or a list of files."""
    eval: Source | Annotated[list[Source], Field(min_length=1)] | None = None
    """Data to evaluate on while training, in the same forms."""
    text: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """The column, or columns, that hold the text."""
    label: Text | None = None
    """The column that holds the label."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens after which a text is cut."""
    limit: PositiveInt | None = None
    """Use only this many rows."""
    synthetic: Synthetic | None = None
    """Settings of `train: synthetic`."""

    @model_validator(mode="after")
    def _synthetic_is_used(self) -> Data:
        if self.synthetic and self.train != "synthetic":
            message = "`synthetic` has no effect unless `train` is `synthetic`"
            raise invalid("PLM108", message, "synthetic", cure="write `train: synthetic`")
        return self


class Distill(Node):
    """Learning from a teacher: each weight above zero adds a term to the loss."""

    teacher: Text = "original"
    """`original` (the uncompressed model), a model folder or a hub id."""
    logits: Weight = 0.0
    """Weight of the divergence between the output distributions."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of these distributions."""
    hidden_states: Weight = 0.0
    """Weight of the distance between hidden states."""
    pooled: Weight = 0.0
    """Weight of the distance between pooled outputs."""
    task: Weight | None = None
    """Weight of the task's own loss beside the teacher."""
    layers: dict[NonNegativeInt, NonNegativeInt] | None = None
    """For `hidden_states`: which teacher layer each student layer follows."""

    @model_validator(mode="after")
    def _has_effect(self) -> Distill:
        if not (self.logits or self.hidden_states or self.pooled):
            cure = "set one of logits, hidden_states, pooled above 0, or remove `distill`"
            raise invalid("PLM108", "no distillation weight is above 0", cure=cure)
        if self.layers and not self.hidden_states:
            message = "`layers` has no effect while `hidden_states` is 0"
            raise invalid("PLM108", message, "layers", cure="set `hidden_states` above 0")
        return self


class Train(Node):
    """How a stage is trained, by transformers.Trainer."""

    data: Data
    """What to learn from."""
    distill: Distill | None = None
    """Learn from a teacher too."""
    trainable: Literal["all", "passes"] = "all"
    """Train the whole model, or only what the passes put in."""
    dropout: bool = True
    """Keep the model's dropout; matching a teacher's hidden states learns faster without."""
    arguments: Arguments = {}
    """Arguments of transformers.TrainingArguments."""


class Evaluate(Node):
    """One figure of the report."""

    metric: Metric
    """What is computed; `fidelity` compares with the original model."""
    data: Source
    """A file, a glob or `hub:name[/config][@split]`."""
    text: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """The column, or columns, that hold the text."""
    label: Text | None = None
    """The column that holds the label."""
    limit: PositiveInt | None = None
    """Use only this many rows."""


class Lower(Node):
    """What the finished model is compiled to."""

    to: Annotated[list[Literal["compile"]], Field(min_length=1)]
    """The targets; `compile` is torch.compile."""
    dynamic: bool = True
    """Compile for any batch size and length."""
