"""The deployed forms of pruned linears."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plmcc.kit.parts import Parts, plain
from plmcc.passes.movement_pruning.compact import Compacted, Matrix
from plmcc.passes.movement_pruning.masks import Masked
from plmcc.passes.movement_pruning.storage import SparseLinear


class Zeros(nn.Module):
    """What is left of a projection to heads or neurons that are all gone: zeros (..., width).

    The queries, keys and values of one head stay in this form, without weights, so that attention
    keeps writing to the cache, whose length tells the model where it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros for states (..., D)."""
        return x.new_zeros(*x.shape[:-1], self.width)


class Constant(nn.Module):
    """What is left of an output projection that nothing goes into any longer: its bias."""

    def __init__(self, width: int, bias: Tensor | None) -> None:
        super().__init__()
        self.width = width
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @property
    def weight(self) -> Tensor:
        """A matrix without columns; T5 asks for its dtype."""
        like = self.bias if self.bias is not None else torch.empty(0)
        return like.new_zeros(self.width, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias (or zeros) for each of (..., in)."""
        zeros = x.new_zeros(*x.shape[:-1], self.width)
        return zeros if self.bias is None else zeros + self.bias


@dataclass(frozen=True)
class Stored:
    """A linear map in its deployed form: its module, shape, values that are not zero, and form."""

    module: nn.Module
    form: str
    shape: tuple[int, int]
    values: int = 0


def store(layer: nn.Module, parts: Parts, small: Compacted, storage: str) -> dict[str, Stored]:
    """Return the deployed forms of a layer's linears by path."""
    widths, found = _zero_widths(parts, small), {}
    for name, part in small.matrices.items():
        old = layer.get_submodule(name)
        like = old.original[0] if isinstance(old, Masked) else old
        found[name] = _stored(like, part, storage, widths.get(name, 0))
        found[name].module.train(layer.training)
    return found


def _zero_widths(parts: Parts, small: Compacted) -> dict[str, int]:
    """Return how wide the zeros of projections to no heads are: one group of heads."""
    widths: dict[str, int] = {}
    for block in parts.attention:
        ratio = block.heads // block.kv_heads
        for role, path in block.linears.items():
            times = {"q": ratio, "qkv": 3}.get(role, 1)
            if len(small.matrices[path].weight) == 0:
                widths[path] = times * block.head_dim
    return widths


def _stored(like: nn.Module, part: Matrix, storage: str, width: int) -> Stored:
    """Return the deployed form of a matrix; `width` is of its zeros if it has no rows."""
    rows, columns = part.weight.shape
    if rows == 0:
        return Stored(Zeros(width), "zeros", (width, columns))
    if columns == 0:
        return Stored(Constant(rows, part.bias), "constant", (rows, columns))
    if storage == "dense":
        return Stored(plain(like, part.weight, part.bias), "dense", (rows, columns))
    sparse = SparseLinear.of(part.weight, part.bias, storage)
    return Stored(sparse, storage, (rows, columns), len(sparse.values))


def empty(old: nn.Module, shape: tuple[int, int], values: int, form: str) -> nn.Module:
    """Return a module of a form whose tensors are still to be loaded."""
    bias = getattr(old, "bias", None)
    weight = old.get_parameter("weight")
    if form == "zeros":
        return Zeros(shape[0])
    if form == "constant":
        return Constant(shape[0], None if bias is None else bias.new_empty(shape[0]))
    if form == "dense":
        fresh = None if bias is None else bias.new_empty(shape[0])
        return plain(old, weight.new_empty(shape), fresh)
    with torch.device(weight.device):
        sparse = SparseLinear(shape, values, form, bias is not None)
    return sparse.to(weight.dtype)
