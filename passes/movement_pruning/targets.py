"""Sites with the densities that meet a target together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
from torch import nn

from plmcc.api import Miss, Program
from plmcc.kit.parts import Attention, Network, Parts
from plmcc.passes.movement_pruning.budget import (
    TOLERANCE,
    Budget,
    DensitySearch,
    count_flops,
    count_parameters,
)
from plmcc.passes.movement_pruning.groups import Scored
from plmcc.passes.movement_pruning.latency import Curve, Times, measure
from plmcc.passes.movement_pruning.masks import PruningState
from plmcc.passes.movement_pruning.site import PrunableSite

_FINE = 240  # steps of a density when times are turned back into it


@dataclass(frozen=True)
class Step:
    """What a score tensor decides on: a share of a block's seconds, in so many groups."""

    curve: Curve
    groups: int
    loss_weight: float
    calls: int

    def at(self, part: float) -> float:
        """Return the seconds of a part of the groups."""
        return self.calls * self.loss_weight * self.curve.at(part)


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
        self.order = sorted(
            range(len(self.steps)), key=lambda i: -self.steps[i].at(1) / self.steps[i].groups
        )
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
        for location, index in enumerate(self.order):
            step = self.steps[index]
            part = float(np.interp(left, self._sums[location], self._grid))
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


class HasTarget(Protocol):
    """What is aimed at: one of parameters, flops and latency."""

    @property
    def parameters(self) -> float | None:
        """Share of the parameters of the layers that stays."""

    @property
    def flops(self) -> float | None:
        """Share of the FLOPs that stays."""

    @property
    def latency(self) -> float | None:
        """How many times faster the layers get."""

    @property
    def length(self) -> int:
        """Tokens of a sequence, for `latency`."""

    @property
    def batch(self) -> int:
        """Sequences, for `latency`."""

    @property
    def device(self) -> str:
        """Where `latency` is measured."""


def with_densities(
    sites: list[PrunableSite], state: PruningState, target: HasTarget, program: Program
) -> Iterator[PrunableSite | Miss]:
    """Yield the sites with densities that meet the target together, or say that none do."""
    if not sites:
        return
    if target.latency and next(sites[0].module.parameters()).is_meta:
        yield from sites  # a plan: there is nothing to measure
        return
    if target.latency:
        sites, aim = _timed(sites, state, target, program)
    else:
        aim = _counted(sites, state, target)
    found = aim.densities(aim.target)
    if found is None:
        yield from (Miss(site.path, _refusal(aim, target)) for site in sites)
        return
    rest = iter(found)
    state.density = found[0]
    # What is counted, and goes as a whole, takes nothing along: no need to measure.
    state.aim = None if target.flops else aim
    for site in sites:
        yield replace(site, densities=list(islice(rest, len(site.groups))))


def _refusal(aim: DensitySearch, target: HasTarget) -> str:
    if target.latency:
        most = f"these layers reach {1 / aim.floor():.3g} times at most"
        return f"no density makes the model {target.latency:g} times as fast within 3 %: {most}"
    value = f"no density keeps {aim.target:g} within 3 %"
    return f"{value}: these layers keep at least {aim.floor():.3g}"


def _counted(sites: list[PrunableSite], state: PruningState, target: HasTarget) -> DensitySearch:
    per_token = partial(count_flops, length=target.length)
    count = count_parameters if target.parameters else per_token
    layers = [(s.module, s.parts, s.groups) for s in sites]
    budget = sum((count(*layer) for layer in layers), Budget())
    value = target.parameters or target.flops or 0.0
    return DensitySearch(budget, value, state.settings.together, len(budget.costs))


def _timed(
    sites: list[PrunableSite], state: PruningState, target: HasTarget, program: Program
) -> tuple[list[PrunableSite], DensitySearch]:
    found = [(site.path, site.parts) for site in sites]
    setting = (target.batch, target.length, target.device)
    times, rest = measure(program, found, *setting)
    layers = [(s.module, s.parts, s.groups) for s in sites]
    timed = [replace(site, times=own) for site, own in zip(sites, times, strict=True)]
    budget = latencies(layers, times, rest)
    assert target.latency is not None
    return timed, DensitySearch(
        budget, 1 / target.latency, state.settings.together, len(budget.steps), rest
    )
