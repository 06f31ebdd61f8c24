"""Which linears of a layer share a score tensor, by granularity."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from plmcc.kit.parts import Attention, Parts, matrix
from plmcc.passes.movement_pruning.scores import ScoreLayout

_KINDS = {
    "hybrid": ("block", "neuron"),
    "structured": ("head", "neuron"),
    "head": ("head", "none"),
    "neuron": ("none", "neuron"),
    "2:4": ("weight", "weight"),
}
"""What is scored in attention and in the feed-forward network, where that differs from the name."""
_SPREADS = {"weight": "each", "row": "rows", "column": "columns", "block": "blocks"}


@dataclass(frozen=True)
class Plan:
    """One score tensor to be: role -> path of its linears, and how it spreads over them.

    `kind` is "groups" (heads or neurons, as many as `groups`, or as fc1 has rows), or that of a
    `Spread`.
    """

    linears: dict[str, str]
    kind: str
    groups: int = 0
    block: tuple[int, int] = (1, 1)

    def spread(self, role: str, shape: tuple[int, int]) -> ScoreLayout:
        """Return how scores become the mask of one of the matrices."""
        if self.kind == "groups":
            side = "columns" if role in ("o", "fc2") else "rows"
            return ScoreLayout(side, shape, times=3 if role == "qkv" else 1)
        # As in nn_pruning the block of the output projection lies on its side.
        return ScoreLayout(self.kind, shape, self.block[::-1] if role == "o" else self.block)


def plans(parts: Parts, granularity: str, block: tuple[int, int] = (32, 32)) -> list[Plan]:
    """Return the score tensors of a layer."""
    kinds = _KINDS.get(granularity, (granularity, granularity))
    found: list[Plan] = []
    for part in parts.every():
        attention = isinstance(part, Attention)
        kind = kinds[0 if attention else 1]
        if kind in ("head", "neuron"):
            groups = part.kv_heads if isinstance(part, Attention) else 0
            found.append(Plan(part.linears, "groups", groups))
        elif kind != "none":
            every = part.linears.items()
            found += [Plan({role: path}, _SPREADS[kind], 0, block) for role, path in every]
    return found


@dataclass(frozen=True)
class Scored:
    """A plan for the linears of a live layer: their paths, how the scores spread over them, and
    how many groups rows or columns make."""

    names: list[str]
    spreads: list[ScoreLayout]
    groups: int
    removable: bool
    """Whether a group is a head or neuron, and goes with its biases."""

    @property
    def count(self) -> int:
        """The number of scores."""
        return math.prod(self.spreads[0].scores(self.groups))


def scored(layer: nn.Module, found: list[Plan]) -> list[Scored]:
    """Return the plans with the sizes of a layer."""
    return [_scored(layer, plan) for plan in found]


def _scored(layer: nn.Module, plan: Plan) -> Scored:
    spreads = []
    for role, path in plan.linears.items():
        rows, columns = matrix(layer.get_submodule(path)).shape
        spreads.append(plan.spread(role, (rows, columns)))
    first = spreads[0]
    side = first.shape[0 if first.kind == "rows" else 1]
    names = list(plan.linears.values())
    return Scored(names, spreads, plan.groups or side, plan.kind == "groups")
