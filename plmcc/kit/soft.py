"""A trainable form that is the deployed form itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from plmcc.api import Hard, Soft

AnyHard = TypeVar("AnyHard", bound=Hard)


class Trainable(Soft, Generic[AnyHard]):
    """Trains the parameters of a `Hard` module as they are; it computes exactly what that does."""

    def __init__(self, hard: AnyHard, statistics: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.hard, self._statistics = hard, dict(statistics or {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.hard(*args, **kwargs)

    def attend(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), of a table."""
        return self.hard.attend(hidden)  # type: ignore[operator,no-any-return]

    def product(self, x: Tensor) -> Tensor:
        """Products (..., O) without the bias, of a linear map."""
        return self.hard.product(x)  # type: ignore[operator,no-any-return]

    @property
    def weight(self) -> Tensor:
        """The dense weight of the module."""
        return self.hard.weight  # type: ignore[return-value]

    def harden(self) -> Hard:
        """Return the module."""
        return self.hard

    def statistics(self) -> dict[str, float]:
        """Return what was given."""
        return self._statistics
