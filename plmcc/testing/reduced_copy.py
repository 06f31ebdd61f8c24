"""A small random copy of a model: its architecture, config and tokenizer, with few layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from plmcc.diagnostics import error
from plmcc.models.reduced import Reducible
from plmcc.models.source import Source, outline
from plmcc.planning.plan import Plan, plan
from plmcc.recipe.load import Recipe


def reduced_copy(recipe: Recipe, source: Source, base: Any = None) -> tuple[Source, Plan]:
    """Return a reduced copy on which the rules of a recipe match, on the CPU, and its plan.

    It has two layers, or as many as the rules need (`keep: 6`, `expect: 12`); where that is still
    large, small widths too, if the architecture allows them. Weights are drawn by the recipe's
    seed.

    Args:
        recipe: what will be done to it.
        source: the model, on the meta device.
        base: the folder that relative data paths may start at besides the current one.

    Raises:
        PlmccError: the model is compressed already. If the rules match no reduced copy, the plan of
            the deepest one has the problems.
    """
    if getattr(source.model.config, "quantization_config", None) is not None:
        raise error(
            "PLM502",
            "a reduced copy needs an original model, but this one is compressed",
            source.name,
        )
    made: Plan | None = None
    original = Reducible.of(source.model)
    for config in original.configs(_least(recipe)):
        model = outline(config, type(source.model), {}, source.name)
        trial = replace(source, model=model, tokenizer=copy.deepcopy(source.tokenizer))
        made = plan(recipe, trial, base, brief=True)
        if not made.problems:
            reduced = replace(source, model=original.drawn(config, recipe.seed), scratch=False)
            return reduced, made
    assert made is not None
    return source, made


def _least(recipe: Recipe) -> int:
    """The number of layers that the layer maps of distillation speak of."""
    trained = [stage.train for stage in recipe.steps() if stage.train]
    maps = [t.distill.layers for t in trained if t.distill and t.distill.layers]
    return max((max(m.values()) + 1 for m in maps), default=1)
