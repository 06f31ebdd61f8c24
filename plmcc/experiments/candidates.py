"""What `plmcc shrink` and `plmcc advise` choose from: the shipped recipes with a `shrink` section,
each with all values of its `search` section, planned on a model without its weights."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from plmcc.api import Pass
from plmcc.artifact.size import component_bytes, parameter_count
from plmcc.diagnostics import PlmccError
from plmcc.experiments.served import unfit
from plmcc.experiments.space import Space, plain, written
from plmcc.models.source import Source
from plmcc.pipeline.prepare import prepare, prepares, store
from plmcc.planning.plan import plan
from plmcc.recipe.load import Recipe, Stage, load_recipe, varied
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

TEXT = "TEXT"
"""The value of a shipped recipe that stands for the text files of the user."""


@dataclass(frozen=True)
class Candidate:
    """A recipe with values, and what it will make of the model."""

    name: str
    """Of the recipe."""
    values: Values
    """Those of its `search` section, by path."""
    recipe: Recipe | None
    """None where it cannot be used."""
    size: int = 0
    """Bytes of weights, tokenizer and other files that a server needs."""
    parameters: int = 0
    reason: str = ""
    """Why it cannot be used."""

    @property
    def title(self) -> str:
        """The name with the values."""
        return f"{self.name} ({written(self.values)})" if self.values else self.name

    @property
    def key(self) -> str:
        """What tells its recipe from others."""
        assert self.recipe is not None
        return self.recipe.digest()

    @property
    def sizes(self) -> dict[str, float]:
        """The planned sizes, as limits of a target name them."""
        return {"size": self.size, "parameters": self.parameters}


def shipped() -> list[Path]:
    """Return the files of the recipes that are chosen from."""
    return sorted(
        Path(str(file))
        for file in files("plmcc.recipes").joinpath("shrink").iterdir()
        if file.name.endswith(".yaml")
    )


def candidates(
    source: Source,
    text: Sequence[str],
    recipes: Sequence[Path] = (),
    base: Path | None = None,
    served: bool = False,
) -> list[Candidate]:
    """Plan every recipe with all its values, from small to large; at the end those that cannot be
    used, once for each reason.

    Args:
        source: the model, on the meta device.
        text: the files of text; without any, recipes that need some cannot be used.
        recipes: their files; by default the shipped ones.
        base: the folder that relative paths may start at besides the current one.
        served: sizes are of an int8 ONNX file, and recipes that make no difference there are
            refused.
    """
    outline = Outline(source, base, served)
    found: list[Candidate] = []
    refused: dict[tuple[str, str], Candidate] = {}
    for file in recipes or shipped():
        for one in _of_file(file, outline, list(text)):
            if one.recipe is None:
                refused.setdefault((one.name, one.reason), one)
            else:
                found.append(one)
    return sorted(found, key=lambda one: one.size) + list(refused.values())


def _of_file(file: Path, outline: Outline, text: list[str]) -> Iterator[Candidate]:
    recipe = load_recipe(file)
    reason = _unfit(recipe, outline.source, text) or (unfit(recipe) if outline.served else "")
    if reason:
        yield Candidate(recipe.name, {}, None, reason=reason)
        return
    given = dict.fromkeys(_places(recipe.effective()), text)
    drawn = Space.of(recipe).shuffled(0) if recipe.search else [{}]
    for values in map(plain, drawn):
        try:
            made = varied(recipe, given | values).model_copy(update={"shrink": None})
            made = made.model_copy(update={"task": outline.source.task})
            yield Candidate(recipe.name, values, made, *outline.sizes(made))
        except PlmccError as problem:
            first = problem.diagnostics[0]
            reason = first.got if " " in first.got else first.message
            yield Candidate(recipe.name, values, None, reason=reason)
        except (RuntimeError, NotImplementedError) as problem:
            yield Candidate(recipe.name, values, None, reason=first_line(problem))


def _unfit(recipe: Recipe, source: Source, text: list[str]) -> str:
    """Why a recipe is not for a model; empty where it may be."""
    asked, needs_text = recipe.shrink, bool(list(_places(recipe.effective())))
    if asked is None:
        return "it has no `shrink` section"
    if asked.tasks and source.task not in asked.tasks:
        return f"it is for {', '.join(asked.tasks)}"
    share = table_share(source)
    if share < asked.table:
        return f"the token table is {share:.0%} of the model, and less than {asked.table:.0%}"
    if needs_text and source.tokenizer is None:
        return "it needs a tokenizer, and the model has none"
    if needs_text and not text:
        return "it needs text: add --text"
    if "quantize" in str(recipe.effective()) and find_spec("torchao") is None:
        return "torchao is not installed: pip install 'plmcc[quantize]'"
    return ""


def table_share(source: Source) -> float:
    """Return which part of a model's bytes the token table is."""
    table = source.model.get_input_embeddings()
    own = sum(p.nbytes for p in table.parameters()) if table is not None else 0
    return own / max(1, sum(component_bytes(source.model).values()))


def _places(value: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted paths of a recipe at which `TEXT` stands."""
    if value == TEXT:
        yield ".".join(path)
    pairs = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else pairs
    for key, inside in items:
        yield from _places(inside, (*path, str(key)))


@dataclass(frozen=True)
class Outline:
    """A model on the meta device, on which recipes are planned; it stays as it is."""

    source: Source
    base: Path | None = None
    served: bool = False
    """Whether it will be an int8 ONNX file."""

    @cached_property
    def _prepared(self) -> dict[str, tuple[Source, int]]:
        """By the passes that change the tokenizer: the model after them, and the bytes of the files
        beside its weights. They take longer than the rest of a plan."""
        return {}

    def sizes(self, recipe: Recipe) -> tuple[int, int]:
        """Return the bytes and the parameters that a recipe leaves.

        Raises:
            PlmccError: it does not fit the model.
        """
        first, *others = recipe.steps()
        early = [chosen for chosen in first.passes if prepares(chosen)]
        later = [chosen for chosen in first.passes if not prepares(chosen)]
        source, beside = self._after(early)
        stages = [first.model_copy(update={"passes": later}), *others]
        stages = [stage for stage in stages if stage.passes or stage.train]
        copied = replace(source, model=copy.deepcopy(source.model))
        if not stages:
            store(recipe, copied.model)
            return self._size(_weights(copied), parameter_count(copied.model), beside)
        rest = Recipe(
            task=recipe.task, dtype=recipe.dtype, calibrate=recipe.calibrate, stages=stages
        )
        made = plan(rest, copied, self.base, brief=True)
        if made.problems:
            raise PlmccError(*made.problems)
        after = made.stages[-1].after
        assert after is not None
        return self._size(after.bytes, after.parameters, beside)

    def _size(self, weights: int, parameters: int, beside: int) -> tuple[int, int]:
        return (parameters if self.served else weights) + beside, parameters

    def _after(self, early: list[Pass]) -> tuple[Source, int]:
        key = json.dumps([one.model_dump(mode="json") for one in early], sort_keys=True)
        if key not in self._prepared:
            source = replace(self.source, model=copy.deepcopy(self.source.model))
            if early:
                recipe = Recipe(stages=[Stage(name="early", passes=early)])
                source = prepare(recipe, source, self.base, lambda _: None).source
            self._prepared[key] = (source, side_bytes(source))
        return self._prepared[key]


def _weights(source: Source) -> int:
    return sum(component_bytes(source.model).values())


def side_bytes(source: Source) -> int:
    """Return the bytes of the files that a server needs beside the weights: configuration,
    tokenizer, modules of sentence-transformers."""
    total = len(source.model.config.to_json_string())
    if source.folder is not None:
        total += sum((source.folder / name).stat().st_size for name in source.other_files().copied)
    if source.tokenizer is not None and (source.retokenized or source.folder is None):
        with tempfile.TemporaryDirectory(prefix="plmcc-") as name:
            source.tokenizer.save_pretrained(name)
            total += sum(f.stat().st_size for f in Path(name).rglob("*") if f.is_file())
    return total
