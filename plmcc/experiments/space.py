"""What a search may vary, as optuna draws it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial

from plmcc.recipe.load import Range, Recipe, varied
from plmcc.utils.types import Values


@dataclass(frozen=True)
class Space:
    """The dimensions by path: choices, or a range, which is `whole` where its numbers are."""

    dimensions: dict[str, list[object] | Range]
    whole: frozenset[str]

    @classmethod
    def of(cls, recipe: Recipe) -> Space:
        """Return the space of a recipe with a `search` section."""
        assert recipe.search is not None
        ranges = {path: g for path, g in recipe.search.items() if isinstance(g, Range)}
        whole = frozenset(path for path, given in ranges.items() if _is_whole(recipe, path, given))
        return cls(dict(recipe.search), whole)

    def values(self, trial: Trial) -> Values:
        """Return the values that optuna draws for a trial."""
        return plain({path: self._drawn(trial, path) for path in self.dimensions})

    def _drawn(self, trial: Trial, path: str) -> object:
        given = self.dimensions[path]
        if not isinstance(given, Range):
            # As JSON: a choice may be a list, or a pass with its options.
            return trial.suggest_categorical(path, [json.dumps(value) for value in given])
        if path in self.whole:
            numbers = self._numbers(path)
            step = 1 if given.log else numbers.step
            return trial.suggest_int(path, numbers[0], numbers[-1], step=step, log=given.log)
        return trial.suggest_float(path, given.low, given.high, step=given.step, log=given.log)

    def _numbers(self, path: str) -> range:
        given = self.dimensions[path]
        assert isinstance(given, Range)
        return range(int(given.low), int(given.high) + 1, int(given.step or 1))

    def count(self) -> float:
        """Return how many different trials there are; infinite where numbers are not whole."""
        return math.prod(self._count(path) for path in self.dimensions)

    def _count(self, path: str) -> float:
        given = self.dimensions[path]
        if not isinstance(given, Range):
            return len(given)
        return len(self._numbers(path)) if path in self.whole else math.inf

    def shuffled(self, seed: int) -> list[Values]:
        """Return all trials of a space that is not infinite, in a random order, as optuna takes
        them."""
        axes = [
            self._numbers(path) if path in self.whole else [json.dumps(v) for v in given]
            for path, given in self.dimensions.items()
        ]
        found = [dict(zip(self.dimensions, row, strict=True)) for row in itertools.product(*axes)]
        random.Random(seed).shuffle(found)
        return found


def _is_whole(recipe: Recipe, path: str, given: Range) -> bool:
    """Whether a range has whole numbers only; `{low: 1, high: 2}` of a learning rate has others."""
    value: Any = varied(recipe, {path: given.low}).effective()
    for part in path.split("."):
        pairs = enumerate(value) if isinstance(value, list) else value.items()
        value = next(inside for key, inside in pairs if str(key) == part)
    return isinstance(value, int) and not isinstance(given.step, float)


def plain(drawn: Mapping[str, object]) -> Values:
    """Return what optuna has drawn as values of the recipe."""
    return {path: json.loads(v) if isinstance(v, str) else v for path, v in drawn.items()}


def short_names(paths: list[str]) -> list[str]:
    """Return the end of each path that no other one has too."""

    def short(path: str) -> str:
        parts = path.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
        others = [other for other in paths if other != path]
        return next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), path)

    return [short(path) for path in paths]


def written(values: Mapping[str, object]) -> str:
    """Return values in a line, with short names."""
    pairs = zip(short_names(list(values)), values.values(), strict=True)
    return ", ".join(f"{name} {shown(value)}" for name, value in pairs)


def shown(value: object) -> str:
    """Return a value as short as it can be read."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
