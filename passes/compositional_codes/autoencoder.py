"""The autoencoder of compositional codes and its training (a helper, not a pass).

Shu and Nakayama, ICLR 2018, with the settings of the official code. Shapes: V rows, N rows of a
batch, D dimensions, M codebooks, K codewords, P = M·K.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.kit import Progress

if TYPE_CHECKING:
    from plmcc.passes.compositional_codes import CompositionalCodes


class CodeAutoencoder(nn.Module):
    """The paper's encoder and decoder: h = tanh(θᵀE + b), α = softplus(θ'ᵀh + b'), one-hot by
    Gumbel-softmax.

    The hidden width is M·K/2. Logits are log(α + 1e-8) as in the official code, so that without
    temperature P(code = k) = α_k / Σ α. Kernels and codebooks start from U(-0.01, 0.01), biases
    from 0.
    """

    def __init__(self, dims: int, codebooks: int, codewords: int, temperature: float = 1.0) -> None:
        super().__init__()
        size = codebooks * codewords
        self.hidden = nn.Linear(dims, max(1, size // 2))
        self.logit = nn.Linear(max(1, size // 2), size)
        self.codebooks = nn.Parameter(torch.empty(size, dims))
        self.shape, self.temperature = (codebooks, codewords), temperature
        for kernel in (self.hidden.weight, self.logit.weight, self.codebooks):
            nn.init.uniform_(kernel, -0.01, 0.01)
        for bias in (self.hidden.bias, self.logit.bias):
            nn.init.zeros_(bias)

    def logits(self, rows_ND: Tensor) -> Tensor:
        """log α of each codeword (N, M, K)."""
        alpha_NP = F.softplus(self.logit(torch.tanh(self.hidden(rows_ND))))
        return torch.log(alpha_NP + 1e-8).view(-1, *self.shape)

    def sample(self, logits_NMK: Tensor) -> Tensor:
        """Soft one-hot codes (N, M, K): softmax((log α + G)/τ), G = -log(-log U)."""
        uniform = torch.rand_like(logits_NMK)
        gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
        return torch.softmax((logits_NMK + gumbel) / self.temperature, -1)

    def loss(self, rows_ND: Tensor) -> Tensor:
        """Mean over words of ½ Σ_d (ŷ - x)², with sampled soft codes."""
        codes_NMK = self.sample(self.logits(rows_ND))
        return 0.5 * (codes_NMK.flatten(1) @ self.codebooks - rows_ND).square().sum(-1).mean()

    def export(self, rows_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (V, M) by argmax without noise, and codebooks (M, K, D)."""
        with torch.no_grad():
            codes = [self.logits(chunk.float()).argmax(-1) for chunk in rows_VD.split(8192)]
        return torch.cat(codes), self.codebooks.detach().view(*self.shape, -1)


def fit_autoencoder(
    model: CodeAutoencoder, table_VD: Tensor, options: CompositionalCodes, progress: Progress
) -> float:
    """Train in place, keep the state of the best validation loss (640 words, with noise); return
    that loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    held_out = table_VD[torch.randperm(len(table_VD))[:640]].float()
    best, state = math.inf, model.state_dict()
    for epoch in range(options.epochs):
        for ids in torch.randperm(len(table_VD)).split(options.batch_size):
            optimizer.zero_grad()
            model.loss(table_VD[ids].float()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
            optimizer.step()
        with torch.no_grad():
            valid = float(model.loss(held_out))
        if valid <= 0.999 * best:
            best, state = valid, {name: value.clone() for name, value in model.state_dict().items()}
        progress.step(f"autoencoder, loss {valid:.4g}", (epoch + 1) / options.epochs)
    model.load_state_dict(state)
    return best
