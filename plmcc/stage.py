"""One stage: match, replace, train, harden."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.diagnostics import error
from plmcc.pictures import Pictured
from plmcc.preparing import prepares, quantization
from plmcc.probes import probe_inputs
from plmcc.recipe import Recipe, Stage
from plmcc.result import Result, Say
from plmcc.shown import Shown
from plmcc.train import Lesson, train
from plmcc.verify import outputs

_HARDEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def timed(work: Callable[[], Any], name: str, result: Result) -> Any:
    """Return what the work returns, and note the seconds that it took."""
    start = time.perf_counter()
    done = work()
    result.seconds[name] = round(time.perf_counter() - start, 3)
    return done


def match_stage(
    recipe: Recipe, model: PreTrainedModel, stage: int, shown: dict[str, Shown]
) -> rewrite.Matched:
    """Match the passes of a stage, given by its number.

    Raises:
        PlmccError: as `rewrite.match`.
    """
    step = recipe.steps()[stage]
    chosen = [(i, p) for i, p in enumerate(step.passes) if not prepares(p)]
    places = [recipe.pass_place(stage, index, "targets") for index, _ in chosen]
    # A stage that only rewrites is shown the data of the next one that trains.
    names = [later.name for later in recipe.steps()[stage:]]
    data = next((shown[name] for name in names if name in shown), Shown())
    return rewrite.match(model, [p for _, p in chosen], places, data.batches, data.counts)


def run_stage(
    stage: Stage,
    matched: rewrite.Matched,
    lesson: Lesson | None,
    result: Result,
    say: Say,
    steps: int | None,
    folder: Path | None = None,
) -> None:
    """Replace, train with checkpoints in the folder, harden."""
    model = result.model
    say(f"stage {stage.name}: rewriting {len(matched.sites)} site(s)")
    for _, site in matched.sites:
        if site.warning:
            say(f"  warning: {site.path}: {site.warning}")
    inputs = probe_inputs(model)
    before = outputs(model, inputs)["output"]
    done = timed(lambda: rewrite.replace_all(model, matched), f"{stage.name}.replace", result)
    promised = [p.tolerance for p in matched.passes if p.preserves != "lossy"]
    if len(promised) == len(matched.passes):
        after = outputs(model, inputs)["output"]
        _check_equal(before, after, sum(promised), f"stage {stage.name}: the passes")
    result.misses += [{"path": miss.path, "reason": miss.reason} for _, miss in matched.misses]
    settings = stage.train
    if settings is not None and lesson is not None:
        say(f"stage {stage.name}: training on {len(lesson.train)} rows")
        log = timed(
            lambda: train(model, settings, lesson, done, steps, folder),
            f"{stage.name}.train",
            result,
        )
        result.training[stage.name] = log
    model.eval()
    soft = outputs(model, inputs)["output"]
    records = rewrite.harden_all(model, done)
    allowed = _HARDEN_TOLERANCE.get(model.dtype, 5e-2)
    hard = outputs(model, inputs)["output"]
    _check_equal(soft, hard, allowed, f"stage {stage.name}: hardening")
    result.records += records
    result.pictures += [
        Pictured(stage.name, d.site.path, picture) for d in done for picture in d.soft.pictures()
    ]
    result.sites += [
        {"pass": d.name, "paths": list(d.site.paths), "figures": d.soft.facts(), "layout": r.layout}
        | ({"warning": d.site.warning} if d.site.warning else {})
        for d, r in zip(done, records, strict=True)
    ]


def quantize(recipe: Recipe, scheme: str, result: Result, say: Say) -> None:
    """Round the linear layers that are left."""
    stage, place = quantization(scheme), recipe.place(("lower", "quantize"))
    matched = rewrite.match(result.model, stage.passes, [place])
    run_stage(stage, matched, None, result, say, None)


def _check_equal(before: torch.Tensor, after: torch.Tensor, allowed: float, what: str) -> None:
    scale = float(before.abs().max().clamp(min=1e-6))
    difference = float((before - after).abs().max()) / scale
    if not difference <= allowed:
        message = f"{what} changed the outputs by {difference:.3g} of their scale"
        raise error("PLM402", message, allowed=f"at most {allowed:g}")
