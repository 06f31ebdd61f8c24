"""Residual vector quantization with beam search and least-squares refinement (a helper, not a
pass).

A row x is written as a sum of one vector from each of M codebooks (Chen, Guan and Wang, 2010; the
beam search and the joint update of the codebooks follow the description of additive quantization by
Babenko and Lempitsky, CVPR 2014).
Shapes: V rows, N rows of a chunk, S sampled rows, D dimensions, M codebooks, K codewords, B beams.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

SAMPLE = 65_536
"""Rows that codebooks are learned from; larger tables are sampled. Encoding always sees every
row."""
CHUNK = 2_048

Tick = Callable[[str, float], None]


def residual_quantize(
    table_VD: Tensor,
    weights_V: Tensor,
    codebooks: int,
    codewords: int,
    beam: int,
    rounds: int,
    seed: int,
    tick: Tick,
) -> tuple[Tensor, Tensor]:
    """Return codes (V, M) int64 and codebooks (M, K, D) float32 with Σ_m C[m, code_m] ≈ table row.

    Codebooks start as k-means of successive residuals; each of `rounds` rounds encodes the sample
    by beam search and solves for all codebooks jointly, both with rows of the given weights (V,).
    `tick(what, fraction)` reports progress.
    Memory beyond the table: one sample.
    """
    rows = np.random.default_rng(seed).permutation(len(table_VD))[:SAMPLE]
    picked_S = torch.from_numpy(np.sort(rows))
    sample_SD = table_VD[picked_S.to(table_VD.device)].float()
    weights_S = weights_V[picked_S].to(sample_SD)
    books_MKD = _successive_kmeans(sample_SD, weights_S, codebooks, codewords, seed, tick)
    best = (float("inf"), books_MKD)
    for done in range(rounds):
        tick("refine", done / rounds)
        codes = encode(sample_SD, books_MKD, beam, lambda _: None)
        books_MKD = _least_squares(sample_SD, weights_S, codes, books_MKD)
        error_S = (decode(codes, books_MKD) - sample_SD).square().sum(-1)
        error = float(error_S @ weights_S)
        best = min(best, (error, books_MKD), key=lambda pair: pair[0])
    return encode(table_VD, best[1], beam, lambda f: tick("encode", f)), best[1]


def encode(table_VD: Tensor, books_MKD: Tensor, beam: int, tick: Callable[[float], None]) -> Tensor:
    """Codes (V, M) int64 of every row, by beam search over the codebooks in order."""
    codebooks, codewords, _ = books_MKD.shape
    books_PD = books_MKD.flatten(0, 1)
    gram_PP, parts = books_PD @ books_PD.T, []
    for start in range(0, len(table_VD), CHUNK):
        rows = table_VD[start : start + CHUNK].float()
        parts.append(_encode_chunk(rows, books_PD, gram_PP, (codebooks, codewords), beam))
        tick(min(1.0, (start + CHUNK) / len(table_VD)))
    return torch.cat(parts)


def decode(codes_NM: Tensor, books_MKD: Tensor) -> Tensor:
    """Rows (N, D) that the codes stand for: Σ_m C[m, code_m]."""
    codebooks, codewords, _ = books_MKD.shape
    offsets = torch.arange(codebooks, device=codes_NM.device) * codewords
    return F.embedding_bag(codes_NM + offsets, books_MKD.flatten(0, 1), mode="sum")


def _successive_kmeans(
    sample_SD: Tensor, weights_S: Tensor, codebooks: int, codewords: int, seed: int, tick: Tick
) -> Tensor:
    residual, weights = sample_SD.cpu().numpy().copy(), weights_S.cpu().numpy()
    books = []
    for stage in range(codebooks):
        means = KMeans(codewords, n_init=1, max_iter=15, random_state=seed + stage)
        means.fit(residual, sample_weight=weights)
        residual -= means.cluster_centers_[means.labels_]
        books.append(torch.from_numpy(means.cluster_centers_))
        tick("k-means", (stage + 1) / codebooks)
    return torch.stack(books).to(sample_SD)


def _encode_chunk(
    rows_ND: Tensor, books_PD: Tensor, gram_PP: Tensor, size: tuple[int, int], beam: int
) -> Tensor:
    """Beam search by inner products alone: ||x - Σc||² = ||x||² + Σ(||c||² - 2x·c) + 2ΣΣ c·c'."""
    count, (codebooks, codewords) = len(rows_ND), size
    dot_NP = rows_ND @ books_PD.T
    entries_NBM = torch.empty(count, 1, 0, dtype=torch.long, device=rows_ND.device)
    cost_NB = torch.zeros(count, 1, device=rows_ND.device)
    for first in range(0, codebooks * codewords, codewords):
        block = slice(first, first + codewords)
        gain_NBK = (gram_PP.diagonal()[block] - 2 * dot_NP[:, block])[:, None]
        if first:
            cross = F.embedding_bag(
                entries_NBM.flatten(0, 1), gram_PP[:, block].contiguous(), mode="sum"
            )
            gain_NBK = gain_NBK + 2 * cross.view(count, -1, codewords)
        flat = (cost_NB[..., None] + gain_NBK).flatten(1)
        cost_NB, index_NB = flat.topk(min(beam, flat.shape[1]), largest=False)
        parent_NB1 = (index_NB // codewords)[..., None]
        entry_NB1 = (index_NB % codewords)[..., None] + first
        entries_NBM = torch.cat([entries_NBM.take_along_dim(parent_NB1, 1), entry_NB1], -1)
    offsets = torch.arange(codebooks, device=rows_ND.device) * codewords
    return entries_NBM[:, 0] - offsets


def _least_squares(
    sample_SD: Tensor, weights_S: Tensor, codes_SM: Tensor, books_MKD: Tensor
) -> Tensor:
    """All codebooks at once: argmin ||one_hot(codes)·C - X||², rows weighted, with a small pull
    towards the old codebooks.

    The sum of codebooks is unchanged when a vector moves from one to another, so the normal
    equations are singular without the pull.
    """
    codebooks, codewords, dims = books_MKD.shape
    size = codebooks * codewords
    gram = torch.zeros(size, size, device=sample_SD.device)
    right = torch.zeros(size, dims, device=sample_SD.device)
    offsets = torch.arange(codebooks, device=sample_SD.device) * codewords
    parts = (part.split(4 * CHUNK) for part in (sample_SD, weights_S, codes_SM))
    for rows, weights, codes in zip(*parts, strict=True):
        hot = torch.zeros(len(rows), size, device=rows.device).scatter_(1, codes + offsets, 1.0)
        weighted = hot * weights[:, None]
        gram += hot.T @ weighted
        right += weighted.T @ rows
    pull = 1e-3 * len(sample_SD) / codewords
    gram.diagonal().add_(pull)
    solved: Tensor = torch.linalg.solve(
        gram.double(), (right + pull * books_MKD.flatten(0, 1)).double()
    )
    return solved.to(sample_SD.dtype).view_as(books_MKD)
