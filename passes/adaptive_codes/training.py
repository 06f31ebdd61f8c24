"""Training of adaptive codes in two phases (a helper, not a pass)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plmcc.api import Objective, Values, error

if TYPE_CHECKING:
    from plmcc.passes.adaptive_codes import AdaptiveCodes, SoftAdaptive

_SAMPLE = 1024
"""Rows on which a step's reconstruction is computed."""


class AdaptiveTraining(Objective):
    """First lengths and codebooks together, then, with lengths fixed, the codebooks alone."""

    name = "adaptive_codes"

    def __init__(self, soft: SoftAdaptive, options: AdaptiveCodes) -> None:
        self.soft, self.options = soft, options
        self._last: Tensor | None = None

    def begin(self, steps: int) -> None:
        """Refuse a stage without a step for each phase."""
        first = self.options.selection * steps
        if steps < 2 or not 0 < first <= steps - 1:
            message = f"{steps} steps are too few to learn lengths and then codes"
            hint = "train for more steps, or change `selection`"
            raise error("PLM303", message, "adaptive_codes", hint=hint)

    def advance(self, progress: float) -> None:
        """Fix the lengths when their share of the stage is over."""
        if progress >= self.options.selection:
            self.soft.select()

    def loss(
        self, batch: dict[str, Tensor], output: object, teacher: object | None
    ) -> Tensor | None:
        """The weighted reconstruction of a sample of rows, and orthogonality."""
        device = self.soft.codebooks.device
        ids_N = torch.randint(self.soft.num_embeddings, (_SAMPLE,), device=device)
        with torch.autocast(device.type, enabled=False):
            distance = self.soft.distance(ids_N)
            total = self.options.reconstruction_weight * distance
            total = total + self.options.orthogonality_weight * self.soft.orthogonality()
        self._last = distance.detach()
        return total

    def metrics(self) -> dict[str, float]:
        """Mean length of a code, and the relative error of the reconstruction."""
        found = {"mean_length": self.soft.mean_length()}
        return found if self._last is None else found | {"relative_error": float(self._last)}

    def parameter_groups(self) -> list[Values]:
        """Return the logits, and the codebooks where they have a rate of their own."""
        soft, rate = self.soft, self.options.codebook_learning_rate
        groups = [{"params": [soft.logits], "lr": self.options.selector_learning_rate}]
        return groups + (
            [] if rate is None else [{"params": [soft.codebooks, soft.bias], "lr": rate}]
        )
