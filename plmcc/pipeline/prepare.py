"""What precedes the first stage: checks of a whole recipe, and passes that change the tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.api import Pass
from plmcc.artifact import format as artifact
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError, error
from plmcc.export.exporter import check_export
from plmcc.models.source import Source
from plmcc.pipeline.datasets import check_architecture
from plmcc.recipe.load import Recipe
from plmcc.recipe.needs import check_trained
from plmcc.report.result import Log
from plmcc.training.adapters import adapted
from plmcc.utils.extras import library
from plmcc.utils.types import Values


@dataclass(frozen=True)
class Prepared:
    """The model after the passes that change its tokenizer, and what they did."""

    source: Source
    sites: list[Values] = field(default_factory=list)
    """One record for each of these passes, as in the report."""
    seconds: dict[str, float] = field(default_factory=dict)


def prepares(chosen: Pass) -> bool:
    """Return whether a pass changes tokenizer and model before data is encoded."""
    return type(chosen).prepare is not Pass.prepare


def retokenizes(recipe: Recipe) -> bool:
    """Return whether a pass of the recipe changes the tokenizer."""
    return any(prepares(chosen) for stage in recipe.steps() for chosen in stage.passes)


def prepare(recipe: Recipe, source: Source, base: Path | None, log: Log) -> Prepared:
    """Let passes that change the tokenizer do so, before any data is encoded.

    Raises:
        PlmccError: a pass does not fit, is listed twice, or is not in the first stage.
    """
    sites: list[Values] = []
    seconds: dict[str, float] = {}
    for number, index, chosen in _preparing(recipe):
        name, start = catalog.name_of(type(chosen)), time.perf_counter()
        log(f"{name}: reading the text")
        try:
            done = chosen.prepare(source, base)
        except PlmccError as problem:
            # An error of the pass is located in the recipe; one of a file has its own location.
            where = recipe.pass_location(number, index)
            found = [d if d.location else replace(d, location=where) for d in problem.diagnostics]
            raise PlmccError(*found) from None
        assert done is not None, f"{name}.prepare returns what it did"
        notes = (*source.notes, *done.notes)
        source = replace(source, tokenizer=done.tokenizer, retokenized=True, notes=notes)
        seconds[f"{name}.prepare"] = round(time.perf_counter() - start, 3)
        record = {"pass": name, "paths": ["tokenizer"], "statistics": done.statistics, "layout": {}}
        sites.append(record)
    return Prepared(source, sites, seconds)


def _preparing(recipe: Recipe) -> list[tuple[int, int, Pass]]:
    """Return the passes that prepare, with stage and index."""
    stages = enumerate(recipe.steps())
    found = [(n, i, p) for n, s in stages for i, p in enumerate(s.passes) if prepares(p)]
    kinds: set[type[Pass]] = set()
    for number, index, chosen in found:
        location = recipe.pass_location(number, index)
        if number > 0:
            message = "this pass changes the tokenizer, but the data is encoded before this stage"
            given = recipe.steps()[number].name
            hint = "move it to the first stage"
            raise error("PLM303", message, location, got=given, hint=hint)
        if type(chosen) in kinds:
            message = f"`{catalog.name_of(type(chosen))}` is listed twice"
            raise error("PLM204", message, location, hint="merge the two entries")
        kinds.add(type(chosen))
    return found


def stored_dtype(recipe: Recipe, model: PreTrainedModel) -> torch.dtype:
    """Return what the weights of the result are stored in."""
    asked: torch.dtype = getattr(torch, recipe.dtype) if recipe.dtype else model.dtype
    return asked


def widened_note(recipe: Recipe, model: PreTrainedModel) -> str:
    """Say that weights are stored in 16 bits and trained in float32: gradients need its range, and
    small steps its precision. Empty if they are not."""
    settings = [stage.train for stage in recipe.steps() if stage.train]
    trained = ["passes" if one.lora() else one.trainable for one in settings]
    stored = stored_dtype(recipe, model)
    name, given = (str(dtype).removeprefix("torch.") for dtype in (stored, model.dtype))
    if stored != model.dtype:
        trains = stored != torch.float32 and trained
        return f"its {given} weights are {'trained in float32 and ' * bool(trains)}saved in {name}"
    # What only the passes put in is small, and bfloat16 has the range: no copy of all the rest.
    half = stored is torch.float16 and trained
    if not half and not (stored is torch.bfloat16 and set(trained) - {"passes"}):
        return ""
    return f"its {name} weights are trained in float32 and saved in {name}"


def widen(recipe: Recipe, source: Source) -> Source:
    """Cast weights that are trained, or saved in another dtype, to float32; `narrow` casts them to
    what they are saved in."""
    note = widened_note(recipe, source.model)
    if not note:
        return source
    stored = stored_dtype(recipe, source.model)
    kept = kept_in_float32(source.model, stored)
    source.model.float()
    return replace(source, stored=stored, in_float32=kept, notes=(*source.notes, note))


def store(recipe: Recipe, model: PreTrainedModel) -> None:
    """Cast a model to what the result is stored in, where the recipe asks for another dtype."""
    stored = stored_dtype(recipe, model)
    if stored != model.dtype:
        kept = kept_in_float32(model, stored)
        cast(model.float(), stored, kept)


def kept_in_float32(model: PreTrainedModel, stored: torch.dtype) -> frozenset[str]:
    """Return the modules whose tensors stay in float32: those that have such among others, or,
    where the dtype changes, those that transformers would load so."""
    state: Mapping[str, Tensor] = model.state_dict()
    names = {name for name, value in state.items() if value.dtype is torch.float32}
    if model.dtype != stored:
        parts = {*(model._keep_in_fp32_modules_strict or ())}
        if stored is torch.float16:
            parts |= {*(model._keep_in_fp32_modules or ())}
        names = {name for name in state if parts & {*name.split(".")}}
    return frozenset(name.rpartition(".")[0] for name in names)


def cast(model: PreTrainedModel, dtype: torch.dtype, in_float32: frozenset[str]) -> None:
    """Cast the tensors in float32 to another dtype, but for those of some modules.

    Buffers that no file holds, such as frequencies of rotary positions, keep their precision.
    """
    kept = tuple(f"{path}." for path in in_float32)
    for name, value in model.state_dict(keep_vars=True).items():
        if value.dtype is torch.float32 and not name.startswith(kept):
            value.data = value.data.to(dtype)


def narrow(source: Source) -> None:
    """Cast the tensors of a widened model to what they are saved in."""
    if source.stored is not None:
        cast(source.model, source.stored, source.in_float32)


def check_lower(recipe: Recipe, source: Source) -> None:
    """Check that the result can be compiled, exported and quantized as asked.

    Raises:
        PlmccError: it cannot, or what that needs is not installed.
    """
    for index, to in enumerate(recipe.lower.to if recipe.lower is not None else ()):
        if to == "compile":
            continue
        try:
            check_export(source.model, to)
        except PlmccError as problem:
            location = recipe.location(("lower", "to", index))
            raise PlmccError(
                *(replace(d, location=location) for d in problem.diagnostics)
            ) from None
    if recipe.lower is not None and recipe.lower.quantize is not None:
        *before, last = recipe.steps()
        own = last.passes[0]
        for chosen in (one for stage in before for one in stage.passes):
            if type(chosen) is type(own) and chosen.targets == own.targets:
                name = catalog.name_of(type(own))
                message = (
                    f"nothing is left for `lower.quantize`: `{name}` quantizes every linear layer"
                )
                location = recipe.location(("lower", "quantize"))
                hint = "keep one of the two"
                raise error("PLM303", message, location, got=recipe.lower.quantize, hint=hint)


def _check_trained(recipe: Recipe, _: Source) -> None:
    check_trained(recipe)


def _check_data(recipe: Recipe, source: Source) -> None:
    """Check that the model fits the sections that give it data."""
    trained = any(stage.train for stage in recipe.steps())
    asked = {"train": trained, "calibrate": recipe.calibration(), "evaluate": recipe.evaluate}
    for key, section in asked.items():
        if section:
            check_architecture(source, key)
    reason = next((p.needs_data() for s in recipe.steps() for p in s.passes if p.needs_data()), "")
    if reason and source.model.main_input_name != "input_ids":
        message = f"{reason}, and the model does not read text"
        raise error("PLM303", message, "passes", got=type(source.model).__name__)


def _check_adapters(recipe: Recipe, source: Source) -> None:
    """Check that adapters can be trained, before anything is rewritten."""
    for stage in recipe.steps():
        asked = stage.train.lora() if stage.train else None
        if asked is not None:
            library("peft", "peft", "`trainable: {lora: ...}`", "train.trainable")
            adapted(source.model, asked)


def _check_finite(_: Recipe, source: Source) -> None:
    """Refuse weights that are not numbers: whatever is measured, fitted or trained would fail late,
    or mean nothing."""
    for name, value in source.model.named_parameters():
        if value.is_meta or not value.is_floating_point():
            continue
        wrong = sum(
            int((~torch.isfinite(part)).sum()) for part in value.detach().reshape(-1).split(_PART)
        )
        if wrong:
            message = "a tensor of the model has values that are not finite"
            got = f"{name}: {wrong:,} of {value.numel():,}"
            hint = "the checkpoint is damaged: load it in its own dtype, or get it again"
            raise error("PLM303", message, source.name, got=got, hint=hint)


def _check_quantized(_: Recipe, source: Source) -> None:
    """Refuse what would need the weights that another library has quantized."""
    method = artifact.method_of(source.model.config)
    if method in ("", artifact.METHOD):
        return
    message = f"the checkpoint is quantized already ({method})"
    hint = "start from the checkpoint that it was made from, and quantize the result"
    raise error("PLM303", message, source.name, hint=hint)


_PART = 2**24
"""Values that are looked at together: a mask of all would take memory."""
CHECKS: tuple[Callable[[Recipe, Source], None], ...] = (
    check_lower,
    _check_trained,
    _check_data,
    _check_quantized,
    _check_finite,
    _check_adapters,
)
"""Checks of a whole recipe on a model: `apply` raises the first error, `plan` lists all."""
