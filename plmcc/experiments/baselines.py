"""What else a user could do to an embedding table, for `plmcc compare`: 8 and 4 bits by torchao, a
truncated SVD, product and residual quantization by FAISS.

A baseline is a table of given size. Those of torchao and FAISS are arrays that their libraries have
encoded and decoded again: they have no gradient, so that only the rest of the model trains. The
factors of an SVD train. FAISS and torchao are in the extra `compare`.
Shapes: V rows, D dimensions, r rank, N tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plmcc.kit.tables import CompressedTable
from plmcc.utils.extras import library
from plmcc.utils.types import Values

_FLOAT, _GROUP = 4, 32
_NEEDED = ("a comparison without --no-baselines", "compare")
_BEAM_BOOKS = 32
"""Codebooks up to which residual quantization searches with FAISS's own beam of 5: with more it
takes minutes, and a beam of 1 costs a hundredth of the variance."""


@dataclass(frozen=True)
class Baseline:
    """A table of a given size in bytes, before it is made."""

    name: str
    settings: str
    size: int
    make: Callable[[Tensor, Values], CompressedTable]
    """From the table (V, D) and its `passes._tables.common_layout`."""


class ReadyTable(CompressedTable):
    """A table (V, D) that does not train."""

    def __init__(self, table_VD: Tensor, **layout: Any) -> None:
        super().__init__(**layout)
        self.table_VD: Tensor
        self.register_buffer("table_VD", table_VD)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D)."""
        return self.table_VD[ids_N]

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V)."""
        return hidden_ND @ self.table_VD.T

    @property
    def weight(self) -> Tensor:
        """The table (V, D)."""
        return self.table_VD


class FactorTable(CompressedTable):
    """Two factors (V, r) and (r, D) that train."""

    def __init__(self, factor_Vr: Tensor, basis_rD: Tensor, **layout: Any) -> None:
        super().__init__(**layout)
        self.factor, self.basis = nn.Parameter(factor_Vr), nn.Parameter(basis_rD)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D)."""
        return self.factor[ids_N] @ self.basis

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V): two thin ones."""
        return hidden_ND @ self.basis.T @ self.factor.T


def baselines(rows: int, dims: int, limit: int) -> Iterator[Baseline]:
    """Yield the tables that take at most so many bytes, each as large as it may be.

    Raises:
        PlmccError: torchao or FAISS is not installed.
    """
    for bits in (8, 4):
        # One scale a row, or a group of 32 values: both as torchao has them.
        groups = 1 if bits == 8 else -(-dims // _GROUP)
        size = rows * (dims * bits // 8 + _FLOAT * groups)
        if size <= limit and dims % _GROUP == 0:
            name, settings = f"int{bits} (torchao)", "by row" if bits == 8 else f"by {_GROUP}"
            yield Baseline(name, settings, size, _rounded(bits))
    rank = min(limit // (_FLOAT * (rows + dims)), rows, dims)
    if rank:
        size = _FLOAT * rank * (rows + dims)
        yield Baseline("truncated SVD", f"rank {rank}", size, _factors(rank))
    if (chosen := product_codes(rows, dims, limit)) is not None:
        size = _product_bytes(rows, dims, *chosen)
        yield Baseline(
            "PQ (FAISS)", "{} x {} bits".format(*chosen), size, _quantized("product", *chosen)
        )
    found = [(m, b) for b in (4, 6, 8) if (m := _residual_books(rows, dims, limit, b))]
    if found:
        books, bits = max(found, key=lambda pair: (pair[0] * pair[1], -pair[0]))
        size = _residual_bytes(rows, dims, books, bits)
        made = _quantized("residual", books, bits)
        yield Baseline("RQ (FAISS)", f"{books} x {bits} bits", size, made)


def product_codes(rows: int, dims: int, limit: int) -> tuple[int, int] | None:
    """Return the codebooks and bits of product codes with the most bits a row, of as many those
    with the fewest tables to look into; None if none fit."""
    found = [(m, b) for b in (4, 6, 8) if (m := _product_books(rows, dims, limit, b))]
    return max(found, key=lambda pair: (pair[0] * pair[1], -pair[0]), default=None)


def _product_bytes(rows: int, dims: int, books: int, bits: int) -> int:
    return rows * (-(-books * bits // 8)) + _FLOAT * dims * (1 << bits)


def _residual_bytes(rows: int, dims: int, books: int, bits: int) -> int:
    return rows * (-(-books * bits // 8)) + _FLOAT * books * dims * (1 << bits)


def _product_books(rows: int, dims: int, limit: int, bits: int) -> int:
    """Sub-vectors of equal width; 0 where not even one fits."""
    fits = (m for m in range(dims, 0, -1) if dims % m == 0 and 2**bits <= rows)
    return next((m for m in fits if _product_bytes(rows, dims, m, bits) <= limit), 0)


def _residual_books(rows: int, dims: int, limit: int, bits: int) -> int:
    fits = (m for m in range(dims, 0, -1) if 2**bits <= rows)
    return next((m for m in fits if _residual_bytes(rows, dims, m, bits) <= limit), 0)


def _factors(rank: int) -> Callable[[Tensor, Values], CompressedTable]:
    def make(table_VD: Tensor, layout: Values) -> CompressedTable:
        left_Vk, values_k, right_kD = torch.linalg.svd(table_VD.float(), full_matrices=False)
        root_r = values_k[:rank].sqrt()
        factor_Vr, basis_rD = left_Vk[:, :rank] * root_r, right_kD[:rank] * root_r[:, None]
        return FactorTable(factor_Vr.to(table_VD), basis_rD.to(table_VD), **layout)

    return make


def _rounded(bits: int) -> Callable[[Tensor, Values], CompressedTable]:
    def make(table_VD: Tensor, layout: Values) -> CompressedTable:
        torchao = library("torchao.quantization", "compare", *_NEEDED)
        grains = importlib.import_module("torchao.quantization.granularity")
        holder = nn.Sequential(nn.Embedding.from_pretrained(table_VD.float().clone()))
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=grains.PerAxis(0) if bits == 8 else grains.PerGroup(_GROUP),
        )
        torchao.quantize_(holder, config, filter_fn=lambda m, _: isinstance(m, nn.Embedding))
        rounded: Any = holder[0].weight
        return ReadyTable(rounded.dequantize().detach().to(table_VD), **layout)

    return make


def _quantized(kind: str, books: int, bits: int) -> Callable[[Tensor, Values], CompressedTable]:
    def make(table_VD: Tensor, layout: Values) -> CompressedTable:
        faiss = library("faiss", "compare", *_NEEDED, "faiss-cpu")
        faiss.omp_set_num_threads(torch.get_num_threads())
        values_VD = np.ascontiguousarray(table_VD.float().cpu().numpy())
        if kind == "product":
            encoder = faiss.ProductQuantizer(values_VD.shape[1], books, bits)
        else:
            encoder = faiss.ResidualQuantizer(values_VD.shape[1], books, bits)
            if books > _BEAM_BOOKS:
                encoder.max_beam_size = 1
        encoder.cp.min_points_per_centroid = 1  # FAISS warns of small tables line by line
        encoder.train(values_VD)
        decoded_VD = torch.from_numpy(encoder.decode(encoder.compute_codes(values_VD)))
        return ReadyTable(decoded_VD.to(table_VD), **layout)

    return make
