"""One trial of a search: a recipe planned, carried out in memory, and measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from plmcc.artifact.size import component_bytes, parameter_count
from plmcc.catalog import registry as catalog
from plmcc.data.rows import data_files
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.latency import measure
from plmcc.experiments.goal import Goal
from plmcc.models.source import Source
from plmcc.pipeline.compiler import source_of
from plmcc.pipeline.judge import Judge
from plmcc.pipeline.prepare import prepares
from plmcc.pipeline.run import run
from plmcc.planning.plan import plan
from plmcc.recipe.load import Lower, Recipe
from plmcc.recipe.metrics import lower_is_better
from plmcc.report.provenance import named_data

Say = Callable[[str], None]
_SECONDS = 2.0
"""How long the two models are timed, where the target speaks of latency."""


@dataclass(frozen=True)
class SearchRequest:
    """What is searched: the values of a recipe for a model that reach a goal."""

    recipe: Recipe
    goal: Goal
    model: str | None = None
    base: Path | None = None
    """The folder that relative data paths may start at besides the current one."""
    log: Say = lambda _: None

    @property
    def metric(self) -> str:
        """Return the name of the figure that is the quality: the first one of `evaluate`."""
        return self.recipe.evaluate[0].metric

    def judged(self, recipe: Recipe) -> Recipe:
        """Return a recipe without all that a trial does not look at."""
        scheme = recipe.lower and recipe.lower.quantize
        lower = Lower(quantize=scheme) if scheme else None
        return recipe.model_copy(update={"evaluate": recipe.evaluate[:1], "lower": lower})


def original(asked: SearchRequest) -> tuple[Source, dict[str, float]]:
    """Load the original and measure it.

    Raises:
        PlmccError: the model or the data of the figure cannot be read.
    """
    recipe = asked.judged(asked.recipe)
    for name in named_data(recipe):  # before anything takes long
        data_files(name, asked.base)
    source = source_of(recipe, asked.model or recipe.model, asked.base)
    [quality] = Judge.of(recipe, source, asked.base).metrics(source, source)
    return source, _sizes(source.model) | {"quality": quality, "drop": 0.0}


def predict(asked: SearchRequest, recipe: Recipe) -> dict[str, float]:
    """Return the sizes that a plan knows exactly, without weights.

    Raises:
        PlmccError: the recipe does not fit the model.
    """
    made = plan(asked.judged(recipe), asked.model, asked.base, brief=True)
    if made.problems:
        raise PlmccError(*made.problems)
    after = made.stages[-1].after
    rules = [rule for stage in made.stages for rule in stage.rules]
    passes = [chosen for stage in recipe.steps() for chosen in stage.passes]
    prepared = {catalog.name_of(type(chosen)) for chosen in passes if prepares(chosen)}
    unplanned = any(not rule.sites and rule.name not in prepared for rule in rules)
    inexact = any(site.about for rule in rules for site in rule.sites)
    if after is None or unplanned or inexact:
        return {}
    return {"size": after.bytes, "parameters": after.parameters}


def run_trial(
    asked: SearchRequest,
    recipe: Recipe,
    source: Source,
    known: Mapping[str, float],
    deployed: Callable[[Source], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Carry a recipe out in memory, and measure the result.

    Args:
        asked: what is searched.
        recipe: with the values of the trial.
        source: the original, which stays as it is.
        known: the figures of the original.
        deployed: measures size and speed of the result as it will run, and may change it; by
            default they are those of the model in PyTorch.

    Raises:
        PlmccError: the recipe does not fit the model, or its training fails.
    """
    bare = asked.judged(recipe)
    with redirect_stdout(sys.stderr):  # the Trainer prints its log
        mine = source_of(bare, asked.model or bare.model, asked.base)
        result = run(bare, mine, lambda _: None, asked.base, dry=True)
    quality = result.metrics[0]["after"]
    drop = (quality - known["quality"]) * (1 if lower_is_better(asked.metric) else -1)
    found = _sizes(result.model) | {"quality": quality, "drop": drop}
    if deployed is not None:
        return found | deployed(result.source)
    if asked.goal.asks("latency") or asked.goal.asks("speed"):
        compiled = recipe.lower is not None and "compile" in recipe.lower.to
        [row] = measure(source.model, result.model, (1,), compiled=compiled, seconds=_SECONDS)
        found |= {"latency": row.compressed, "original_latency": row.compressed / row.ratio}
        found["speed"] = 1 / row.ratio
    return found


def _sizes(model: PreTrainedModel) -> dict[str, float]:
    size = sum(component_bytes(model).values())
    return {"size": size, "parameters": parameter_count(model)}
