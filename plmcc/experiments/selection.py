"""Which candidate of `plmcc shrink` is the smallest that is good enough: trials without training.

Of one recipe, larger candidates are better: first the largest of each recipe is tried, then between
those of the smallest good one, by bisection. What was measured is on disk, for the next call.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from plmcc.diagnostics import PlmccError
from plmcc.experiments.candidates import Candidate
from plmcc.experiments.goal import Goal
from plmcc.experiments.trial import SearchRequest, original, run_trial
from plmcc.models.source import Source
from plmcc.recipe.load import Evaluate, Recipe, Train
from plmcc.recipe.metrics import lower_is_better
from plmcc.report.provenance import base_digests, data_digests, named_data
from plmcc.report.words import megabytes, number
from plmcc.utils.files import write_json

Say = Callable[[str], None]
TRIALS: dict[str, int] = {"quick": 7, "normal": 10, "best": 20}
"""How many candidates are tried, earlier calls included."""
FILE = "trials.json"
TRAINABLE = ("drop", "quality")
"""Limits that training helps to keep."""
_EPOCHS = 3
"""What the Trainer does where a recipe does not say how long it trains."""
_ROWS = 1000
"""Rows that trials are judged by; the result is judged by all."""


@dataclass
class Selection:
    """The trials of one call, and what earlier ones have left."""

    model: str
    goal: Goal
    judged: Evaluate
    """What the model is judged by."""
    effort: str
    work: Path
    usable: list[Candidate]
    """From small to large."""
    log: Say
    deployed: Callable[[Source], dict[str, float]] | None = None
    """Measures size and speed of a result as it will run."""
    known: dict[str, float] = field(default_factory=dict)
    """What was measured of the original."""
    done: dict[str, dict[str, float]] = field(default_factory=dict)
    """By the digest of a recipe, what was measured; nothing where it failed."""
    _digest: str = ""

    def excess(self, metrics: dict[str, float]) -> float:
        """Return by how much measured values are beyond the target, all limits added up."""
        return sum(self._beyond(metrics))

    def _beyond(self, metrics: dict[str, float]) -> tuple[float, float]:
        """The same, of limits that no training helps to keep (sizes, times), and of the others."""
        sums = [0.0, 0.0]
        for name, beyond in self.goal.excess(metrics, self.known).items():
            sums[name in TRAINABLE] += max(0.0, beyond)
        return sums[0], sums[1]

    def _request(self, recipe: Recipe) -> SearchRequest:
        few = self.judged.model_copy(update={"sample": _ROWS})
        bare = recipe.model_copy(update={"evaluate": [few]})
        return SearchRequest(trained(bare, 0), self.goal, self.model, None, lambda _: None)

    def begin(self, one: Candidate, size: int) -> Source:
        """Load the original, which has so many bytes on disk, and measure it.

        Raises:
            PlmccError: the model or the data cannot be read.
        """
        assert one.recipe is not None
        self.log(f"evaluating the original by {self.judged.metric}")
        start = time.perf_counter()
        source, known = original(self._request(one.recipe))
        self.known = known | {"size": float(size)}
        count = min(TRIALS[self.effort], len(self.usable))
        seconds = 2 * (time.perf_counter() - start) * count
        self._restore(source)
        self.log(f"trying up to {count} candidates without training, about {_about(seconds)}")
        return source

    def choose(self, possible: list[Candidate], source: Source) -> Candidate:
        """Return the smallest that reaches the target, or the nearest to it."""
        families: dict[str, list[Candidate]] = {}
        for one in possible:
            families.setdefault(one.name, []).append(one)
        if self.goal.asks("speed") or self.goal.asks("latency"):
            for family in families.values():
                self._try_fast(family, source)
            return self._best([one for one in possible if one.key in self.done])
        if not self.goal.judges:  # the best of what fits: large ones are better
            tried = possible[-TRIALS[self.effort] :]
            for one in reversed(tried):
                self._try(one, source)
            return self._best(tried)
        tops = sorted((family[-1] for family in families.values()), key=lambda one: one.size)
        # The largest of all is the safest; then by bisection, as if good ones were the large ones.
        good = tops.pop() if self._good(tops[-1], source) else None
        good = self._smallest(tops, source) or good
        if good is not None:
            good = self._smallest(families[good.name][:-1], source) or good
            smaller = [one for one in possible if one.size < good.size]
            good = next((one for one in reversed(smaller) if self._good(one, source)), None) or good
        if good is not None:
            return good
        for one in reversed(possible):
            self._good(one, source)
        tried = [one for one in possible if one.key in self.done]
        return min(tried, key=self._loss)

    def _best(self, tried: list[Candidate]) -> Candidate:
        """Return the one nearest to the target: the smallest of several, or, where the target does
        not say how good it must be, the best."""
        sign = 1 if lower_is_better(self.judged.metric) else -1

        def rank(one: Candidate) -> tuple[tuple[float, float], float]:
            last = one.size if self.goal.judges else sign * self._quality(one)
            return self._loss(one), last

        return min(tried, key=rank)

    def _smallest(self, sorted_: list[Candidate], source: Source) -> Candidate | None:
        """Return the smallest that is good, by bisection, as far as trials are left."""
        low, high, good = 0, len(sorted_) - 1, None
        while low <= high:
            middle = (low + high) // 2
            if self._good(sorted_[middle], source):
                good, high = sorted_[middle], middle - 1
            else:
                low = middle + 1
        return good

    def _try_fast(self, sorted_: list[Candidate], source: Source) -> None:
        """Look for the largest that is fast enough, by bisection, as far as trials are left: the
        larger it is, the slower and, as a rule, the better."""
        low, high = 0, len(sorted_) - 1
        if not self._fast(sorted_[0], source):
            return
        while low <= high:
            middle = (low + high) // 2
            if self._fast(sorted_[middle], source):
                low = middle + 1
            else:
                high = middle - 1

    def _fast(self, one: Candidate, source: Source) -> bool:
        return self._may(one) and self._loss(one, source)[0] <= 0

    def _may(self, one: Candidate) -> bool:
        """Whether a candidate has been tried, or may still be."""
        return one.key in self.done or len(self.done) < TRIALS[self.effort]

    def _good(self, one: Candidate, source: Source) -> bool:
        """Whether a candidate reaches the target; where no trials are left, it does not."""
        return self._may(one) and self._loss(one, source) <= (0, 0)

    def _quality(self, one: Candidate) -> float:
        return self.done[one.key].get("quality", float("nan"))

    def _loss(self, one: Candidate, source: Source | None = None) -> tuple[float, float]:
        if source is not None:
            self._try(one, source)
        found = self.done[one.key]
        return self._beyond(found) if found else (float("inf"), 0.0)

    def _try(self, one: Candidate, source: Source) -> None:
        if one.key in self.done:
            return
        assert one.recipe is not None
        start = time.perf_counter()
        request = self._request(one.recipe)
        try:
            found = run_trial(request, request.recipe, source, self.known, self.deployed)
        except PlmccError as problem:
            self.log(f"  {one.title}: {problem.diagnostics[0].message}")
            found = {}
        else:
            if self.deployed is None:
                found["size"] = float(one.size)
            took = time.perf_counter() - start
            self.log(f"  {one.title}: {self.figures(found)}  [{took:.0f} s]")
        self.done[one.key] = found
        self._keep()

    def figures(self, metrics: dict[str, float]) -> str:
        """Return measured values in a line."""
        if not metrics:
            return "it failed"
        size, quality = megabytes(round(metrics["size"])), number(metrics["quality"])
        words = f"{size}, {self.judged.metric} {quality}"
        words += f" (original {number(self.known['quality'])})"
        return words + (f", {metrics['speed']:.2f} times as fast" if "speed" in metrics else "")

    def _restore(self, source: Source) -> None:
        """Read what an earlier call has measured by the same model and data."""
        recipes = [one.recipe for one in self.usable if one.recipe is not None]
        recipe = max(recipes, key=lambda one: len(named_data(one)))
        recipe = recipe.model_copy(update={"evaluate": [self.judged]})
        same = [base_digests(source), data_digests(recipe, None), self.goal.text]
        same += [] if self.deployed is None else ["onnx"]
        self._digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        file = self.work / FILE
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if kept.get("digest") == self._digest:
            self.done = kept["trials"]

    def _keep(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / FILE, {"digest": self._digest, "trials": self.done})


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def trained(recipe: Recipe, times: float) -> Recipe:
    """Return a recipe with so many times the steps; 0 takes the training away."""

    def longer(train: Train | None) -> Train | None:
        if train is None or not times:
            return None
        steps = train.arguments.get("max_steps", -1)
        epochs = train.arguments.get("num_train_epochs", _EPOCHS)
        length = {"max_steps": max(1, round(steps * times))}
        if steps <= 0:
            length = {"num_train_epochs": epochs * times}
        return train.model_copy(update={"arguments": train.arguments | length})

    stages = recipe.stages and [
        stage.model_copy(update={"train": longer(stage.train)}) for stage in recipe.stages
    ]
    lower = recipe.lower and recipe.lower.model_copy(update={"train": longer(recipe.lower.train)})
    update = {"train": longer(recipe.train), "stages": stages, "lower": lower}
    return recipe.model_copy(update=update)
