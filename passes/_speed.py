"""Densities with which a model takes a part of its time, from measured times (a helper of the
movement pruning pass, not a pass)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from plmcc.passes._latency import Curve, Times
from plmcc.passes._plans import Scored
from plmcc.passes._prunable import Attention, Network, Parts
from plmcc.passes._target import TOLERANCE

_FINE = 240  # steps of a density when times are turned back into it


@dataclass(frozen=True)
class Step:
    """What a score tensor decides on: a share of a block's seconds, in so many groups."""

    curve: Curve
    groups: int
    share: float
    calls: int

    def at(self, part: float) -> float:
        """Return the seconds of a part of the groups."""
        return self.calls * self.share * self.curve.at(part)


@dataclass
class Latencies:
    """The seconds of a model by the densities of its score tensors, and the way back.

    Blocks of weights remove a head when they have emptied it: that they do so in proportion is
    only where the search begins, and `Aim` measures what they remove.
    """

    steps: list[Step]
    fixed: float
    """Seconds whatever is pruned."""
    order: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Prepare sums of the steps from each on, coarse ones first, by density."""
        grid = np.linspace(0, 1, _FINE + 1)
        self.order = sorted(range(len(self.steps)), key=lambda i: -self.steps[i].at(1)
                            / self.steps[i].groups)  # fmt: skip
        rows = [[self.steps[i].at(part) for part in grid] for i in self.order]
        self._grid, self._sums = grid, np.cumsum(np.array(rows)[::-1], axis=0)[::-1]

    @property
    def total(self) -> float:
        """Seconds of the model before pruning."""
        return self.fixed + sum(step.at(1) for step in self.steps)

    def least(self) -> float:
        """Return the smallest part that can be reached, with one group of each kind."""
        return (self.fixed + sum(step.at(1 / step.groups) for step in self.steps)) / self.total

    def densities(self, target: float) -> list[float] | None:
        """Return a density for each score tensor with which the target is met, or None.

        Coarse groups are counted out first, and the finer ones make up for the rounding.
        """
        left, found = target * self.total - self.fixed, [0.0] * len(self.steps)
        for place, index in enumerate(self.order):
            step = self.steps[index]
            part = float(np.interp(left, self._sums[place], self._grid))
            count = max(1, min(step.groups, round(part * step.groups)))
            left -= step.at(count / step.groups)
            # Half a group more, so that int(v * n) is the count.
            found[index] = min(1.0, (count + 0.5) / step.groups)
        return found if abs(left) <= TOLERANCE * target * self.total else None

    def density(self, target: float) -> float | None:
        """Return one density for all score tensors together, or None."""
        left = target * self.total - self.fixed
        return float(np.interp(left, self._sums[0], self._grid)) if left > 0 else None


def latencies(
    layers: Sequence[tuple[nn.Module, Parts, Sequence[Scored]]], times: Sequence[Times], rest: float
) -> Latencies:
    """Return the budget of layers with their times and score tensors; `rest` are the seconds
    outside them."""
    steps: list[Step] = []
    for (_, parts, scored), own in zip(layers, times, strict=True):
        for group in scored:
            index = next(i for i, part in enumerate(parts.every()) if _holds(part, group))
            share = len(group.names) / len(parts.every()[index].linears)
            steps.append(Step(own.curves[index], group.count, share, own.calls))
    total = rest + sum(own.of([1.0] * len(own.curves)) for own in times)
    return Latencies(steps, total - sum(step.at(1) for step in steps))


def _holds(part: Attention | Network, group: Scored) -> bool:
    return set(group.names) <= set(part.linears.values())
