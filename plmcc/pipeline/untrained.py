"""What language models lose by passes that no training follows: measured where there is text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from transformers import PreTrainedModel

from plmcc.catalog import registry as catalog
from plmcc.data.tasks import GENERATION
from plmcc.ir.calibration import Calibration, CalibrationData
from plmcc.models.source import Source
from plmcc.pipeline.datasets import StageData
from plmcc.pipeline.expected import PlannedSite
from plmcc.pipeline.prepare import prepares
from plmcc.recipe.load import Recipe

_RISE = 0.05  # nats a token


def untrained(recipe: Recipe) -> list[str]:
    """Return the names of the lossy passes that no training follows."""
    steps = recipe.steps()
    last = max((i for i, stage in enumerate(steps) if stage.train), default=-1)
    return [
        catalog.name_of(type(chosen))
        for stage in steps[last + 1 :]
        for chosen in stage.passes
        if chosen.preserves == "lossy" and not prepares(chosen)
    ]


def bits_note(
    recipe: Recipe, source: Source, sites: Iterable[tuple[str, PlannedSite]]
) -> list[str]:
    """Say how few bits a dimension a table of a language model will have that nothing trains.

    `sites` are those that will be rewritten, with the names of their stages.
    """
    if source.task != GENERATION or not untrained(recipe):
        return []
    stages = {stage.name for stage in recipe.steps() if not stage.train}
    for stage, site in sites:
        if stage in stages and site.kind == "embedding" and site.parameters:
            bits = 8 * site.bytes_after / math.prod(site.shape)
            if bits < 4:
                what = f"{site.path} will have {bits:.2g} bits a dimension, and no training follows"
                return [f"{what}: measure the perplexity, or distill"]
    return []


def loss_before(recipe: Recipe, source: Source, data: StageData) -> float | None:
    """Return the loss of the original on the calibration text (nats a token), where a language
    model is compressed and not trained afterwards."""
    if source.task != GENERATION or not untrained(recipe):
        return None
    return _loss(source.model, _text(recipe, data))


def loss_note(
    recipe: Recipe, model: PreTrainedModel, data: StageData, before: float | None
) -> list[str]:
    """Say how far the loss has risen; nothing where it has not, or was not measured."""
    after = _loss(model, _text(recipe, data)) if before is not None else None
    if before is None or after is None or not after - before > _RISE:
        return []
    perplexities = " to ".join(f"{math.exp(min(loss, 50)):,.4g}" for loss in (before, after))
    what = f"perplexity on the calibration text rose from {perplexities}"
    return [f"{what}, and no training follows {', '.join(untrained(recipe))}: distill the result"]


def _text(recipe: Recipe, data: StageData) -> CalibrationData | None:
    found = [data.calibration[s.name] for s in recipe.steps() if s.name in data.calibration]
    return found[-1] if found and not found[-1].synthetic else None


def _loss(model: PreTrainedModel, text: CalibrationData | None) -> float | None:
    if text is None or not text.batches or "labels" not in text.batches[0]:
        return None
    few = CalibrationData(text.batches[:2])
    return Calibration(model, few).loss()
