"""Scores, masks and schedules of movement pruning (a helper of the pass, not a pass).

Sanh, Wolf and Rush, NeurIPS 2020 (2005.07683), in the form of the official code. Masks are binary
going forward and the identity going back (straight-through): with a = (W * M)x, every score gets
dL/dS = dL/da W x, masked or not, and the sigmoid of the soft method has no derivative of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plmcc.kit import sum_over_processes

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
"""Stretch and temperature of the hard-concrete distribution (Louizos et al., 2018)."""
L0_START = 2.197
"""Initial score of the L0 method: sigmoid(2.197) = 0.9."""
L0_CLOSED = math.log(-LOW / HIGH)
"""Score at and below which the gate of the L0 method is zero at test time."""
_EDGE = 1e-4


def left(progress: float, warmup: float, cooldown: float) -> float:
    """Return how much of the way to the final value is left, from 1 to 0.

    1 during the warm-up, 0 during the cool-down (both fractions of the stage), and between them
    (1 - u)^3, where u runs from 0 to 1.
    """
    if progress <= warmup:
        return 1.0
    if progress > 1 - cooldown:
        return 0.0
    return max(0.0, 1 - (progress - warmup) / (1 - warmup - cooldown)) ** 3


def kept_of(density: float, count: int) -> int:
    """Return how many of so many entries a density keeps: int(v * n), as the official code."""
    return int(density * count)


def top(scores: Tensor, count: int) -> Tensor:
    """Return a mask (bool) of exactly `count` entries: those with the highest scores."""
    flat = scores.detach().flatten()
    largest = count <= flat.numel() // 2  # selecting the fewer is the faster way
    size = count if largest else flat.numel() - count
    chosen = flat.topk(max(0, size), largest=largest, sorted=False).indices
    mask = torch.full_like(flat, not largest, dtype=torch.bool)
    return mask.index_fill_(0, chosen, largest).view(scores.shape)


def above(scores: Tensor, threshold: float, floor: float) -> Tensor:
    """Return the mask sigmoid(S) > threshold, but of at least int(floor * n) + 1 entries."""
    mask = torch.sigmoid(scores.detach()) > threshold
    least = min(mask.numel(), int(floor * mask.numel()) + 1) if floor else 0
    return mask if int(mask.sum()) >= least else top(scores, least)


def two_of_four(scores: Tensor) -> Tensor:
    """Return a mask (bool) of the two highest scores in every four along the last dimension."""
    fours = scores.detach().unflatten(-1, (-1, 4))
    chosen = fours.topk(2, dim=-1).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, chosen, True).flatten(-2)


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """Return the mask as numbers, with the gradient of the identity to the scores."""
    # The bracket is exactly zero, so the value is exactly the mask's.
    return mask.to(scores.dtype) + (scores - scores.detach())


def noise_like(scores: Tensor) -> Tensor:
    """Draw the uniform noise of the hard-concrete distribution."""
    return torch.rand_like(scores).clamp_(_EDGE, 1 - _EDGE)


def gates(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return hard-concrete gates in 0..1: sampled with noise, or as used at test time."""
    if noise is None:
        return (torch.sigmoid(scores) * (HIGH - LOW) + LOW).clamp(0, 1)
    logits = (noise.log() - (1 - noise).log() + scores) / BETA
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(scores: Tensor) -> Tensor:
    """Return P(gate != 0), whose mean is the L0 penalty."""
    return torch.sigmoid(scores - BETA * L0_CLOSED)


@dataclass(frozen=True)
class ScoreLayout:
    """How a score tensor becomes the mask of one matrix (out, in).

    `kind` is "each" (a score for each weight), "blocks" (of size `block`; those at the edges may be
    cut), "rows" or "columns" (a score for each group of neighboring rows or columns, the whole
    list of groups `times` times over, as the heads of fused query, key and value).
    """

    kind: str
    shape: tuple[int, int]
    block: tuple[int, int] = (1, 1)
    times: int = 1

    def scores(self, groups: int = 0) -> tuple[int, ...]:
        """Return the shape of the scores; `groups` is their number for rows and columns."""
        if self.kind == "each":
            return self.shape
        if self.kind == "blocks":
            pairs = zip(self.shape, self.block, strict=True)
            return tuple(math.ceil(size / step) for size, step in pairs)
        return (groups,)

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the scores in the shape of the matrix."""
        rows, columns = self.shape
        if self.kind == "each":
            return scores
        if self.kind == "blocks":
            tall = scores.repeat_interleave(self.block[0], 0)[:rows]
            return tall.repeat_interleave(self.block[1], 1)[:, :columns]
        length = rows if self.kind == "rows" else columns
        line = scores.repeat_interleave(length // (self.times * len(scores))).repeat(self.times)
        return (line[:, None] if self.kind == "rows" else line[None]).expand(rows, columns)

    def gather(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the sums of a matrix's values over the groups: the transpose of spreading."""
        with torch.inference_mode(False), torch.enable_grad():
            zeros = torch.zeros(shape, device=values.device, requires_grad=True)
            (sums,) = torch.autograd.grad(self(zeros), zeros, values.detach().float())
        return sums


_SPAN = 3.0
"""Scores begin between minus and plus this: as far as 300 steps of Adam at the default learning
rate move a score whose gradient keeps its sign, so that learning can overrule them."""


class Scored(Protocol):
    """Scores of the groups of one matrix."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scores."""

    @property
    def scores(self) -> Tensor | None:
        """Scores, one for each group; None where magnitudes are the scores."""

    def sizes(self) -> Tensor:
        """Return how many weights each group has."""


class Sensitivity:
    """Sums of the squared gradients of masks, the empirical Fisher information of what they cover.

    Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022
    (2204.09656), equation 6: the loss that removing a group costs is, to second order, half its
    squared gradient, summed over batches.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Scored, Tensor]] = []

    def watch(self, score_group: Scored, wanted: Callable[[], bool]) -> None:
        """Sum up squared gradients of a unit's scores while they are `wanted`."""
        assert score_group.scores is not None
        sums = torch.zeros(score_group.shape)
        self._sums.append((score_group, sums))

        def add(gradient: Tensor) -> None:
            if wanted():
                sums.add_(gradient.detach().float().square().to(sums.device))

        score_group.scores.register_hook(add)

    def sums(self) -> list[Tensor]:
        """Return the sums so far."""
        return [sums for _, sums in self._sums]

    @torch.no_grad()
    def begin(self) -> None:
        """Give the scores the ranks of these sums, taken for each weight, over the whole model."""
        sizes = [score_group.sizes().to(sums.device) for score_group, sums in self._sums]
        # Of its own batches each process knows the sums; all must come to the same scores.
        totals = [sum_over_processes(sums) for _, sums in self._sums]
        each = [sums / size for sums, size in zip(totals, sizes, strict=True)]
        flat = torch.cat([values.flatten() for values in each])
        ranks = flat.argsort().argsort().float() / max(1, len(flat) - 1)
        parts = ranks.mul(2 * _SPAN).sub(_SPAN).split([values.numel() for values in each])
        for (score_group, _), part in zip(self._sums, parts, strict=True):
            assert score_group.scores is not None
            score_group.scores.copy_(part.view(score_group.shape))
        self._sums = []
