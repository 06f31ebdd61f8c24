"""One stage: match, replace, train, harden."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.artifact.verify import first_output
from plmcc.diagnostics import error
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.probes import probe_inputs
from plmcc.pipeline.prepare import prepares
from plmcc.pipeline.verifier import Dump, Form, ties_of, verify_program
from plmcc.recipe.load import Recipe, Stage
from plmcc.report.charts import SiteChart
from plmcc.report.result import Log, Result
from plmcc.training.loop import TrainingData, train
from plmcc.utils.numerics import relative_difference
from plmcc.utils.types import Values

_HARDEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def timed(work: Callable[[], Any], name: str, result: Result) -> Any:
    """Return what the work returns, and note the seconds that it took."""
    start = time.perf_counter()
    done = work()
    result.seconds[name] = round(time.perf_counter() - start, 3)
    return done


def match_stage(
    recipe: Recipe, model: PreTrainedModel, stage: int, calibration: Mapping[str, CalibrationData]
) -> rewrite.Matched:
    """Match the passes of a stage, given by its number.

    Raises:
        PlmccError: as `rewrite.match`.
    """
    step = recipe.steps()[stage]
    chosen = [(i, p) for i, p in enumerate(step.passes) if not prepares(p)]
    locations = [recipe.pass_location(stage, index, "targets") for index, _ in chosen]
    # A stage that only rewrites calibrates on the data of the next one that trains.
    names = [later.name for later in recipe.steps()[stage:]]
    data = next((calibration[name] for name in names if name in calibration), CalibrationData())
    return rewrite.match(model, [p for _, p in chosen], locations, data)


def run_stage(
    stage: Stage,
    matched: rewrite.Matched,
    training_data: TrainingData | None,
    result: Result,
    log: Log,
    schedule_steps: int | None,
    folder: Path | None = None,
    dump: Dump | None = None,
) -> None:
    """Replace, train with checkpoints in the folder, harden; verify the model after each pass."""
    model = result.model
    inputs = probe_inputs(model)
    check = partial(_after, stage.name, model, inputs, ties_of(model), dump, log)
    log(f"stage {stage.name}: rewriting {len(matched.sites)} site(s)")
    _warn(matched, log)
    before = first_output(model, inputs)
    softened = partial(rewrite.replace_all, model, matched, partial(check, "trainable"))
    done = timed(softened, f"{stage.name}.replace", result)
    promised = [p.tolerance for p in matched.passes if p.preserves != "lossy"]
    if len(promised) == len(matched.passes):
        after = first_output(model, inputs)
        _check_equal(before, after, sum(promised), f"stage {stage.name}: the passes")
    result.misses += [{"path": miss.path, "reason": miss.reason} for _, miss in matched.misses]
    settings = stage.train
    if settings is not None and training_data is not None:
        log(f"stage {stage.name}: training on {len(training_data.train)} rows")
        logged = timed(
            lambda: train(model, settings, training_data, done, schedule_steps, folder),
            f"{stage.name}.train",
            result,
        )
        result.training[stage.name] = logged
    model.eval()
    soft = first_output(model, inputs)
    records = rewrite.harden_all(model, done, partial(check, "deployed"))
    allowed = _HARDEN_TOLERANCE.get(model.dtype, 5e-2)
    hard = first_output(model, inputs)
    _check_equal(soft, hard, allowed, f"stage {stage.name}: hardening")
    _note(stage.name, done, records, result)


def _warn(matched: rewrite.Matched, log: Log) -> None:
    for _, site in matched.sites:
        if site.warning:
            log(f"  warning: {site.path}: {site.warning}")


def _after(
    stage: str,
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    ties: Mapping[str, str],
    dump: Dump | None,
    log: Log,
    form: Form,
    done: Sequence[rewrite.Replacement],
) -> None:
    # The dump first: it is what one wants to read when the verifier finds something.
    file = dump.write(model, stage, done, form) if dump is not None else None
    if file is not None:
        log(f"  wrote {file}")
    verify_program(model, done, inputs, ties, form)


def _note(
    stage: str,
    done: list[rewrite.Replacement],
    records: list[rewrite.Record],
    result: Result,
) -> None:
    """Add what a stage made to the result."""
    result.records += records
    result.charts += [
        SiteChart(stage, d.site.path, chart) for d in done for chart in d.soft.charts()
    ]
    for one, record in zip(done, records, strict=True):
        site: Values = {"pass": one.name, "paths": list(one.site.paths)}
        site |= {"statistics": one.soft.statistics(), "layout": record.layout}
        result.sites.append(site | ({"warning": one.site.warning} if one.site.warning else {}))


def _check_equal(before: torch.Tensor, after: torch.Tensor, allowed: float, what: str) -> None:
    difference = relative_difference(after, before)
    if not difference <= allowed:
        message = f"{what} changed the outputs by {difference:.3g} of their scale"
        raise error("PLM402", message, allowed=f"at most {allowed:g}")
