"""The recipe as frozen objects: built from YAML by `plmcc.recipe`, or directly in Python.

```python
Recipe(name="codes", passes=[CompositionalCodes()], train=Train(data=Data(train="a.txt")))
```
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from plmcc import catalog, training_arguments
from plmcc.diagnostics import Place
from plmcc.options import Pass
from plmcc.recipe_text import Document, Steps
from plmcc.recipe_yaml import Dumper

if TYPE_CHECKING:
    Arguments = dict[str, Any]
else:
    Arguments = training_arguments.typed()

Task = Literal[
    "auto",
    "sentence-similarity",
    "feature-extraction",
    "text-classification",
    "fill-mask",
    "text-generation",
]
Metric = Literal["accuracy", "f1", "matthews", "spearman", "pearson", "perplexity", "fidelity"]
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


def _named(passes: list[Pass]) -> list[dict[str, Any]]:
    dumped = ((p, p.model_dump(mode="json", round_trip=True, by_alias=True)) for p in passes)
    return [{catalog.name_of(type(p)): options} for p, options in dumped]


Passes = Annotated[list[Pass], PlainSerializer(_named)]


class Stage(Node):
    """Passes and the training after them; its result is on disk before the next stage begins."""

    name: Name
    """Names the folder of the stage."""
    passes: Passes = []
    """The techniques, in the order they are applied."""
    train: Train | None = None
    """Training after the passes have replaced their sites."""


class Recipe(Node):
    """A whole recipe. Two recipes are equal when they do the same, wherever they were read from.

    Raises:
        pydantic.ValidationError: a ValueError, when built in Python from values that do not fit.
    """

    plmcc: Literal[1] = 1
    """The version of the recipe format."""
    name: Name = "recipe"
    """Names the result; by default the name of the file."""
    model: Text | None = None
    """A model folder or hub id; the command line wins."""
    task: Task = "auto"
    """What the model is for; `auto` takes it from the model's configuration."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds everything random."""
    passes: Passes = []
    """The techniques, in the order they are applied."""
    train: Train | None = None
    """Training after the passes have replaced their sites."""
    stages: list[Stage] | None = None
    """More than one step; instead of `passes` and `train`."""
    evaluate: list[Evaluate] = []
    """The figures of the report, of the original and of the compressed model."""
    lower: Lower | None = None
    """What the finished model is compiled to."""

    _document: Document | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _has_steps(self) -> Recipe:
        if not (self.stages or self.passes):
            at = "passes" if self.stages is None else "stages"
            cure = f"add `{at}:` with at least one; `plmcc passes` lists the passes"
            raise invalid("PLM108", f"this recipe does nothing: it has no {at}", at, cure=cure)
        if self.stages is not None and (self.passes or self.train):
            cure = "move `passes` and `train` into a stage"
            message = "`stages` stands beside `passes` or `train`"
            raise invalid("PLM108", message, "stages", cure=cure)
        return self

    @model_validator(mode="after")
    def _stages_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages or []]
        for index, name in enumerate(names):
            if name in names[:index]:
                at = ("stages", index, "name")
                raise invalid("PLM107", f"two stages are named `{name}`", *at, cure="rename one")
        return self

    def steps(self) -> list[Stage]:
        """Return the stages; the short form is one stage named `main`."""
        short = Stage(name="main", passes=self.passes, train=self.train)
        return [short] if self.stages is None else self.stages

    def place(self, path: Steps, *, key: bool = False) -> Place | str:
        """Return where the value (or key) at `path` was written, for a diagnostic.

        A path that was not written gives the nearest one around it; a recipe built in Python gives
        its name and the dotted path.
        """
        if self._document is None:
            return f"recipe {self.name}: {'.'.join(map(str, path))}"
        return self._document.place(path, key=key)

    def pass_place(self, stage: int, index: int, option: str = "") -> Place | str:
        """Return where pass `index` of `steps()[stage]`, or one option of it, was written."""
        head: Steps = (
            ("passes", index) if self.stages is None else ("stages", stage, "passes", index)
        )
        name = catalog.name_of(type(self.steps()[stage].passes[index]))
        return self.place((*head, name, option) if option else (*head, name), key=not option)

    def effective(self) -> dict[str, Any]:
        """Return the recipe as plain values with every default filled in."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """Return YAML text that parses to an equal recipe."""
        text: str = yaml.dump(self.effective(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        return text

    def digest(self) -> str:
        """Return the SHA-256 of the effective recipe as canonical JSON."""
        text = json.dumps(self.effective(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.effective() == other.effective()

    def __hash__(self) -> int:
        return hash(self.digest())
