"""Compositional codes (DCCL): a word is a short code, its vector the sum of the codebook entries
it names.

Shu and Nakayama, "Compressing Word Embeddings via Deep Compositional Code Learning", ICLR 2018
(1711.01068). With M codebooks A_i of K vectors each, E'(w) = Σ_i A_i[C_w^i]; codes and codebooks
minimize ½||E'(w) - E(w)||². Matches embedding tables, tied heads included. Stored: codes packed at
M·⌈log2 K⌉ bits a row (rounded up to a byte) and the codebooks (M·K, D) in the model's dtype. With
the initialization `product` the M vectors stand side by side instead of being summed, as in product
quantization (and Chen, Li and Sun, "Differentiable Product Quantization for End-to-End Embedding
Compression", ICML 2020, 1908.09756): codebooks are (M·K, D/M), so that the same bytes buy more
codes. The dense table is never built: a lookup gathers M vectors, a tied head multiplies by the
codebooks (M·K·W multiply-adds) and sums M gathered products a token.
Shapes: V rows, D dimensions, M codebooks, K codewords of W dimensions, B packed bytes, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import Miss, Objective, Pass, Planned, Program, Site, Soft, TableSite, refuse_unused
from plmcc.kit import Progress, Trainable, check_range
from plmcc.kit.tables import (
    CompressedTable,
    LearningRate,
    common_layout,
    matched_tables,
    reconstruction,
    table_of,
    weights_of,
)
from plmcc.passes._shared.bits import bits_for, pack, row_bytes, unpack
from plmcc.passes.compositional_codes.autoencoder import CodeAutoencoder, fit_autoencoder
from plmcc.passes.compositional_codes.product import product_quantize
from plmcc.passes.compositional_codes.residual import residual_quantize

_PART = 4096  # rows that are looked at together
_ONE_HOT = 32  # codewords of a book, up to which exported programs multiply with ones


class CompositionalCodes(Pass):
    """Replace an embedding table by codes and codebooks: each row becomes a sum of shared
    vectors."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Shu and Nakayama, ICLR 2018, arXiv:1711.01068"
    hazards: ClassVar[tuple[str, ...]] = (
        "Without training afterwards the model loses quality; distill it in a `train` section.",
        "The table gets smaller, not the computation: expect the same latency.",
    )

    targets: str | list[str] = "input_embeddings"
    """The embedding tables to replace, each with the output head tied to it."""
    codebooks: int = Field(32, ge=1, le=1024)
    """M: number of codebooks, and of vectors that are summed for a row."""
    width: int | None = Field(None, ge=1)
    """Product: dimensions of a codeword, instead of `codebooks`: D / width of them, for any D."""
    codewords: int = Field(16, ge=2, le=65536)
    """K: vectors in each codebook; a code takes ⌈log2 K⌉ bits."""
    initialization: Literal["residual", "paper", "product"] = "residual"
    """`residual`: residual vector quantization with beam search. `paper`: the Gumbel-softmax
    autoencoder. `product`: product quantization; vectors are concatenated, not summed."""
    beam: int = Field(8, ge=1, le=64)
    """Residual: beam width while a row is encoded."""
    rounds: int = Field(3, ge=0, le=100)
    """Residual: rounds of encoding and joint least squares after the first codebooks."""
    frequency_power: float = Field(0.5, ge=0, le=1)
    """Residual and product: a row whose token the training data has n times weighs (1 + n)^power;
    0 weighs all alike, as does a recipe without `train`."""
    epochs: int = Field(200, ge=1)
    """Paper: passes over the vocabulary."""
    batch_size: int = Field(64, ge=1)
    """Paper: words in a batch."""
    learning_rate: float = Field(1e-4, gt=0)
    """Paper: learning rate of Adam."""
    gradient_clip: float = Field(0.001, gt=0)
    """Paper: maximum global norm of the gradient."""
    temperature: float = Field(1.0, gt=0)
    """Paper: τ of the Gumbel-softmax, constant."""
    codebook_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the codebooks in training; by default that of the Trainer."""
    seed: int = Field(0, ge=0)
    """Seed of the k-means, or of the autoencoder's weights, batches and noise."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> CompositionalCodes:
        product, paper = self.initialization == "product", self.initialization == "paper"
        used = {"beam": not product, "rounds": not product, "frequency_power": not paper}
        refuse_unused(
            self, used | {"width": product}, f"with initialization `{self.initialization}`"
        )
        refuse_unused(self, {"codebooks": self.width is None}, "with `width`")
        return self

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield embedding tables; a table not larger than its own codes would be is a miss."""
        yield from matched_tables(program, self.targets, self.expect, self._refusal)

    def _refusal(self, rows: int, dims: int) -> str:
        if self.codewords > rows:
            return f"{self.codewords} codewords for a table of only {rows} rows"
        given = self.codebooks if self.width is None else self.width
        if self.initialization == "product" and dims % given:
            fit = [m for m in range(1, dims + 1) if dims % m == 0]
            near = sorted(sorted(fit, key=lambda m: abs(m - given))[:2])
            which = " or ".join(map(str, near))
            plain = "codebooks do" if self.width is None else "as `width` does"
            return f"{given} {plain} not divide its {dims} dimensions: {which} do"
        if self._parameters_and_codes(rows, dims) >= 4 * rows * dims:
            return f"the codes and codebooks would be larger than the {rows} x {dims} table"
        return ""

    def _books(self, dims: int) -> int:
        return self.codebooks if self.width is None else dims // self.width

    def _parameters_and_codes(self, rows: int, dims: int) -> int:
        codes = row_bytes(self._books(dims), bits_for(self.codewords))
        return rows * codes + 4 * self._books(dims) * self.codewords * self._width(dims)

    def _width(self, dims: int) -> int:
        return dims // self._books(dims) if self.initialization == "product" else dims

    def plan(self, site: Site) -> Planned:
        """The codes' size is known beforehand."""
        assert isinstance(site, TableSite)
        return Planned(self._empty(site))

    def _empty(self, site: TableSite) -> CodedEmbedding:
        layout = common_layout(site)
        dims = layout["embedding_dim"]
        books, width = self._books(dims), self._width(dims)
        return CodedEmbedding(**layout, codebooks=books, codewords=self.codewords, width=width)

    def replace(self, site: Site, program: Program) -> Soft:
        """Learn codes for the finished table (no task data), then freeze them; codebooks stay
        trainable."""
        assert isinstance(site, TableSite)
        table_VD = table_of(site)
        with Progress(f"codes for {site.path}") as progress:
            codes_VM, books_MKW = self._fit(site, table_VD, progress)
        hard = self._empty(site).to(table_VD.device)
        hard.codes.copy_(pack(codes_VM, bits_for(self.codewords)))
        hard.codebooks = nn.Parameter(books_MKW.flatten(0, 1).to(table_VD.dtype).contiguous())
        metrics = reconstruction(table_VD, hard.rows)
        used = sum(int(column.unique().numel()) for column in codes_VM.T)
        metrics["codewords_used"] = used / (hard.num_codebooks * self.codewords)
        return Trainable(hard, metrics)

    def _fit(self, site: TableSite, table_VD: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        if self.initialization == "paper":
            return _fit_paper(self, table_VD, progress)
        books = self._books(site.embedding_dim)
        given = (table_VD, weights_of(site, self.frequency_power), books, self.codewords)
        if self.initialization == "product":
            return product_quantize(*given, self.seed, progress.step)
        return residual_quantize(*given, self.beam, self.rounds, self.seed, progress.step)

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Codes are frozen and codebooks train on the task's own loss, if asked at a rate of their
        own."""
        rate = self.codebook_learning_rate
        return None if rate is None else LearningRate(soft, rate)


class CodedEmbedding(CompressedTable):
    """Packed codes (V, B) uint8 and codebooks (M·K, W); codebook i is rows iK to iK+K-1.

    Codewords are as wide as the table and summed, or as wide as its M-th part and put side by side.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codebooks: int,
        codewords: int,
        padding_idx: int | None = None,
        zero_padding: bool = False,
        scale: float = 1.0,
        width: int | None = None,
    ) -> None:
        width = embedding_dim if width is None else width
        if codebooks < 1:
            raise ValueError(f"{codebooks} codebooks")
        if width not in (embedding_dim, embedding_dim // codebooks):
            raise ValueError(f"codeword width {width} does not fit the table width {embedding_dim}")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            zero_padding,
            scale,
            codebooks=codebooks,
            codewords=codewords,
            width=width,
        )
        self.summed = width == embedding_dim
        self.num_codebooks, self.codewords, self.bits = codebooks, codewords, bits_for(codewords)
        packed = row_bytes(codebooks, self.bits)
        self.register_buffer("codes", torch.zeros(num_embeddings, packed, dtype=torch.uint8))
        self.codes: Tensor
        self.codebooks = nn.Parameter(torch.zeros(codebooks * codewords, width))

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D): the vectors that codes name, summed or side by side."""
        entries_NM = self._entries(self.codes[ids_N])
        if self.summed and torch.compiler.is_exporting() and self.codewords <= _ONE_HOT:
            # Other runtimes have no embedding bag; sums of gathered rows would take M times the
            # memory of the result, and products with ones at the codes take little time.
            places_P = torch.arange(len(self.codebooks), device=entries_NM.device)
            ones_NMK = entries_NM[..., None] == places_P.view(self.num_codebooks, -1)
            return ones_NMK.flatten(1).to(self.codebooks.dtype) @ self.codebooks
        if self.summed:
            return self._sum_of(entries_NM, self.codebooks)
        return self.codebooks[entries_NM].flatten(1)

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V): with the codebooks, gathered and summed."""
        if self.summed:
            products_PN = self.codebooks @ hidden_ND.T
        else:
            books_MKW = self.codebooks.view(self.num_codebooks, self.codewords, -1)
            parts_MWN = hidden_ND.T.unflatten(0, (self.num_codebooks, -1))
            products_PN = (books_MKW @ parts_MWN).flatten(0, 1)
        return self._sum_of(self._entries(self.codes), products_PN).T

    def check_loaded(self) -> None:
        """Check that each code names a codeword."""
        if self.codewords < 2**self.bits:
            for packed_NB in self.codes.split(_PART):
                codes_NM = unpack(packed_NB, self.num_codebooks, self.bits)
                check_range("codes", codes_NM, self.codewords)

    def _entries(self, packed_NB: Tensor) -> Tensor:
        """Codebook rows (N, M) named by packed codes."""
        offsets = torch.arange(self.num_codebooks, device=packed_NB.device) * self.codewords
        return unpack(packed_NB, self.num_codebooks, self.bits) + offsets

    def _sum_of(self, entries_NM: Tensor, vectors_PX: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return vectors_PX[entries_NM].sum(1)
        return F.embedding_bag(entries_NM, vectors_PX, mode="sum")

    def ideal_bits(self) -> int:
        """|V|·M·⌈log2 K⌉ + 32·M·K·W, the paper's count (float32 codebooks)."""
        codes = self.num_embeddings * self.num_codebooks * self.bits
        return codes + 32 * self.codebooks.numel()


def _fit_paper(
    options: CompositionalCodes, table_VD: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Train the autoencoder over the shuffled vocabulary and keep the best state by held-out
    loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = CodeAutoencoder(
            table_VD.shape[1], options.codebooks, options.codewords, options.temperature
        ).to(table_VD.device)
        fit_autoencoder(model, table_VD, options, progress)
    return model.export(table_VD)
