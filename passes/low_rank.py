"""Low-rank linears: a weight is the product of two thin matrices, by a weighted SVD.

W ≈ A B with A (O, r) and B (r, I). A holds the r leading eigenvectors of W C Wᵀ and B = Aᵀ W, the
best approximation of the outputs W x on inputs of second moment C = E[x xᵀ] (Eckart and Young 1936;
with activations Chen et al., "DRONE", NeurIPS 2021). C is measured on calibration data, in full or
its diagonal, as in Yuan et al., "ASVD" (2312.05821), or it is I: the plain SVD. Matches linear
layers, GPT-2's transposed ones included. Stored: A, B and the bias, in the model's dtype.
Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import LinearSite, Miss, Pass, Program, Site, Soft
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of

_KEPT = 0.6


class Target(BaseModel):
    """What each layer keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: float = Field(gt=0, lt=1, description="Fraction of each weight's parameters.")


class LowRank(Pass):
    """Replace linear layers by two thinner ones."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Eckart and Young, 1936; Chen et al., NeurIPS 2021; arXiv:2312.05821"
    hazards: ClassVar[tuple[str, ...]] = (
        "It costs accuracy, more with fewer parameters: train afterwards, with distillation.",
    )

    targets: str | list[str] = "linears"
    """The linear layers to factorize."""
    rank: int | None = Field(None, ge=1)
    """Rank of every layer."""
    target: Target | None = None
    """Instead of `rank`: the fraction of each weight's parameters to keep; 0.6 by default."""
    weighting: Literal["none", "diagonal", "covariance"] = "covariance"
    """Which errors count: those of the weight, or those of the outputs on calibration data, with
    inputs taken as independent (`diagonal`) or as they are (`covariance`)."""

    @model_validator(mode="after")
    def _rank_or_target(self) -> LowRank:
        if self.rank is not None and self.target is not None:
            raise ValueError("`rank` and `target` say the same: remove one")
        return self

    def needs_data(self) -> str:
        """The weightings are measured."""
        if self.weighting == "none":
            return ""
        return f"`weighting: {self.weighting}` measures the inputs of each layer"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield linear layers; one that would not shrink is a miss."""
        yield from matched_linears(program, self.targets, self.expect, self._refusal)

    def _rank(self, site: LinearSite) -> int:
        inputs, outputs = site.in_features, site.out_features
        if self.rank is not None:
            return self.rank
        kept = self.target.parameters if self.target is not None else _KEPT
        return int(kept * inputs * outputs / (inputs + outputs))

    def _refusal(self, site: LinearSite) -> str:
        inputs, outputs, rank = site.in_features, site.out_features, self._rank(site)
        if 0 < rank * (inputs + outputs) < inputs * outputs:
            return ""
        return f"rank {rank} does not make its {outputs} x {inputs} weight smaller"

    def replace(self, site: Site, program: Program) -> Soft:
        """Factorize the weight; both factors and the bias are trained."""
        assert isinstance(site, LinearSite)
        weight_OI, rank = weight_of(site), self._rank(site)
        made = LowRankLinear(site.in_features, site.out_features, site.bias, rank=rank)
        made.to(weight_OI.device, weight_OI.dtype).take_bias(site)
        scaled_OI = weight_OI.double()
        if self.weighting == "covariance":
            scaled_OI = scaled_OI @ program.data.second_moment(site).to(scaled_OI)
        elif self.weighting == "diagonal":
            scaled_OI = scaled_OI * program.data.mean_norm(site).to(scaled_OI).square()
        outputs_OO = scaled_OI @ weight_OI.double().T
        values_O, vectors_OO = torch.linalg.eigh((outputs_OO + outputs_OO.T) / 2)
        left_Or = vectors_OO[:, -rank:]
        made.left.data.copy_(left_Or)
        made.right.data.copy_(left_Or.T @ weight_OI.double())
        lost = values_O[:-rank].clamp(min=0).sum() / values_O.clamp(min=0).sum().clamp(min=1e-30)
        return Trainable(made, {} if lost.is_meta else {"relative_error": float(lost.sqrt())})


class LowRankLinear(HardLinear):
    """x -> A (B x) + bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int) -> None:
        super().__init__(in_features, out_features, bias, rank=rank)
        self.left = nn.Parameter(torch.zeros(out_features, rank))
        self.right = nn.Parameter(torch.zeros(rank, in_features))

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(F.linear(x, self.right), self.left)

    def dense(self) -> Tensor:
        """The weight (O, I)."""
        return self.left @ self.right
