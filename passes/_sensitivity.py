"""Scores that begin with what the warm-up has shown (a helper of the movement pruning pass, not a
pass)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plmcc.passes._masked import Unit

_SPAN = 3.0
"""Scores begin between minus and plus this: as far as 300 steps of Adam at the default learning
rate move a score whose gradient keeps its sign, so that learning can overrule them."""


class Sensitivity:
    """Sums of the squared gradients of masks, the empirical Fisher information of what they cover.

    Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022
    (2204.09656), equation 6: the loss that removing a group costs is, to second order, half its
    squared gradient, summed over batches.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Unit, Tensor]] = []

    def watch(self, unit: Unit, wanted: Callable[[], bool]) -> None:
        """Sum up squared gradients of a unit's scores while they are `wanted`."""
        assert unit.scores is not None
        sums = torch.zeros(unit.shape)
        self._sums.append((unit, sums))

        def add(gradient: Tensor) -> None:
            if wanted():
                sums.add_(gradient.detach().float().square().to(sums.device))

        unit.scores.register_hook(add)

    def sums(self) -> list[Tensor]:
        """Return the sums so far."""
        return [sums for _, sums in self._sums]

    @torch.no_grad()
    def begin(self) -> None:
        """Give the scores the ranks of these sums, taken for each weight, over the whole model."""
        sizes = [unit.sizes().to(sums.device) for unit, sums in self._sums]
        each = [sums / size for (_, sums), size in zip(self._sums, sizes, strict=True)]
        flat = torch.cat([values.flatten() for values in each])
        ranks = flat.argsort().argsort().float() / max(1, len(flat) - 1)
        parts = ranks.mul(2 * _SPAN).sub(_SPAN).split([values.numel() for values in each])
        for (unit, _), part in zip(self._sums, parts, strict=True):
            assert unit.scores is not None
            unit.scores.copy_(part.view(unit.shape))
        self._sums = []
