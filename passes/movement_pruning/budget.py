"""Densities that meet a target for a whole model: a part of its layers' parameters or FLOPs; and a
penalty that is steered so that a density falls as wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from plmcc.kit.parts import Attention, Parts, matrix
from plmcc.passes.movement_pruning.groups import Scored

TOLERANCE = 0.03
"""How far, relative to the target, the result may be off for what stays is whole groups."""


_NEAR, _TRIES = 0.005, 12
_PROPORTIONAL, _INTEGRAL = 1.0, 0.05  # of the controller
_MOST = math.log(1000.0)
_LEAST = 1e-6


class Remaining(Protocol):
    """A layer that can say what pruning leaves of it."""

    def remaining(self) -> float:
        """Return the number of parameters, zeros of pruned matrices left out, or the seconds."""


class Choices(Protocol):
    """What score tensors of some layers cost by their densities."""

    @property
    def total(self) -> float:
        """The cost of the layers with all that is in them."""

    @property
    def fixed(self) -> float:
        """What stays whatever is pruned."""

    def least(self) -> float:
        """Return the smallest part that can be reached, with one group of each kind."""

    def densities(self, target: float) -> list[float] | None:
        """Return a density for each score tensor with which a part is met, or None."""

    def density(self, target: float) -> float | None:
        """Return one density for all score tensors together, or None."""


@dataclass(frozen=True)
class Cost:
    """What one group of a score tensor costs, and how many groups there are."""

    each: float
    groups: int


@dataclass(frozen=True)
class Budget:
    """The cost of each score tensor of some layers, and of the layers with all that is in them."""

    costs: list[Cost] = field(default_factory=list)
    total: float = 0.0

    def __add__(self, other: Budget) -> Budget:
        return Budget([*self.costs, *other.costs], self.total + other.total)

    @property
    def fixed(self) -> float:
        """What stays whatever is pruned."""
        return self.total - sum(cost.each * cost.groups for cost in self.costs)

    def least(self) -> float:
        """Return the smallest part that can be reached, with one group of each kind."""
        return (self.fixed + sum(cost.each for cost in self.costs)) / self.total

    def densities(self, target: float) -> list[float] | None:
        """Return a density for each score tensor with which the target is met, or None.

        Coarse groups are counted out first, and the finer ones make up for the rounding.
        """
        left = target * self.total - self.fixed
        order = sorted(range(len(self.costs)), key=lambda i: -self.costs[i].each)
        whole = sum(cost.each * cost.groups for cost in self.costs)
        counts = [0] * len(self.costs)
        for index in order:
            cost = self.costs[index]
            counts[index] = max(1, min(cost.groups, round(left / whole * cost.groups)))
            left -= counts[index] * cost.each
            whole = max(whole - cost.each * cost.groups, 1e-9)
        if abs(left) > TOLERANCE * target * self.total:
            return None
        # Half a group more, so that int(v * n) is the count.
        pairs = zip(counts, self.costs, strict=True)
        return [min(1.0, (count + 0.5) / cost.groups) for count, cost in pairs]

    def density(self, target: float) -> float | None:
        """Return one density for all score tensors together, or None."""
        found = (target * self.total - self.fixed) / (self.total - self.fixed)
        return found if found > 0 else None


@dataclass
class DensitySearch:
    """Steers densities so that what is left after removing empty heads and neurons is the target.

    Blocks and single weights that are pruned may empty a neuron, with which others go that no mask
    has pruned; how many is measured on the present scores.
    """

    budget: Choices
    target: float
    together: bool
    tensors: int
    apart: float = 0.0
    """The cost of what is not in the layers."""
    layers: list[Remaining] = field(default_factory=list)

    def densities(self, value: float) -> list[float] | None:
        """Return the density of each score tensor for a target, or None if none meets it."""
        if not self.together:
            return self.budget.densities(value)
        density = self.budget.density(value)
        return None if density is None else [density] * self.tensors

    def floor(self) -> float:
        """Return the smallest part that can be reached."""
        return self.budget.fixed / self.budget.total if self.together else self.budget.least()

    def steer(self, apply: Callable[[list[float]], None]) -> None:
        """Apply densities until what is left is near the target; keep the best ones."""
        tried: list[tuple[float, list[float]]] = []
        value, low, high = self.target, 0.0, 1.0
        for _ in range(_TRIES):
            found = self.densities(value)
            if found is None:
                break
            apply(found)
            left = self.apart + sum(layer.remaining() for layer in self.layers)
            got = left / self.budget.total
            tried.append((abs(got - self.target), found))
            if tried[-1][0] <= _NEAR * self.target:
                return
            low, high = (value, high) if got < self.target else (low, value)
            guess = value + self.target - got
            value = guess if low < guess < high else (low + high) / 2
        assert tried, "checked when matching"
        apply(min(tried, key=lambda pair: pair[0])[1])


def count_parameters(layer: nn.Module, parts: Parts, scored: Sequence[Scored]) -> Budget:
    """Count parameters: of what is pruned as a whole the biases too, of the rest what is not
    zero."""
    costs = []
    for group in scored:
        linears = [layer.get_submodule(name) for name in group.names]
        size = sum(matrix(linear).numel() for linear in linears)
        if group.removable:
            rows = [(n, s) for n, s in zip(linears, group.spreads, strict=True) if s.kind == "rows"]
            size += sum(s.shape[0] for n, s in rows if getattr(n, "bias", None) is not None)
        costs.append(Cost(size / group.count, group.count))
    return Budget(costs, float(sum(p.numel() for p in layer.parameters())))


def count_flops(layer: nn.Module, parts: Parts, scored: Sequence[Scored], length: int) -> Budget:
    """Count multiply-adds a token in sequences of a length, of linears and of attention itself."""
    costs = []
    for group in scored:
        size = float(sum(matrix(layer.get_submodule(name)).numel() for name in group.names))
        block = next(
            (b for b in parts.attention if set(group.names) == set(b.linears.values())), None
        )
        costs.append(
            Cost((size + (_mixing(block, length) if block else 0)) / group.count, group.count)
        )
    linears = sum(matrix(layer.get_submodule(path)).numel() for path in parts.paths())
    return Budget(costs, linears + sum(_mixing(block, length) for block in parts.attention))


def _mixing(block: Attention, length: int) -> float:
    """Multiply-adds a token of q·k and of the weighted sum of values."""
    return 2.0 * length * block.heads * block.head_dim


@dataclass
class PenaltyController:
    """A factor of the penalty, from a proportional-integral controller on the logarithm of the
    density: scores need some time to fall, and how much a penalty weighs against the task is not
    known before."""

    factor: float = 1.0
    _sum: float = 0.0

    def state(self) -> list[float]:
        """Return what has been learned."""
        return [self.factor, self._sum]

    def restore(self, state: list[float]) -> None:
        """Take that back."""
        self.factor, self._sum = state

    def update(self, density: float, wanted: float) -> None:
        """Note the present density and the wanted one."""
        wrong = math.log(max(density, _LEAST) / wanted)
        self._sum += wrong
        exponent = _PROPORTIONAL * wrong + _INTEGRAL * self._sum
        if abs(exponent) > _MOST:  # do not sum up what has no effect
            self._sum -= wrong
        self.factor = math.exp(max(-_MOST, min(_MOST, exponent)))
