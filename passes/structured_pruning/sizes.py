"""How many heads and neurons layers keep, by a target (a helper of the pass, not a pass)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from plmcc.kit.parts import Attention, Network, Parts, matrix

Part = Attention | Network


@dataclass(frozen=True)
class Layer:
    """A layer with its parts, and what each group of them costs."""

    module: nn.Module
    parts: Parts

    def groups(self, part: Part) -> int:
        """Return how many key-value groups of heads, or neurons, a part has."""
        if isinstance(part, Attention):
            return part.kv_heads
        return len(matrix(self.module.get_submodule(part.linears["fc1"])))

    def parameters(self) -> int:
        """Return the parameters of the layer, norms and biases included."""
        return sum(value.numel() for value in self.module.parameters())

    def cost(self, part: Part, length: int | None) -> float:
        """Return the parameters of a group; with a length, FLOPs of a token in a text of so many
        tokens."""
        total = 0
        for role, path in part.linears.items():
            linear = self.module.get_submodule(path)
            total += matrix(linear).numel()
            bias = getattr(linear, "bias", None)
            if length is None and bias is not None and role not in ("o", "fc2"):
                total += bias.numel()
        if length is None:
            return total / self.groups(part)
        scores = 4 * length * part.heads * part.head_dim if isinstance(part, Attention) else 0
        return (2 * total + scores) / self.groups(part)

    def whole(self, length: int | None) -> float:
        """Return the parameters, or FLOPs of a token, of all of the layer."""
        if length is None:
            return self.parameters()
        return sum(self.cost(part, length) * self.groups(part) for part in self.parts.every())


def multiple_for(width: int, asked: int | None) -> int:
    """Return what a number of neurons is a multiple of: 64, less in narrow layers."""
    return asked or next(m for m in (64, 8, 1) if width >= 16 * m or m == 1)


@dataclass(frozen=True)
class Counts:
    """What the parts of each layer keep, in the order of `Parts.every`, and what that leaves of
    their parameters or FLOPs."""

    kept: list[list[int]]
    left: float


def counts_for(
    layers: Sequence[Layer],
    share: float,
    remove: Sequence[str],
    multiple_of: int | None,
    length: int | None,
    groups: int | None = None,
) -> Counts | float:
    """Return what all layers keep so that a share of their parameters stays, or with a `length` of
    their FLOPs: the same part of each layer.

    Heads are counted out first, in whole groups, or `groups` of them; neurons make up for the
    rounding. Where the share cannot be reached, that is returned which is left at least.
    """
    total = sum(layer.whole(length) for layer in layers)
    over = (1 - share) * total
    removable = {kind: _sum(layers, kind, length) for kind in remove}
    everything = sum(removable.values())
    kept = [[layer.groups(part) for part in layer.parts.every()] for layer in layers]
    done = 0.0
    for kind in (Attention, Network):
        possible = removable.get(_name(kind), 0.0)
        if not possible:
            continue
        wanted = over * possible / everything if kind is Attention else over - done
        part_left = 1 - wanted / possible
        for layer, counts in zip(layers, kept, strict=True):
            for index, part in enumerate(layer.parts.every()):
                if isinstance(part, kind):
                    has = counts[index]
                    asked = 1 if kind is Attention else multiple_for(has, multiple_of)
                    counts[index] = _rounded(part_left * has, asked, has)
                    if kind is Attention and groups is not None:
                        counts[index] = min(groups, has)
                    done += (has - counts[index]) * layer.cost(part, length)
    left = 1 - done / total
    least = 1 - sum(_most(layer, removable, multiple_of, length) for layer in layers) / total
    return least if share < least else Counts(kept, left)


def counts_of_least_cost(
    curves: Sequence[Sequence[Sequence[tuple[int, float]]]],
    layers: Sequence[Layer],
    share: float,
    multiple_of: int | None,
    length: int | None,
) -> list[list[int]]:
    """Return what each layer keeps so that a share of all is left at the least cost together.

    Args:
        curves: for each part of each layer, how many groups go at a time, and what each costs.
        layers: the layers.
        share: as in `counts_for`, like the rest.
        multiple_of: of neurons.
        length: of texts.
    """
    total = sum(layer.whole(length) for layer in layers)
    steps = []
    for number, layer in enumerate(layers):
        for index, part in enumerate(layer.parts.every()):
            highest, unit = 0.0, layer.cost(part, length)
            for count, cost in curves[number][index]:
                highest = max(highest, cost / unit)  # a cheaper one is reached only behind it
                steps.append((highest, number, index, count, unit * count))
    kept = [[layer.groups(part) for part in layer.parts.every()] for layer in layers]
    over = (1 - share) * total
    for _, number, index, count, saved in sorted(steps):
        if over <= 0:
            break
        gone = count if saved <= over else round(count * over / saved)
        kept[number][index] -= gone
        over -= saved
    for layer, counts in zip(layers, kept, strict=True):
        for index, part in enumerate(layer.parts.every()):
            has = layer.groups(part)
            multiple = 1 if isinstance(part, Attention) else multiple_for(has, multiple_of)
            counts[index] = _rounded(counts[index], multiple, has)
    return kept


def _rounded(value: float, multiple: int, most: int) -> int:
    """Return the nearest multiple, at least one and at most what there is."""
    return int(min(most, max(multiple, multiple * round(value / multiple))))


def _name(kind: type[Part]) -> str:
    return "heads" if kind is Attention else "neurons"


def _sum(layers: Sequence[Layer], kind: str, length: int | None) -> float:
    return sum(
        layer.cost(part, length) * layer.groups(part)
        for layer in layers
        for part in layer.parts.every()
        if _name(type(part)) == kind
    )


def _most(
    layer: Layer, removable: dict[str, float], multiple_of: int | None, length: int | None
) -> float:
    """Return what can be removed of a layer at most."""
    total = 0.0
    for part in layer.parts.every():
        if _name(type(part)) in removable:
            has = layer.groups(part)
            least = 1 if isinstance(part, Attention) else multiple_for(has, multiple_of)
            total += max(0, has - least) * layer.cost(part, length)
    return total
