"""Factors of a table, one of them not negative: where they begin, and fitting them (a helper, not a
pass).

Shapes: V rows, D dimensions, rank r; Ẽ = ReLU(U) B with U (V, r) and B (r, D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plmcc.passes._shared.bits import pack, unpack

_LEVELS = 255


def svd_factors(table_VD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The truncated SVD as UΣ (V, r) and orthonormal rows (r, D), through the D x D Gram matrix.

    Of each column's two signs the one whose positive part is larger, since that is what a clamp
    keeps.
    """
    table_VD = table_VD.double()
    _, vectors_DD = torch.linalg.eigh(table_VD.T @ table_VD)
    basis_rD = vectors_DD.T.flip(0)[:rank]
    factor_Vr = table_VD @ basis_rD.T
    positive, negative = (factor_Vr * sign for sign in (1, -1))
    larger = positive.clamp(min=0).square().sum(0) >= negative.clamp(min=0).square().sum(0)
    signs_r = torch.where(larger, 1.0, -1.0).to(factor_Vr)
    return factor_Vr * signs_r, basis_rD * signs_r[:, None]


def shifted_factors(table_VD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The SVD of rank r - 1 made non-negative: its columns shifted by their minima, and a last
    column of ones for what undoes the shift.

    That column holds the mean row too, so that it is never worse than the SVD of rank r - 1, and
    the same where the mean is zero.
    """
    mean_D = table_VD.double().mean(0)
    factor_Vk, basis_kD = svd_factors(table_VD.double() - mean_D, rank - 1)
    least_k = factor_Vk.amin(0)
    ones_V1 = (
        torch.ones_like(factor_Vk[:, :1]) if rank > 1 else factor_Vk.new_ones(len(table_VD), 1)
    )
    factor_Vr = torch.cat([factor_Vk - least_k, ones_V1], 1)
    return factor_Vr, torch.cat([basis_kD, (mean_D + least_k @ basis_kD)[None]])


def random_factors(table_VD: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal factors whose product has the table's mean square."""
    random = torch.Generator().manual_seed(seed)
    factor_Vr = torch.randn(len(table_VD), rank, generator=random)
    basis_rD = torch.randn(rank, table_VD.shape[1], generator=random)
    deviation = float(table_VD.float().square().mean().sqrt())
    return factor_Vr.to(table_VD.device), basis_rD.to(table_VD.device) * deviation / (
        rank / 2
    ) ** 0.5


def fit_factors(
    table_VD: Tensor,
    factors: tuple[Tensor, Tensor],
    steps: int,
    learning_rate: float,
    step: Callable[[float], None],
) -> tuple[Tensor, Tensor]:
    """Minimize (1/V) Σ ||e - ẽ||² by Adam from given factors; never ends worse than it began.

    The table is brought to a mean square of 1 meanwhile, which makes the learning rate relative.
    """
    size = float(table_VD.float().square().mean().sqrt()) or 1.0
    target_VD = table_VD.float() / size
    factor = factors[0].float().clone().requires_grad_()
    basis = (factors[1].float() / size).clone().requires_grad_()
    optimizer = torch.optim.Adam([factor, basis], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, kept = float("inf"), (factor.detach(), basis.detach())
    for index in range(steps + 1):
        optimizer.zero_grad()
        loss = embedding_loss(target_VD, factor.relu(), basis)
        if loss.item() < best:
            best, kept = loss.item(), (factor.detach().clone(), basis.detach().clone())
        if index < steps:
            loss.backward()
            optimizer.step()
            schedule.step()
            step((index + 1) / steps)
    return kept[0], kept[1] * size


def embedding_loss(table_VD: Tensor, positive_Vr: Tensor, basis_rD: Tensor) -> Tensor:
    """L_e = (1/V) Σ ||e - ẽ||²."""
    return (positive_Vr @ basis_rD - table_VD).square().sum() / len(table_VD)


def quantized(positive_Vr: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 0 to 255 (V, r), as floats, and the step of each column (r,)."""
    steps_r = (positive_Vr.amax(0) / _LEVELS).clamp(min=torch.finfo(positive_Vr.dtype).tiny)
    return (positive_Vr / steps_r).round().clamp(max=_LEVELS), steps_r


def to_bitmask(positive_Vr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are not zero, packed (V, ⌈r/8⌉); where each row begins (V,); the values.

    There is always one value, so that no tensor is empty.
    """
    keep_Vr = positive_Vr != 0
    counts_V = keep_Vr.sum(1)
    starts_V = (counts_V.cumsum(0) - counts_V).to(torch.int32)
    values = positive_Vr[keep_Vr] if keep_Vr.any() else positive_Vr.new_zeros(1)
    return pack(keep_Vr, 1), starts_V, values


def from_bitmask(mask_NB: Tensor, starts_N: Tensor, values: Tensor, rank: int) -> Tensor:
    """Rows (N, r) of what `to_bitmask` stored; every shape is known without looking at values."""
    keep_Nr = unpack(mask_NB, rank, 1)
    places_Nr = (starts_N.long()[:, None] + keep_Nr.cumsum(1) - 1).clamp(min=0)
    places_Nr = places_Nr.clamp(max=values.shape[0] - 1)
    return values[places_Nr] * keep_Nr.to(values.dtype)
