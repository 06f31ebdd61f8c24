"""The weight of a penalty, steered so that a density falls as wanted (a helper of the movement
pruning pass, not a pass)."""

from __future__ import annotations

import math
from dataclasses import dataclass

_PROPORTIONAL, _INTEGRAL = 1.0, 0.05
_MOST = math.log(1000.0)
_LEAST = 1e-6


@dataclass
class Pressure:
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
