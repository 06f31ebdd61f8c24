"""Time of generation, prompt and tokens apart: models side by side, in turn, in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from plmcc.evaluation.latency import inputs_of, wait_for
from plmcc.inference.compile import compile as lower
from plmcc.utils.types import Values

TOKENS = 32
LEAST = 4
"""Tokens after the first; fewer say little."""
_ROUNDS = (5, 100)
Pair = tuple[float, float]


@dataclass(frozen=True)
class Decoding:
    """Greedy generation with the cache, of the original and the compressed model (in this order).

    `prefill` is the median seconds until the first token; `tokens_per_second` that of all rows of
    a batch after it. The ratios are medians over rounds of the compressed model's time to the
    original's, for the prompt and for a token.
    """

    mode: str
    batch: int
    length: int
    """Tokens of the prompt."""
    tokens: int
    """Tokens of each row after the first."""
    prefill: Pair
    tokens_per_second: Pair
    prefill_ratio: float
    decode_ratio: float

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


@torch.inference_mode()
def measure_decoding(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    batches: Sequence[int] = (1, 16),
    length: int = 128,
    compiled: bool = False,
    seconds: float = 4.0,
    tokens: int = TOKENS,
) -> list[Decoding]:
    """Time both models on random prompts; the end of a text does not end it.

    Args:
        original: the model before compression; not changed.
        compressed: the model after it; not changed.
        batches: batch sizes.
        length: tokens in a prompt.
        compiled: compile copies of both first, as `plmcc.compile` does.
        seconds: about how long to measure for each batch size.
        tokens: tokens of each row after the first.
    """
    models = [original.eval(), compressed.eval()]
    if compiled:
        models = [lower(copy.deepcopy(model)) for model in models]
    mode = "compiled" if compiled else "eager"
    return [_measured(models, batch, length, mode, seconds, tokens) for batch in batches]


def _measured(
    models: list[PreTrainedModel], batch: int, length: int, mode: str, seconds: float, tokens: int
) -> Decoding:
    runs = [_runner(model, models, batch, length) for model in models]
    for _ in range(2):
        slowest = max(run(1 + tokens) for run in runs)
    rounds = _rounds(seconds, slowest)
    first: list[list[float]] = [[], []]
    each: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = runs[which](1)
            first[which].append(start)
            each[which].append(max(1e-9, runs[which](1 + tokens) - start) / tokens)
    rates = [batch / statistics.median(times) for times in each]
    prefill = [statistics.median(times) for times in first]
    return Decoding(
        mode,
        batch,
        length,
        tokens,
        (prefill[0], prefill[1]),
        (rates[0], rates[1]),
        _ratio(first),
        _ratio(each),
    )


def _rounds(seconds: float, slowest: float) -> int:
    least, most = _ROUNDS
    return min(most, max(least, int(seconds / (2.5 * slowest + 1e-9))))


def _ratio(times: list[list[float]]) -> float:
    original, compressed = times
    return statistics.median(b / a for a, b in zip(original, compressed, strict=True))


def _runner(
    model: PreTrainedModel, models: list[PreTrainedModel], batch: int, length: int
) -> Callable[[int], float]:
    """Return what generates so many tokens, and says in how many seconds."""
    prompt: dict[str, Any] = inputs_of(models, batch, length)
    prompt.pop("decoder_input_ids", None)
    settings = {"do_sample": False, "num_beams": 1, "use_cache": True}
    settings["pad_token_id"] = model.config.get_text_config(decoder=True).pad_token_id or 0

    generate: Callable[..., object] = model.generate  # type: ignore[assignment]

    def run(count: int) -> float:
        start: float = time.perf_counter()
        given = {"max_new_tokens": count, "min_new_tokens": count}
        generate(**prompt, **settings, **given)
        wait_for(model)
        return time.perf_counter() - start

    return run
