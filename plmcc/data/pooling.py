"""Token states as one vector, as sentence encoders do it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plmcc.diagnostics import error


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector: "mean", "cls" or "max" over the real tokens, as in the
    model's own files."""

    mode: str = "mean"

    @classmethod
    def of(cls, folder: Path | None) -> Pooling:
        """Read a sentence-transformers folder; mean pooling where it says nothing.

        Raises:
            PlmccError: the folder names a pooling that plmcc does not know.
        """
        file = folder / "1_Pooling" / "config.json" if folder else None
        if file is None or not file.exists():
            return cls()
        values = json.loads(file.read_text(encoding="utf-8"))
        named = values.get("pooling_mode")
        modes = (
            [named]
            if isinstance(named, str)
            else [
                key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
                for key, chosen in values.items()
                if key.startswith("pooling_mode_") and chosen
            ]
        )
        if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
            raise error(
                "PLM303",
                "unknown pooling",
                str(file),
                got=", ".join(modes),
                allowed="mean, cls, max",
            )
        return cls(modes[0])

    def __call__(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return one vector a row (B, D), of length 1."""
        mask_BL1 = mask_BL[..., None].to(states_BLD.dtype)
        if self.mode == "cls":
            first_B = mask_BL.argmax(-1)
            pooled = states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), first_B]
        elif self.mode == "max":
            pooled = states_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(1)
        else:
            pooled = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)
        return F.normalize(pooled.float(), dim=-1)


def similarity_loss(pooled_BD: Tensor, labels_N: Tensor) -> Tensor:
    """Mean squared difference of cosine and label; rows N to 2N-1 are the second texts."""
    first_ND, second_ND = pooled_BD.chunk(2)
    return F.mse_loss((first_ND * second_ND).sum(-1), labels_N.float())


def last_states(output: Any) -> Tensor:
    """Return the last hidden states (B, L, D) of any model's output."""
    states = output.get("last_hidden_state")
    if states is None:
        states = output["hidden_states"][-1]
    assert isinstance(states, Tensor)
    return states
