"""The recipe as frozen objects: built from YAML by `plmcc.recipe.load`, or directly in Python.

```python
Recipe(name="codes", passes=[CompositionalCodes()], train=Train(data=Data(train="a.txt")))
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PlainSerializer, PrivateAttr, model_validator

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import Location, listing
from plmcc.pass_base import Pass
from plmcc.recipe.document import Document, Steps
from plmcc.recipe.metrics import METRICS_OF_TASKS, RANKING, is_of
from plmcc.recipe.search_space import Search
from plmcc.recipe.sections import (
    OF_PASSES,
    Calibrate,
    Evaluate,
    Lower,
    Name,
    Node,
    Scratch,
    ShrinkFor,
    Task,
    Text,
    Train,
    invalid,
)
from plmcc.recipe.yaml_loader import Dumper
from plmcc.utils.types import Values

_QUANTIZATION = "quantized_linears"
"""The pass that `lower.quantize` stands for."""


def _named(passes: list[Pass]) -> list[Values]:
    dumped = ((p, p.model_dump(mode="json", round_trip=True, by_alias=True)) for p in passes)
    return [{catalog.name_of(type(p)): options} for p, options in dumped]


Passes = Annotated[list[Pass], PlainSerializer(_named)]


class Stage(Node):
    """Passes and the training after them; its result is on disk before the next stage begins."""

    name: Name
    """Names the directory of the stage."""
    passes: Passes = Field(default_factory=list)
    """The techniques, in the order they are applied."""
    train: Train | None = None
    """Training after the passes have replaced their sites."""

    @model_validator(mode="after")
    def _has_effect(self) -> Stage:
        if not (self.passes or self.train):
            hint = "add `passes` or `train`, or remove the stage"
            raise invalid("PLM108", f"the stage `{self.name}` does nothing", "name", hint=hint)
        return self


class Recipe(Node):
    """A whole recipe. Two recipes are equal when they do the same, wherever they were read from.

    Raises:
        pydantic.ValidationError: a ValueError, when built in Python from values that do not fit.
    """

    plmcc: Literal[1] = 1
    """The version of the recipe format."""
    name: Name = "recipe"
    """Names the result; by default the name of the file."""
    model: Text | Scratch | None = None
    """A model directory or hub id, or a new model; the command line overrides it."""
    task: Task = "auto"
    """What the model is for; `auto` takes it from the model's configuration."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds everything random."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the weights of the result are stored in; by default what those of the model are."""
    passes: Passes = Field(default_factory=list)
    """The techniques, in the order they are applied."""
    train: Train | None = None
    """Training after the passes have replaced their sites."""
    stages: list[Stage] | None = None
    """More than one step; instead of `passes` and `train`."""
    calibrate: Calibrate | None = None
    """What passes measure the model on; by default the data of the next stage that trains."""
    evaluate: list[Evaluate] = Field(default_factory=list)
    """The metrics of the report, of the original and of the compressed model."""
    lower: Lower | None = None
    """What the finished model is compiled to."""
    shrink: ShrinkFor | None = None
    """Which models `plmcc shrink` tries this recipe on. Other commands ignore it."""
    search: Search | None = None
    """What `plmcc search` varies, by dotted path (`passes.0.compositional_codes.codebooks`): a list
    of choices, or a range `{low, high}`. Other commands take the recipe as it is."""

    _document: Document | None = PrivateAttr(default=None)
    _pass_class: Callable[[str], type[Pass]] = PrivateAttr(default_factory=lambda: catalog.load)
    """`catalog.options` in a recipe that was read without importing torch."""

    @model_validator(mode="after")
    def _has_steps(self) -> Recipe:
        if not (self.stages or self.passes or self.train):
            at = "passes" if self.stages is None else "stages"
            hint = f"add `{at}:` with at least one; `plmcc passes` lists the passes"
            raise invalid("PLM108", f"this recipe does nothing: it has no {at}", at, hint=hint)
        if self.stages is not None and (self.passes or self.train):
            hint = "move `passes` and `train` into a stage"
            message = "`stages` cannot be combined with `passes` or `train`"
            raise invalid("PLM108", message, "stages", hint=hint)
        return self

    @model_validator(mode="after")
    def _random_weights_teach_nothing(self) -> Recipe:
        if not isinstance(self.model, Scratch):
            return self
        for step, at in self._steps_at():
            distill = step.train.distill if step.train else None
            if distill and distill.teacher == "original":
                message = "the original of a new model is random: nothing can be learned from it"
                raise invalid(
                    "PLM108",
                    message,
                    *at,
                    "train",
                    "distill",
                    hint="set `teacher:` to a trained model",
                )
        for index, asked in enumerate(self.evaluate):
            if asked.metric in ("fidelity", "kl_divergence"):
                message = f"`{asked.metric}` compares with the original, which is random here"
                raise invalid(
                    "PLM108", message, "evaluate", index, "metric", hint="choose another metric"
                )
        return self

    @model_validator(mode="after")
    def _metrics_fit_the_task(self) -> Recipe:
        if self.task == "auto":
            return self
        known = METRICS_OF_TASKS[self.task]
        for index, asked in enumerate(self.evaluate):
            if not is_of(asked.metric, self.task):
                message = f"{asked.metric} is not a metric of {self.task}"
                at, hint = ("evaluate", index, "metric"), f"choose {listing(list(known))}"
                raise invalid("PLM303", message, *at, hint=hint)
            similar = self.task == "sentence-similarity" and asked.metric in ("spearman", "pearson")
            pairs = similar or asked.metric in RANKING
            if pairs and (isinstance(asked.text, str) or len(asked.text or "ab") == 1):
                of = " of similarities" if similar else ""
                message = f"{asked.metric}{of} needs two columns of text"
                hint = "write `text: [COLUMN, COLUMN]`"
                raise invalid("PLM303", message, "evaluate", index, "text", hint=hint)
        return self

    def _steps_at(self) -> list[tuple[Stage, tuple[str | int, ...]]]:
        if self.stages is not None:
            return [(stage, ("stages", index)) for index, stage in enumerate(self.stages)]
        return [(self._written()[0], ())] if self.passes or self.train else []

    @model_validator(mode="after")
    def _calibration_is_said_once(self) -> Recipe:
        for step, at in self._steps_at():
            for index, chosen in enumerate(step.passes):
                if self.calibrate is not None and chosen.calibrates_on():
                    message = "`text` of the pass and `calibrate` both say what is measured on"
                    name = catalog.name_of(type(chosen))
                    place = (*at, "passes", index, name, "text")
                    raise invalid("PLM108", message, *place, hint="remove one of the two")
        return self

    @model_validator(mode="after")
    def _stages_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages or []]
        for index, name in enumerate(names):
            if name in names[:index]:
                at = ("stages", index, "name")
                raise invalid("PLM107", f"two stages are named `{name}`", *at, hint="rename one")
        return self

    def steps(self) -> list[Stage]:
        """Return the stages: the short form is one stage named `main`, and `lower.quantize` is a
        last one named `quantize`."""
        if self.lower is None or self.lower.quantize is None:
            return self._written()
        chosen: Any = self._pass_class(_QUANTIZATION)
        options = {"scheme": self.lower.quantize, "trainable": self.lower.train is not None}
        last = Stage(name="quantize", passes=[chosen(**options)], train=self.lower.train)
        return [*self._written(), last]

    def calibration(self) -> Calibrate | None:
        """Return what passes measure the model on: `calibrate`, or the text that passes name."""
        named = [
            file for step in self.steps() for one in step.passes for file in one.calibrates_on()
        ]
        if self.calibrate is not None or not named:
            return self.calibrate
        return Calibrate(data=list(dict.fromkeys(named)), **OF_PASSES)

    def _written(self) -> list[Stage]:
        if self.stages is not None:
            return self.stages
        return [Stage(name="main", passes=self.passes, train=self.train)]

    def with_code(self) -> Recipe:
        """Return the recipe with passes of their own classes, where they were read as options only.

        Raises:
            PlmccError: a pass cannot be imported.
        """

        def loaded(passes: list[Pass]) -> list[Pass]:
            kinds = [catalog.load(catalog.name_of(type(chosen))) for chosen in passes]
            pairs = zip(kinds, passes, strict=True)
            return [kind(**chosen.model_dump(exclude_unset=True)) for kind, chosen in pairs]

        stages = self.stages and [
            stage.model_copy(update={"passes": loaded(stage.passes)}) for stage in self.stages
        ]
        copied = self.model_copy(update={"passes": loaded(self.passes), "stages": stages})
        copied._pass_class = catalog.load
        return copied

    def location(self, path: Steps, *, key: bool = False) -> Location | str:
        """Return where the value (or key) at `path` was written, for a diagnostic.

        A path that was not written gives the nearest one around it; a recipe built in Python gives
        its name and the dotted path.
        """
        if self._document is None:
            return f"recipe {self.name}: {'.'.join(map(str, path))}"
        return self._document.location(path, key=key)

    def pass_location(self, stage: int, index: int, option: str = "") -> Location | str:
        """Return where pass `index` of `steps()[stage]`, or one option of it, was written."""
        if stage >= len(self._written()):
            return self.location(("lower", "quantize"))
        head: Steps = (
            ("passes", index) if self.stages is None else ("stages", stage, "passes", index)
        )
        name = catalog.name_of(type(self.steps()[stage].passes[index]))
        return self.location((*head, name, option) if option else (*head, name), key=not option)

    def effective(self) -> Values:
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
