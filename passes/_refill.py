"""Noise in the place of zeros, as in the `filled` models of nn_pruning (a helper of the movement
pruning pass, not a pass)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plmcc.passes._prunable import Parts, matrix, plain

_NOISE = 0.01


@torch.no_grad()
def refilled(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a matrix whose zeros are mean(w) + N(0, 1) * 0.01 * std(w), of the others' values."""
    zero = weight == 0
    values = weight[~zero].float()
    if not zero.any() or values.numel() < 2:
        return weight.clone()
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return torch.where(zero, (values.mean() + noise * (_NOISE * values.std())).to(weight), weight)


def refill(layer: nn.Module, parts: Parts, seed: int) -> dict[str, nn.Module]:
    """Return new linears for a layer, by path, with noise in the place of their zeros."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in parts.paths():
        linear = layer.get_submodule(name)
        weight = refilled(matrix(linear).detach(), generator)
        found[name] = plain(linear, weight, getattr(linear, "bias", None))
    return found
