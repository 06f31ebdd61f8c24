"""Near-lossless binarization (NLB): a word is a string of bits, its vector what one small layer
makes of them.

Tissier, Gravier and Habrard, "Near-lossless Binarization of Word Embeddings", AAAI 2019
(1803.09065). b = h(W x) with the Heaviside function, ŷ = f(Wᵀb + c) with f = tanh, learned from
||x - ŷ||² and λ ½||WᵀW - I||²; W has no gradient through b, which is why encoder and decoder are
tied. The paper keeps the bits alone; a layer of a language model has to give vectors back, so the
decoder is kept too. tanh ends at 1 and the method needs values near it, which tables of language
models are not: rows are divided by three times the table's standard deviation, and multiplied again
on the way out. Matches embedding tables, tied heads included. Stored: n bits a row (rounded up to a
byte), W (n, D) and c (D,) in the model's dtype. The dense table is never built: a lookup decodes
its rows, a tied head decodes the vocabulary in tiles, or without an activation multiplies by W and
then by bits, exactly.
Shapes: V rows, D dimensions, n bits, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from plmcc.api import Miss, Objective, Pass, Planned, Program, Site, Soft, TableSite, refuse_unused
from plmcc.kit import Progress, Trainable
from plmcc.kit.tables import (
    CompressedTable,
    LearningRate,
    common_layout,
    matched_tables,
    reconstruction,
    table_of,
    weights_of,
)
from plmcc.passes._shared.binarize import ACTIVATIONS, Binarizer, codes_of, similarity_kept
from plmcc.passes._shared.bits import pack, row_bytes, unpack_bits

_TILE = 4096
"""Rows that a tied head decodes at once."""
_DEVIATIONS = 3.0
"""Standard deviations of the table's values that fit into the range of tanh."""


class BinaryEmbedding(Pass):
    """Replace an embedding table by binary codes and the layer that turns them into vectors."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Tissier, Gravier and Habrard, AAAI 2019, arXiv:1803.09065"
    hazards: ClassVar[tuple[str, ...]] = (
        "Without training afterwards the model loses quality; distill it in a `train` section.",
        "Similarity of codes is kept better than the vectors themselves.",
        "A tied head decodes the whole vocabulary for each call, unless `activation` is none.",
    )

    targets: str | list[str] = "input_embeddings"
    """The embedding tables to replace, each with the output head tied to it."""
    bits: int = Field(256, ge=1, le=65536)
    """n: bits of a code; any number."""
    preset: Literal["paper", "official"] = "paper"
    """`paper`: the paper's loss, shuffled, by Adam. `official`: the authors' program, step by
    step."""
    activation: Literal["tanh", "hard_tanh", "none"] | None = None
    """f; by default tanh, or hard_tanh for the program. `none` makes a tied head two products."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the vocabulary; by default 20, or 5 for the program."""
    batch_size: int | None = Field(None, ge=1)
    """Rows in a step; by default 75, or a thousandth of the table if that is more."""
    learning_rate: float = Field(0.001, gt=0)
    """Learning rate of W and c while the codes are learned."""
    regularization: float = Field(1.0, ge=0)
    """λ: weight of the orthogonality loss beside the reconstruction loss."""
    frequency_power: float = Field(0.5, ge=0, le=1)
    """Paper: the loss of a row whose token the training data has n times is multiplied by
    (1 + n)^power; 0 weighs all alike, as does a recipe without `train`."""
    decoder_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the decoder in training; by default that of the Trainer."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights and the batches; `official` has its own."""

    @model_validator(mode="after")
    def _official_decides(self) -> BinaryEmbedding:
        free = self.preset != "official"
        used = {"seed": free, "frequency_power": free}
        refuse_unused(self, used, "with preset `official`")
        return self

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield embedding tables; a table not larger than its own codes would be is a miss."""
        yield from matched_tables(program, self.targets, self.expect, self._refusal)

    def _refusal(self, rows: int, dims: int) -> str:
        if rows * row_bytes(self.bits, 1) + 4 * dims * (self.bits + 1) >= 4 * rows * dims:
            return (
                f"{self.bits} bits a row and the decoder would be larger than the "
                f"{rows} x {dims} table"
            )
        return ""

    def plan(self, site: Site) -> Planned:
        """The codes' size is known beforehand."""
        assert isinstance(site, TableSite)
        activation = self._binarizer(site.num_embeddings).activation
        module = BinaryCodedEmbedding(
            **common_layout(site), bits=self.bits, activation=activation, span=1.0
        )
        return Planned(module)

    def replace(self, site: Site, program: Program) -> Soft:
        """Learn codes for the finished table (no task data), then freeze them; the decoder stays
        trainable."""
        assert isinstance(site, TableSite)
        table_VD = table_of(site)
        binarizer = self._binarizer(len(table_VD))
        span = _DEVIATIONS * float(table_VD.float().square().mean().sqrt()) or 1.0
        x_VD = table_VD.float() / span
        if binarizer.activation != "none":
            x_VD.clamp_(-1, 1)
        with Progress(f"codes for {site.path}") as progress:
            weights_V = weights_of(site, self.frequency_power)
            tick = partial(progress.step, "binarize")
            weight_nD, bias_D = binarizer.fit(x_VD, tick, weights_V)
        codes_Vn = codes_of(x_VD, weight_nD)
        hard = BinaryCodedEmbedding(
            **common_layout(site), bits=self.bits, activation=binarizer.activation, span=span
        ).to(table_VD.device)
        hard.codes.copy_(pack(codes_Vn, 1))
        hard.decoder = nn.Parameter(weight_nD.to(table_VD.dtype).contiguous())
        hard.bias = nn.Parameter(bias_D.to(table_VD.dtype).contiguous())
        metrics = reconstruction(table_VD, hard.rows) | {
            "ones": float(codes_Vn.float().mean()),
            "distinct_codes": len(np.unique(hard.codes.cpu().numpy(), axis=0)) / len(codes_Vn),
            "similarity": similarity_kept(table_VD, codes_Vn),
        }
        return Trainable(hard, metrics)

    def _binarizer(self, rows: int) -> Binarizer:
        # A thousand steps an epoch are enough, and the work of a step does not all grow with it.
        usual = 75 if self.preset == "official" else max(75, rows // 1000)
        official = self.preset == "official"
        return Binarizer(
            bits=self.bits,
            activation=self.activation or ("hard_tanh" if official else "tanh"),
            official=official,
            epochs=self.epochs or (5 if official else 20),
            batch_size=self.batch_size or usual,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            seed=self.seed,
        )

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Codes are frozen and the decoder trains on the task's own loss, if asked at a rate of
        its own."""
        rate = self.decoder_learning_rate
        return None if rate is None else LearningRate(soft, rate)


class BinaryCodedEmbedding(CompressedTable):
    """Packed codes (V, ⌈n/8⌉) uint8, decoder (n, D) and bias (D,): rows are span·f(Wᵀb + c)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        activation: str,
        span: float,
        padding_idx: int | None = None,
        zero_padding: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            zero_padding,
            scale,
            bits=bits,
            activation=activation,
            span=span,
        )
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation {activation!r}: {', '.join(ACTIVATIONS)}")
        self.bits, self.activation, self.span = bits, activation, span
        width = row_bytes(bits, 1)
        self.register_buffer("codes", torch.zeros(num_embeddings, width, dtype=torch.uint8))
        self.codes: Tensor
        self.decoder = nn.Parameter(torch.zeros(bits, embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim))

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D), decoded from their bits."""
        return self._activated(self.codes[ids_N]) * self.span

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V), by tiles of the vocabulary."""
        tiles = self.codes.split(_TILE)
        hidden_ND = hidden_ND * self.span  # here, where it is smaller than the table
        if self.activation != "none":
            return torch.cat([hidden_ND @ self._activated(tile).T for tile in tiles], -1)
        with_bits_Nn = hidden_ND @ self.decoder.T
        with_bias_N1 = (hidden_ND @ self.bias)[:, None]
        products = [torch.addmm(with_bias_N1, with_bits_Nn, self._bits(tile).T) for tile in tiles]
        return torch.cat(products, -1)

    def _activated(self, packed_NB: Tensor) -> Tensor:
        inner_ND = torch.addmm(self.bias, self._bits(packed_NB), self.decoder)
        return ACTIVATIONS[self.activation](inner_ND)

    def _bits(self, packed_NB: Tensor) -> Tensor:
        return unpack_bits(packed_NB, self.bits, self.decoder.dtype)

    def binary_codes(self) -> tuple[Tensor, int]:
        """The packed codes (V, ⌈n/8⌉) uint8, and n."""
        return self.codes, self.bits

    def ideal_bits(self) -> int:
        """|V|·n + 32·D·(n + 1): the paper's bits, and a float32 decoder."""
        return self.num_embeddings * self.bits + 32 * self.embedding_dim * (self.bits + 1)
