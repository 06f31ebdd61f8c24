"""How long layers take by the heads and neurons they have, measured.

Kurtic, Frantar and Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language Models",
NeurIPS 2023 (2302.04089): a table of the run times of a layer's blocks by size makes the time of a
pruned model a sum. Here a block's entry is the time of a copy of the layer with nothing but this
block, cut to size, less that of the layer without any.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from plmcc.api import Calibration, CalibrationData, Program, Values, error
from plmcc.kit import positions_of, probe_inputs
from plmcc.kit.heads import resize
from plmcc.kit.parts import Attention, Network, Parts, matrix
from plmcc.passes.movement_pruning.compact import Compacted, Matrix, without_empty
from plmcc.passes.movement_pruning.deployed import store

Clock = Callable[[], float]
_HEADS = 16  # up to so many, every number of heads is timed
_WIDTHS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SECONDS = 3.0  # about how long each shape of layer, and the model, is timed
_ROUNDS = (5, 40)


@dataclass(frozen=True)
class Curve:
    """Seconds of one block by how many heads or neurons it has, from 0 to all.

    `measured` are the shortest times; `seconds` is the nearest to them that never falls: a smaller
    block is not slower but for noise.
    """

    counts: tuple[int, ...]
    measured: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, counts: Sequence[int], measured: Sequence[float]) -> Curve:
        """Return a curve through measurements, of which the first is that of no heads."""
        rising = isotonic_regression(np.array(measured)).x
        return cls(tuple(counts), tuple(measured), tuple(map(float, rising - rising[0])))

    def at(self, part: float) -> float:
        """Return the seconds of a part of all heads or neurons, interpolated."""
        return float(np.interp(part * self.counts[-1], self.counts, self.seconds))


@dataclass(frozen=True)
class Times:
    """Seconds of a layer: without blocks, and of each block by its size, in the order of
    `Parts.every`; how often the model calls it."""

    bare: float
    curves: tuple[Curve, ...]
    calls: int = 1

    def of(self, parts: Sequence[float]) -> float:
        """Return the seconds with such parts of the blocks' heads and neurons."""
        pairs = zip(self.curves, parts, strict=True)
        return self.calls * (self.bare + sum(curve.at(part) for curve, part in pairs))

    def price(self, small: Compacted) -> float:
        """Return the seconds of a layer without its empty heads and neurons."""
        kept = [*map(len, small.heads), *small.neurons]
        whole = [curve.counts[-1] for curve in self.curves]
        return self.of([count / every for count, every in zip(kept, whole, strict=True)])


def measure(
    program: Program, found: Sequence[tuple[str, Parts]], batch: int, length: int, device: str
) -> tuple[list[Times], float]:
    """Time the layers at some paths, and return with them the seconds of the rest of the model.

    Args:
        program: the model; it stays as it is, where it is.
        found: paths of layers with their parts.
        batch: rows.
        length: tokens in each.
        device: where.

    Raises:
        PlmccError: unknown device, or the model reads no texts of that length.
    """
    _check(program.model, length, device)
    model: Any = program.model
    model = model if model.device.type == device else copy.deepcopy(model).to(device)
    modules = {path: model.get_submodule(path) for path, _ in found}
    calls, counts, rest = _outside(model, modules, batch, length)
    known: dict[str, Times] = {}
    times = []
    for path, parts in found:
        layer, key = modules[path], _shape(modules[path], parts)
        if key not in known:
            known[key] = _times(layer, parts, calls[path])
        times.append(Times(known[key].bare, known[key].curves, counts[path]))
    return times, rest


def _check(model: Any, length: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise error(
            "PLM303",
            "no CUDA device is available",
            "target.device",
            got=device,
            allowed="cpu",
        )
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise error(
            "PLM303",
            "the model cannot read sequences as long as the target's",
            "target.length",
            got=str(length),
            allowed=f"at most {positions}",
        )


def _shape(layer: nn.Module, parts: Parts) -> str:
    """Return what layers that take the same time have in common."""
    shapes = [(name, tuple(value.shape)) for name, value in layer.named_parameters()]
    return repr((type(layer).__name__, shapes, parts))


def _clock(device: torch.device) -> Clock:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _rounds(run: Callable[[], object]) -> int:
    """Warm up, and return how often something can be repeated in the time there is."""
    run()
    start = time.perf_counter()
    run()
    each = time.perf_counter() - start
    return max(_ROUNDS[0], min(_ROUNDS[1], int(_SECONDS / (each + 1e-9))))


@torch.inference_mode()
def _outside(
    model: Any, layers: dict[str, nn.Module], batch: int, length: int
) -> tuple[dict[str, Values], dict[str, int], float]:
    """Return what the layers are called with, how often, and the seconds outside them."""
    inputs = probe_inputs(model, batch, length)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    data = Calibration(model, CalibrationData([inputs]))
    calls: dict[str, list[Values]] = defaultdict(list)
    paths = {layer: path for path, layer in layers.items()}
    data.observe(paths, lambda layer, call: calls[paths[layer]].append(call.arguments))
    now, seconds = _clock(model.device), [0.0]

    def enter(*_: object) -> None:
        seconds[0] -= now()

    def leave(*_: object) -> None:
        seconds[0] += now()

    def run() -> float:
        seconds[0], start = 0.0, now()
        model(**inputs)
        return now() - start - seconds[0]

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers.values()]
    hooks += [layer.register_forward_hook(leave) for layer in layers.values()]
    mode = model.training
    try:
        model.eval()
        rest = min(run() for _ in range(_rounds(run)))
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    first = {path: found[0] for path, found in calls.items()}
    return first, {path: len(found) for path, found in calls.items()}, rest


@torch.inference_mode()
def _times(layer: nn.Module, parts: Parts, call: Values) -> Times:
    """Time a layer without blocks, and with each of its blocks alone in several sizes."""
    every = parts.every()
    sizes = [_sizes(layer, part) for part in every]
    wanted = [(i, count) for i, counts in enumerate(sizes) for count in counts[1:]]
    empty = [0] * len(every)
    kept = [empty, *([*empty[:i], count, *empty[i + 1 :]] for i, count in wanted)]
    models = [_cut(layer, parts, counts).eval() for counts in kept]
    now = _clock(next(layer.parameters()).device)
    taken: list[list[float]] = [[] for _ in models]

    def run() -> None:
        # The order turns, so that none always finds what the largest has left in the caches.
        for seconds, model in list(zip(taken, models, strict=True))[:: 1 - 2 * (len(taken[0]) % 2)]:
            start = now()
            model(**call)
            seconds.append(now() - start)

    for _ in range(_rounds(run)):  # in turn, so that a slow moment is one for all sizes
        run()
    bare, *others = map(min, taken)  # other work on the machine only ever adds time
    above = dict(zip(wanted, (seconds - bare for seconds in others), strict=True))
    curves = [
        Curve.of(counts, [0.0, *(above[i, count] for count in counts[1:])])
        for i, counts in enumerate(sizes)
    ]
    return Times(bare, tuple(curves))


def _sizes(layer: nn.Module, part: Attention | Network) -> list[int]:
    if isinstance(part, Network):
        whole = len(matrix(layer.get_submodule(part.linears["fc1"])))
        return sorted({round(whole * width) for width in _WIDTHS})
    step = math.ceil(part.kv_heads / _HEADS)
    ratio = part.heads // part.kv_heads
    return sorted({count * ratio for count in (*range(0, part.kv_heads, step), part.kv_heads)})


def _cut(layer: nn.Module, parts: Parts, kept: Sequence[int]) -> nn.Module:
    """Return a copy of a layer with so many of the heads or neurons of each part."""
    matrices = {path: _constant(layer.get_submodule(path)) for path in parts.paths()}
    for part, count in zip(parts.every(), kept, strict=True):
        width = part.head_dim if isinstance(part, Attention) else 1
        matrices[part.linears["o" if isinstance(part, Attention) else "fc2"]].weight[
            :, count * width :
        ] = 0
    made, small = copy.deepcopy(layer), without_empty(parts, matrices)
    for path, stored in store(made, parts, small, "dense").items():
        made.set_submodule(path, stored.module)
    for block, heads in zip(parts.attention, small.heads, strict=True):
        if len(heads) < block.heads:
            resize(made.get_submodule(block.path), block, list(heads))
    return made


def _constant(linear: nn.Module) -> Matrix:
    """Return a matrix of the shape of a linear in which nothing is zero."""
    bias = getattr(linear, "bias", None)
    weight: Tensor = torch.full_like(matrix(linear), 0.01)
    return Matrix(weight, None if bias is None else torch.full_like(bias, 0.01))
