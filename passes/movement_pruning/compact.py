"""Removal of what pruning has emptied: attention heads and feed-forward neurons.

A neuron whose fc2 column is zero goes without a trace. One whose fc1 row is zero always has the
value act(b1), which is folded into fc2's bias; likewise a head whose value rows are zero gives its
value bias to every token, since attention weights sum to 1, and that goes into the output bias.
Where there is no bias to fold into, only zeros can go. A head whose *query or key* rows are zero
attends evenly and stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plmcc.kit.parts import Activation, Attention, Network, Parts


@dataclass(frozen=True)
class Matrix:
    """A linear map after pruning: weight (out, in) and bias (out) or None."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, kept: Tensor) -> Matrix:
        """Return the map to some of the outputs."""
        return Matrix(self.weight[kept], None if self.bias is None else self.bias[kept])

    def columns(self, kept: Tensor, constant: Tensor | None = None) -> Matrix:
        """Return the map from some of the inputs; `constant` is what the others contribute."""
        bias = self.bias
        if constant is not None and bias is not None:
            bias = (bias.float() + constant).to(bias.dtype)
        return Matrix(self.weight[:, kept], bias)

    def constant(self) -> Tensor:
        """Return the bias as float32, zeros if there is none."""
        return (
            self.weight.new_zeros(len(self.weight)).float()
            if self.bias is None
            else (self.bias.float())
        )


@dataclass(frozen=True)
class Compacted:
    """A layer without what was empty: its matrices by path, and the heads and neurons that stay.

    `uniform` counts the heads that stay although their queries or keys are zero.
    """

    matrices: dict[str, Matrix]
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]
    uniform: int


@torch.no_grad()
def without_empty(parts: Parts, matrices: dict[str, Matrix]) -> Compacted:
    """Remove the heads and neurons that can go exactly (up to rounding)."""
    smaller = dict(matrices)
    heads = []
    uniform = 0
    for block in parts.attention:
        kept = _groups(block, matrices)
        uniform += _uniform(block, matrices, kept)
        _narrow_attention(block, smaller, kept)
        ratio = block.heads // block.kv_heads
        groups = kept.nonzero().flatten().tolist()
        heads.append(tuple(g * ratio + i for g in groups for i in range(ratio)))
    neurons = tuple(_narrow_network(network, smaller) for network in parts.networks)
    return Compacted(smaller, tuple(heads), neurons, uniform)


def whole(parts: Parts, matrices: dict[str, Matrix]) -> Compacted:
    """Return a layer from which nothing is removed."""
    heads = tuple(tuple(range(block.heads)) for block in parts.attention)
    neurons = tuple(len(matrices[n.linears["fc1"]].weight) for n in parts.networks)
    uniform = sum(
        _uniform(b, matrices, matrices[b.linears["o"]].weight.new_ones(b.kv_heads).bool())
        for b in parts.attention
    )
    return Compacted(matrices, heads, neurons, uniform)


def _groups(block: Attention, matrices: dict[str, Matrix]) -> Tensor:
    """Return which groups of heads (one for each key-value head) stay (bool)."""
    value, output = _value(block, matrices), matrices[block.linears["o"]]
    dead = (value.weight == 0).unflatten(0, (block.kv_heads, -1)).flatten(1).all(1)
    silent = (output.weight == 0).unflatten(1, (block.kv_heads, -1)).transpose(0, 1)
    silent = silent.flatten(1).all(1)
    nothing = (value.constant() == 0).unflatten(0, (block.kv_heads, -1)).all(1)
    foldable = nothing | torch.full_like(nothing, output.bias is not None)
    kept: Tensor = ~(silent | (dead & foldable))
    return kept


def _value(block: Attention, matrices: dict[str, Matrix]) -> Matrix:
    if not block.splits:
        return matrices[block.linears["v"]]
    whole = matrices[block.linears["qkv"]]
    size = len(whole.weight) // 3
    return whole.rows(torch.arange(2 * size, 3 * size, device=whole.weight.device))


def _uniform(block: Attention, matrices: dict[str, Matrix], kept: Tensor) -> int:
    """Count the kept groups whose queries or keys are zero, bias included."""
    return int((uniform_groups(block, matrices, biases=True) & kept).sum())


def uniform_groups(block: Attention, matrices: dict[str, Matrix], biases: bool) -> Tensor:
    """Return which groups of heads (bool) have queries or keys without weights.

    With `biases`, those whose biases are zero too: these attend to all tokens alike.
    """
    if block.splits:
        pair = [*_with_bias(matrices[block.linears["qkv"]], biases).chunk(3)[:2]]
    else:
        pair = [_with_bias(matrices[block.linears[role]], biases) for role in "qk"]
    empty = [(v == 0).unflatten(0, (block.kv_heads, -1)).flatten(1).all(1) for v in pair]
    either: Tensor = empty[0] | empty[1]
    return either


def _with_bias(part: Matrix, biases: bool) -> Tensor:
    weight = part.weight.float()
    return torch.cat([weight, part.constant()[:, None]], 1) if biases else weight


def _narrow_attention(block: Attention, matrices: dict[str, Matrix], kept: Tensor) -> None:
    if bool(kept.all()):
        return
    value, path = _value(block, matrices), block.linears["o"]
    gone = _repeated(~kept, block.heads * block.head_dim)
    given = value.constant().unflatten(0, (block.kv_heads, 1, block.head_dim))
    every = given.expand(-1, block.heads // block.kv_heads, -1).flatten()
    constant = matrices[path].weight.float() @ (every * gone)
    matrices[path] = matrices[path].columns(~gone, constant)
    for role in ("q", "k", "v", "qkv"):
        if role in block.linears:
            inner = matrices[block.linears[role]]
            times = 3 if role == "qkv" else 1
            rows = _repeated(kept, len(inner.weight) // times).repeat(times)
            matrices[block.linears[role]] = inner.rows(rows)


def _repeated(groups: Tensor, size: int) -> Tensor:
    return groups.repeat_interleave(size // len(groups))


def _narrow_network(network: Network, matrices: dict[str, Matrix]) -> int:
    """Remove neurons; return how many stay."""
    up, down = (matrices[network.linears[role]] for role in ("fc1", "fc2"))
    gate = matrices[network.linears["gate"]] if "gate" in network.linears else None
    fixed, value = _fixed(up, gate, network.activation)
    silent = (down.weight == 0).all(0)
    foldable = (value == 0) | torch.full_like(silent, down.bias is not None)
    gone = silent | (fixed & foldable)
    kept = ~gone
    if bool(gone.any()):
        constant = down.weight.float() @ torch.where(gone, value, torch.zeros_like(value))
        matrices[network.linears["fc2"]] = down.columns(kept, constant)
        for role in ("fc1", "gate"):
            if role in network.linears:
                path = network.linears[role]
                matrices[path] = matrices[path].rows(kept)
    return int(kept.sum())


def _fixed(up: Matrix, gate: Matrix | None, act: Activation | None) -> tuple[Tensor, Tensor]:
    """Return which neurons (bool) have the same value for every input, and that value."""
    dead = (up.weight == 0).all(1)
    bias = up.constant()
    if gate is None:
        value = _activated(act, bias)
        return dead & torch.isfinite(value), torch.where(dead, value, 0.0).nan_to_num(0.0)
    shut = (gate.weight == 0).all(1)
    value = _activated(act, gate.constant())
    # The product is fixed when both factors are, or one of them is zero.
    nothing = (dead & (bias == 0)) | (shut & (value == 0))
    fixed = nothing | (dead & shut & torch.isfinite(value))
    return fixed, torch.where(fixed & ~nothing, value * bias, 0.0).nan_to_num(0.0)


def _activated(act: Activation | None, bias: Tensor) -> Tensor:
    """Return act(bias), or NaN where the activation is not known."""
    return torch.full_like(bias, torch.nan) if act is None else act(bias).float()


def metrics(parts: Parts, matrices: dict[str, Matrix], small: Compacted) -> dict[str, float]:
    """Return counts of weights, heads and neurons before and after."""
    total = sum(m.weight.numel() for m in matrices.values())
    kept = sum(int((m.weight != 0).sum()) for m in matrices.values())
    found = {"weights": total, "nonzero_weights": kept, "density": kept / total}
    found["stored_weights"] = sum(m.weight.numel() for m in small.matrices.values())
    if parts.attention:
        heads = sum(block.heads for block in parts.attention)
        found |= {"heads": heads, "heads_kept": sum(map(len, small.heads))}
        found["uniform_heads"] = small.uniform
    if parts.networks:
        pairs = [len(matrices[n.linears["fc1"]].weight) for n in parts.networks]
        found |= {"neurons": sum(pairs), "neurons_kept": sum(small.neurons)}
    return {name: float(value) for name, value in found.items()}
