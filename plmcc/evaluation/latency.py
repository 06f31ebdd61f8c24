"""Wall time of models side by side: the same inputs, in turn, in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.inference.compile import compile as lower
from plmcc.ir.probes import vocabulary_of
from plmcc.utils.types import Values


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

    def to_json(self) -> Values:
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
    inputs = inputs_of(models, batch, length)
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


@dataclass(frozen=True)
class Throughput:
    """Generated tokens per second: the median over rounds, the distance of its quartiles, and the
    median over rounds of how much faster than the first model this is."""

    name: str
    batch: int
    beams: int
    tokens: int
    """Tokens of one round, end tokens included, start tokens and padding not."""
    tokens_per_second: float
    spread: float
    speedup: float

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


def measure_generation(
    models: Mapping[str, Callable[..., Tensor]],
    sentences: Sequence[Sequence[int]],
    batch: int,
    beams: int,
    *,
    pad: int,
    eos: int,
    max_new_tokens: int = 128,
    rounds: int = 5,
) -> list[Throughput]:
    """Time generation in the steady state.

    Args:
        models: callables with the arguments `input_ids`, `attention_mask`, `num_beams` and
            `max_new_tokens` of transformers' `generate`: `model.generate`, compiled or not, or that
            of an export. The first is what the others are compared with.
        sentences: token ids; batches are taken in this order, so that sorting is the caller's.
        batch: sentences at a time.
        beams: beams; 1 is greedy search.
        pad: the id of padding.
        eos: the id that ends a sentence.
        max_new_tokens: longest result.
        rounds: how often all sentences are translated, the models in turn, after a first round
            that is not counted.
    """
    assert rounds >= 2, "quartiles need two rounds"
    batches = [_padded(sentences[i : i + batch], pad) for i in range(0, len(sentences), batch)]
    settings = {"num_beams": beams, "max_new_tokens": max_new_tokens}
    tokens = dict.fromkeys(models, 0)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        names = list(models) if turn % 2 else list(models)[::-1]
        for name in names:
            start = time.perf_counter()
            found = [models[name](**inputs, **settings) for inputs in batches]
            if turn:
                seconds[name].append(time.perf_counter() - start)
            tokens[name] = sum(generated_tokens(rows, eos) for rows in found)
    first = seconds[next(iter(models))]
    return [
        _throughput(name, batch, beams, tokens[name], seconds[name], first, tokens)
        for name in models
    ]


def _throughput(
    name: str,
    batch: int,
    beams: int,
    tokens: int,
    seconds: list[float],
    first: list[float],
    all_tokens: Mapping[str, int],
) -> Throughput:
    rates = [tokens / second for second in seconds]
    reference = next(iter(all_tokens.values()))
    ratios = [rate * second / reference for rate, second in zip(rates, first, strict=True)]
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return Throughput(name, batch, beams, tokens, middle, high - low, statistics.median(ratios))


def generated_tokens(tokens_BL: Tensor, eos: int) -> int:
    """Return how many tokens were generated, the first end token of each row included; the start
    token and what follows the end are not counted."""
    ends_BL = tokens_BL[:, 1:] == eos
    after_BL = ends_BL.cumsum(1) - ends_BL.long()
    return int((after_BL == 0).sum())


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def inputs_of(models: Sequence[PreTrainedModel], batch: int, length: int) -> dict[str, Tensor]:
    """Return arguments of a forward pass: random ids `(batch, length)` that all the models know."""
    model = models[0]
    vocabulary = min(vocabulary_of(model) for model in models)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(5, vocabulary, (batch, length), generator=generator).to(model.device)
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BL
    return inputs


def _runner(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        model(**inputs)
        wait_for(model)

    return run


def wait_for(model: PreTrainedModel) -> None:
    """Wait until a GPU has computed what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
