"""Wall time of two models side by side: the same inputs, in turn, in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.lower import compile as lower


@dataclass(frozen=True)
class Latency:
    """Median seconds of a forward pass of the original and the compressed model; `ratio` is the
    median over rounds of compressed / original, `spread` the distance of its quartiles."""

    mode: str
    batch: int
    length: int
    original: float
    compressed: float
    ratio: float
    spread: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    batches: tuple[int, ...] = (1, 32),
    length: int = 32,
    compiled: bool = False,
    seconds: float = 4.0,
) -> list[Latency]:
    """Time both models on random tokens.

    Args:
        original: the model before compression; not changed.
        compressed: the model after it; not changed.
        batches: batch sizes.
        length: tokens in a row.
        compiled: compile copies of both through torch.compile first.
        seconds: about how long to measure for each batch size.
    """
    models = [original.eval(), compressed.eval()]
    if compiled:
        models = [lower(copy.deepcopy(model)) for model in models]
    return [
        _measure(models, batch, length, "compiled" if compiled else "eager", seconds)
        for batch in batches
    ]


@torch.inference_mode()
def _measure(
    models: list[PreTrainedModel], batch: int, length: int, mode: str, seconds: float
) -> Latency:
    inputs = _inputs(models[0], batch, length)
    runs = [_runner(model, inputs) for model in models]
    for _ in range(3):
        slowest = max(_timed(run) for run in runs)
    rounds = min(400, max(10, int(seconds / (2 * slowest + 1e-9))))
    # The order alternates, so that neither model always runs in the other's cache.
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(_timed(runs[which]))
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(series) for series in times)
    return Latency(mode, batch, length, before, after, middle, high - low)


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    vocabulary: Any = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(5, int(vocabulary), (batch, length), generator=generator).to(
        model.device
    )
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BL
    return inputs


def _runner(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        model(**inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
