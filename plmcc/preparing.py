"""What happens before the first stage: checks of a whole recipe, and passes that change the
tokenizer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plmcc import catalog
from plmcc.api import Pass
from plmcc.diagnostics import PlmccError, error
from plmcc.export import check_export
from plmcc.recipe import Recipe, Stage
from plmcc.result import Result, Say
from plmcc.source import Source


def prepares(chosen: Pass) -> bool:
    """Say whether a pass changes tokenizer and model before data is encoded."""
    return type(chosen).prepare is not Pass.prepare


def prepare(recipe: Recipe, source: Source, base: Path | None, result: Result, say: Say) -> None:
    """Let passes that change the tokenizer do so, before any data is encoded.

    Raises:
        PlmccError: a pass does not fit, or comes too late.
    """
    places = [(n, i, p) for n, s in enumerate(recipe.steps()) for i, p in enumerate(s.passes)]
    for number, index, chosen in places:
        if prepares(chosen) and number > 0:
            message = "it changes what data is made of, which has been encoded by then"
            place, given = recipe.pass_place(number, index), recipe.steps()[number].name
            raise error("PLM303", message, place, given=given, cure="move it to the first stage")
    seen: set[type[Pass]] = set()
    for number, index, chosen in places:
        if prepares(chosen):
            name, place = catalog.name_of(type(chosen)), recipe.pass_place(number, index)
            if type(chosen) in seen:
                cure = "keep one, with all that the other has"
                raise error("PLM204", f"`{name}` stands here for the second time", place, cure=cure)
            seen.add(type(chosen))
            say(f"{name}: looking at the text")
            start = time.perf_counter()
            try:
                figures = chosen.prepare(source, base) or {}
            except PlmccError as problem:
                # What a pass says of itself stands in the recipe; files have places of their own.
                found = [d if d.place else replace(d, place=place) for d in problem.diagnostics]
                raise PlmccError(*found) from None
            result.seconds[f"{name}.prepare"] = round(time.perf_counter() - start, 3)
            record = {"pass": name, "paths": ["tokenizer"], "figures": figures, "layout": {}}
            result.sites.append(record)


def widen(recipe: Recipe, source: Source) -> None:
    """Put float16 weights that are trained into float32, whose range the gradients need."""
    if source.model.dtype is torch.float16 and any(step.train for step in recipe.steps()):
        source.model.float()
        source.notes += ("its float16 weights are trained, and saved, in float32",)


def check_lower(recipe: Recipe, model: PreTrainedModel) -> None:
    """Check that the result can be compiled, exported and rounded as asked.

    Raises:
        PlmccError: it cannot, or what that needs is not installed.
    """
    for index, to in enumerate(recipe.lower.to if recipe.lower is not None else ()):
        if to == "compile":
            continue
        try:
            check_export(model, to)
        except PlmccError as problem:
            place = recipe.place(("lower", "to", index))
            raise PlmccError(*(replace(d, place=place) for d in problem.diagnostics)) from None
    if recipe.lower is not None and recipe.lower.quantize is not None:
        own = quantization(recipe.lower.quantize).passes[0]
        for chosen in (one for stage in recipe.steps() for one in stage.passes):
            if type(chosen) is type(own) and chosen.targets == own.targets:
                message = "`quantized_linears` leaves no linear layer that is not rounded"
                raise error("PLM303", message, recipe.place(("lower", "quantize")),
                            given=recipe.lower.quantize, cure="keep one of the two")  # fmt: skip


def check_trained(recipe: Recipe) -> None:
    """Check that stages train what has to be trained.

    Raises:
        PlmccError: one does not.
    """
    for number, stage in enumerate(recipe.steps()):
        for index, chosen in enumerate(stage.passes):
            reason = chosen.needs_training() if stage.train is None else ""
            if reason:
                cure = "add a `train` section to this stage"
                place = recipe.pass_place(number, index)
                raise error("PLM303", reason, place, given="no `train`", cure=cure)


def quantization(scheme: str) -> Stage:
    """Return the last stage of a recipe whose `lower` section has `quantize`."""
    chosen: Any = catalog.load("quantized_linears")
    return Stage(name="quantize", passes=[chosen(scheme=scheme)])
