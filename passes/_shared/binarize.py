"""Near-lossless binarization: learning binary codes with a tied decoder (a helper, not a pass).

Tissier, Gravier and Habrard, AAAI 2019 (1803.09065). Written from the paper's equations and a
description of what the authors' program computes. Shapes: V rows, N rows of a batch, D dimensions,
n bits; W (n, D) is encoder and, transposed, decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "hard_tanh": lambda x: x.clamp(-1, 1),
    "none": lambda x: x,
}
_RAND_MAX = 2**31 - 1
_DECAY = 0.95
_PART = 8192
"""Rows whose codes are computed at once."""


@dataclass(frozen=True)
class Binarizer:
    """How codes are learned; `step(fraction)` hears how far it is."""

    bits: int
    activation: str
    official: bool
    epochs: int
    batch_size: int
    learning_rate: float
    regularization: float
    seed: int = 0

    def fit(
        self, x_VD: Tensor, step: Callable[[float], None], weights_V: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return W (n, D) and c (D,) for rows that are within the range of the activation; the
        paper's loss of a row is multiplied by its weight, the program's never."""
        if self.official:
            return self._official(x_VD, step)
        weights_V = torch.ones(len(x_VD)) if weights_V is None else weights_V
        return self._paper(x_VD, weights_V.to(x_VD), step)

    def _official(self, x_VD: Tensor, step: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """The program: sums over consecutive batches, orthogonality first, rates times 0.95 an
        epoch."""
        weight_nD, bias_D = (part.to(x_VD) for part in official_start(self.bits, x_VD.shape[1]))
        rate, reg_rate = self.learning_rate, self.learning_rate * self.regularization
        for epoch in range(self.epochs):
            for x_ND in x_VD.split(self.batch_size):
                weight_nD = weight_nD - reg_rate * orthogonality_gradient(weight_nD)
                to_weight, to_bias = gradients(x_ND, weight_nD, bias_D, self.activation)
                weight_nD, bias_D = weight_nD - rate * to_weight, bias_D - rate * to_bias
            rate, reg_rate = rate * _DECAY, reg_rate * _DECAY
            step((epoch + 1) / self.epochs)
        return weight_nD, bias_D

    def _paper(
        self, x_VD: Tensor, weights_V: Tensor, step: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        """The paper's loss, by Adam over shuffled batches at a rate that falls to zero."""
        random = torch.Generator().manual_seed(self.seed)
        weight_nD, bias_D = (
            part.to(x_VD)
            for part in start(torch.rand(self.bits + 1, x_VD.shape[1], generator=random) - 0.5)
        )
        optimizer = torch.optim.Adam([weight_nD, bias_D], lr=self.learning_rate)
        batches = -(-len(x_VD) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        for epoch in range(self.epochs):
            for ids_N in self._shuffled(len(x_VD), random):
                ids_N = ids_N.to(x_VD.device)
                part = (x_VD[ids_N], weight_nD, bias_D, self.activation, weights_V[ids_N])
                to_weight, bias_D.grad = gradients(*part)
                orthogonality = orthogonality_gradient(weight_nD)
                weight_nD.grad = to_weight + self.regularization * orthogonality
                optimizer.step()
                schedule.step()
            step((epoch + 1) / self.epochs)
        return weight_nD, bias_D

    def _shuffled(self, rows: int, random: torch.Generator) -> Iterator[Tensor]:
        yield from torch.randperm(rows, generator=random).split(self.batch_size)


def codes_of(x_ND: Tensor, weight_nD: Tensor) -> Tensor:
    """b = h(W x): booleans (N, n). Heaviside, without a bias; h(0) = 0.

    By parts: the products would take as much memory as the rows.
    """
    return torch.cat([part_ND @ weight_nD.T > 0 for part_ND in x_ND.split(_PART)])


def gradients(
    x_ND: Tensor,
    weight_nD: Tensor,
    bias_D: Tensor,
    activation: str,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_x ½||x - f(Wᵀb + c)||² by W (n, D) and c (D,); W through the decoder only.
    With weights (N,) each row's term is multiplied by its own.

    f' is 1 - f² for both kinds of tanh, so that a saturated unit has none. The paper's loss is the
    mean over D; its factor 2/D belongs to the learning rate, as in the authors' program.
    """
    bits_Nn = codes_of(x_ND, weight_nD).to(x_ND.dtype)
    y_ND = ACTIVATIONS[activation](bits_Nn @ weight_nD + bias_D)
    slope = 1.0 if activation == "none" else 1 - y_ND.square()
    delta_ND = (y_ND - x_ND) * slope
    if weights_N is not None:
        delta_ND = delta_ND * weights_N[:, None]
    return bits_Nn.T @ delta_ND, delta_ND.sum(0)


def orthogonality_gradient(weight_nD: Tensor) -> Tensor:
    """Gradient (n, D) of ½||WᵀW - I||²: 2 W (WᵀW - I) = 2 (WWᵀ - I) W, whichever is cheaper."""
    if weight_nD.shape[0] < weight_nD.shape[1]:
        return 2 * (weight_nD @ weight_nD.T @ weight_nD - weight_nD)
    return 2 * (weight_nD @ (weight_nD.T @ weight_nD) - weight_nD)


def start(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split values (n + 1, D) into W and c, each divided by its own norm."""
    weight_nD, bias_D = values[:-1], values[-1]
    return weight_nD / weight_nD.norm(), bias_D / bias_D.norm()


def official_start(bits: int, dims: int) -> tuple[Tensor, Tensor]:
    """The program's W (n, D) and c (D,), in float64: rand()/RAND_MAX - 0.5 after srand(0)."""
    draws = torch.tensor(glibc_rand((bits + 1) * dims), dtype=torch.float64)
    return start(draws.view(bits + 1, dims) / _RAND_MAX - 0.5)


def glibc_rand(count: int, seed: int = 0) -> list[int]:
    """The first values of the C library's `rand()` after `srand(seed)`: additive feedback of 31
    words."""
    state = [seed or 1]
    for _ in range(30):
        state.append(16807 * state[-1] % _RAND_MAX)
    state += state[:3]
    for i in range(34, 344 + count):
        state.append((state[i - 31] + state[i - 3]) & 0xFFFFFFFF)
    return [value >> 1 for value in state[344:]]


def sokal_michener(one_Nn: Tensor, two_Nn: Tensor) -> Tensor:
    """Share of bits (N,) in which codes agree: (n11 + n00)/n."""
    return (one_Nn == two_Nn).float().mean(-1)


def similarity_kept(table_VD: Tensor, codes_Vn: Tensor, pairs: int = 10_000) -> float:
    """Spearman correlation of the rows' cosines with the codes' similarity, over random pairs."""
    random = torch.Generator().manual_seed(0)
    one, two = torch.randint(len(table_VD), (2, pairs), generator=random).to(table_VD.device)
    cosine = F.cosine_similarity(table_VD[one].float(), table_VD[two].float())
    similar = sokal_michener(codes_Vn[one], codes_Vn[two])
    if not (float(cosine.std()) > 0 and float(similar.std()) > 0):
        return 0.0
    return float(spearmanr(cosine.cpu().numpy(), similar.cpu().numpy()).statistic)
