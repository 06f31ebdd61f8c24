"""A trial of a recipe's passes on a small random copy of the model, before any real work.

What a pass cannot do on an architecture is so found out in seconds, by `plan` as by `apply`: the
passes rewrite the copy as they would the model, their schedules are moved to the end, and the
result is run, with and without cache, and saved and loaded.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import islice

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.artifact import format as artifact
from plmcc.artifact.verify import caches_exactly, check_cache, first_output
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError, error
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.probes import probe_inputs
from plmcc.models.reduced import Reducible
from plmcc.pipeline.prepare import prepares
from plmcc.pipeline.verifier import ties_of, verify_program
from plmcc.recipe.load import Recipe
from plmcc.utils import distributed
from plmcc.utils.numerics import relative_difference
from plmcc.utils.terminal import hushed
from plmcc.utils.text import first_line

_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_MOST = 20_000_000
"""Parameters of the largest copy that is tried."""
_TRIES = 8
"""Copies that are made until the rules match one."""


def try_out(recipe: Recipe, model: Reducible) -> None:
    """Let the passes of a recipe rewrite a small random copy of a model.

    Passes on tables are left out: what they do depends on no architecture. Nothing is tried where
    no copy is small enough, or where the rules match none.

    Args:
        recipe: with passes of real classes.
        model: what copies are made from.

    Raises:
        PlmccError: a pass matches this architecture and cannot rewrite it.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return  # compressed already: there is no copy without its tensors
    state = torch.random.get_rng_state()
    try:
        for config in islice(model.configs(most=_MOST, run=False), _TRIES):
            try:
                copied = model.drawn(config, recipe.seed)
                cached = caches_exactly(copied, probe_inputs(copied))
            except Exception:  # whatever an architecture makes of few layers: nothing to try
                continue
            if _tried(recipe, copied, cached):
                return
    finally:
        torch.random.set_rng_state(state)


def _tried(recipe: Recipe, model: PreTrainedModel, cached: bool) -> bool:
    """Rewrite a copy; whether the rules matched it. `cached`: its tokens are the same with cache
    and without."""
    records: list[rewrite.Record] = []
    for number, stage in enumerate(recipe.steps()):
        chosen = [(i, p) for i, p in enumerate(stage.passes) if not prepares(p)]
        locations = [recipe.pass_location(number, index, "targets") for index, _ in chosen]
        try:
            found = rewrite.match(
                model, [p for _, p in chosen], locations, CalibrationData.random(model)
            )
        except PlmccError:
            return False  # too few layers for its options
        sites = [(at, site) for at, site in found.sites if site.roles[0] != "embedding"]
        for at, (index, one) in enumerate(chosen):
            part = replace(found, sites=tuple(pair for pair in sites if pair[0] == at))
            if not part.sites:
                continue
            try:
                records += _rewritten(model, part, cached)
            except Exception as problem:  # what passes, and models so changed, raise
                name = catalog.name_of(type(one))
                if isinstance(problem, PlmccError) and not _is_ours(name):
                    raise  # its author needs the file and the line
                reason = _reason(problem)
                message = f"`{name}` does not fit {type(model).__name__}: {reason}"
                where = recipe.pass_location(number, index)
                hint = "choose other `targets`, options or another pass"
                got = "a small random copy of the model, rewritten by the pass"
                raise error("PLM203", message, where, got=got, hint=hint) from problem
    return True


def _is_ours(name: str) -> bool:
    """Whether a pass is of plmcc: then what it cannot do is no bug to look for, but a refusal."""
    return not catalog.is_registered(name) and catalog.entry(name).origin == "plmcc"


def _reason(problem: Exception) -> str:
    if isinstance(problem, PlmccError):
        return problem.diagnostics[0].message
    return f"{type(problem).__name__}: {first_line(problem)}"


def _rewritten(
    model: PreTrainedModel, matched: rewrite.Matched, cached: bool
) -> list[rewrite.Record]:
    """Rewrite a copy by one pass, and check what it has become."""
    inputs, ties = probe_inputs(model), ties_of(model)
    done = rewrite.replace_all(model, matched)
    verify_program(model, done, inputs, ties, "trainable")
    for objective in {id(one.objective): one.objective for one in done}.values():
        if objective is not None:
            objective.advance(1.0)
    records = rewrite.harden_all(model, done)
    verify_program(model, done, inputs, ties, "deployed")
    if cached:
        check_cache(model, inputs)
    artifact.adopt(model, records)
    if not distributed.is_main_process():
        return records  # transformers saves in one process only
    expected = first_output(model, inputs)
    with tempfile.TemporaryDirectory() as folder, hushed():
        try:
            model.save_pretrained(folder)
        except (OSError, SafetensorError):  # no room here: that says nothing of the pass
            return records
        again: PreTrainedModel = type(model).from_pretrained(folder).eval()
    difference = relative_difference(first_output(again, inputs), expected)
    if not difference <= _BOUNDS.get(model.dtype, 5e-2):
        message = f"saved and loaded again, it differs by {difference:.3g} of its scale"
        raise error("PLM402", message)
    return records
