"""Compositional codes (DCCL): a word is a short code, its vector the sum of the code-book entries
it names.

Shu and Nakayama, "Compressing Word Embeddings via Deep Compositional Code Learning", ICLR 2018
(1711.01068). With M codebooks A_i of K vectors each, E'(w) = Σ_i A_i[C_w^i]; codes and codebooks
minimise ½||E'(w) - E(w)||². Matches embedding tables, tied heads included. Stored: codes packed at
M·⌈log2 K⌉ bits a row (rounded up to a byte) and the codebooks (M·K, D) in the model's dtype. The
dense table is never built: a lookup sums M gathered vectors, a tied head multiplies by the
codebooks (M·K·D multiply-adds) and sums M gathered products a token.
Shapes: V rows, D dimensions, M codebooks, K codewords, B packed bytes, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import Hard, Layout, Miss, Objective, Pass, Site, Soft
from plmcc.passes._autoencoder import CodeAutoencoder, fit_autoencoder
from plmcc.passes._bits import bits_for, pack, row_bytes, unpack
from plmcc.passes._residual import decode, residual_quantise
from plmcc.program import Program
from plmcc.progress import Progress


class CompositionalCodes(Pass):
    """Replace an embedding table by codes and codebooks: each row becomes a sum of shared
    vectors."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Shu and Nakayama, ICLR 2018, arXiv:1711.01068"
    hazards: ClassVar[tuple[str, ...]] = (
        "Without training afterwards the model loses quality; distil it in a `train` section.",
        "The table gets smaller, not the computation: expect the same latency.",
    )

    targets: str | list[str] = "input_embeddings"
    """Which tables; a table tied to the output head takes the head along."""
    codebooks: int = Field(32, ge=1, le=1024)
    """M: codebooks, and so vectors that are summed for a row."""
    codewords: int = Field(16, ge=2, le=65536)
    """K: vectors in each codebook; a code takes ⌈log2 K⌉ bits."""
    initialisation: Literal["residual", "paper"] = "residual"
    """`residual`: residual vector quantisation with beam search. `paper`: the Gumbel-softmax
    autoencoder."""
    beam: int = Field(8, ge=1, le=64)
    """Residual: candidates kept while a row is encoded."""
    rounds: int = Field(3, ge=0, le=100)
    """Residual: rounds of encoding and joint least squares after the first codebooks."""
    epochs: int = Field(200, ge=1)
    """Paper: passes over the vocabulary."""
    batch_size: int = Field(64, ge=1)
    """Paper: words in a step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Paper: of Adam."""
    gradient_clip: float = Field(0.001, gt=0)
    """Paper: largest global norm of the gradient."""
    temperature: float = Field(1.0, gt=0)
    """Paper: τ of the Gumbel-softmax, constant."""
    codebook_learning_rate: float | None = Field(None, gt=0)
    """In training: of the codebooks; by default the trainer's own."""
    seed: int = Field(0, ge=0)
    """Of the k-means, or of the autoencoder's weights, batches and noise."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield embedding tables; a table not larger than its own codes would be is a miss."""
        for found in program.resolve(self.targets, "embedding", self.expect):
            if isinstance(found, Miss):
                yield found
                continue
            rows, dims = found.facts["num_embeddings"], found.facts["embedding_dim"]
            if self.codewords > rows:
                yield Miss(
                    found.path, f"{self.codewords} codewords for a table of only {rows} rows"
                )
            elif self._parameters_and_codes(rows, dims) >= 4 * rows * dims:
                yield Miss(
                    found.path,
                    f"the codes and codebooks would be larger than the {rows} x {dims} table",
                )
            else:
                yield found

    def _parameters_and_codes(self, rows: int, dims: int) -> int:
        width = row_bytes(self.codebooks, bits_for(self.codewords))
        return rows * width + 4 * self.codebooks * self.codewords * dims

    def replace(self, site: Site) -> Soft:
        """Learn codes for the finished table (no task data), then freeze them; codebooks stay
        trainable."""
        table_VD = site.module.weight.detach()  # type: ignore[operator]
        if not torch.isfinite(table_VD).all():
            raise ValueError(f"{site.path}: the table holds values that are not finite")
        fit = _fit_residual if self.initialisation == "residual" else _fit_paper
        with Progress(f"codes for {site.path}") as progress:
            codes_VM, books_MKD = fit(self, table_VD, progress)
        hard = CodedEmbedding(
            num_embeddings=table_VD.shape[0],
            embedding_dim=table_VD.shape[1],
            codebooks=self.codebooks,
            codewords=self.codewords,
            padding_idx=site.facts.get("padding_idx"),
            zero_padding=_padding_is_zero(table_VD, site.facts.get("padding_idx")),
            scale=site.facts.get("scale", 1.0),
        ).to(table_VD.device)
        hard.codes.copy_(pack(codes_VM, bits_for(self.codewords)))
        hard.codebooks = nn.Parameter(books_MKD.flatten(0, 1).to(table_VD.dtype).contiguous())
        return SoftCodes(hard, _reconstruction(table_VD, codes_VM, books_MKD))

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Codes are frozen and codebooks train on the task's own loss, if asked at a rate of their
        own."""
        if self.codebook_learning_rate is None:
            return None
        return CodebookRate(soft, self.codebook_learning_rate)


class CodebookRate(Objective):
    """Adds nothing to the loss; gives the codebooks their own learning rate."""

    name = "codebook_learning_rate"

    def __init__(self, soft: Soft, learning_rate: float) -> None:
        self.soft, self.learning_rate = soft, learning_rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group: the codebooks."""
        return [{"params": list(self.soft.parameters()), "lr": self.learning_rate}]


class SoftCodes(Soft):
    """Frozen codes with trainable codebooks. It computes exactly what its hardened form
    computes."""

    def __init__(self, coded: CodedEmbedding, figures: dict[str, float]) -> None:
        super().__init__()
        self.coded = coded
        self._figures = figures

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) -> rows (..., D)."""
        return self.coded(ids)  # type: ignore[no-any-return]

    def attend(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return self.coded.attend(hidden)

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), built on demand."""
        return self.coded.weight

    def harden(self) -> Hard:
        """Return the coded embedding itself."""
        return self.coded

    def facts(self) -> dict[str, float]:
        """Reconstruction errors after fitting, before any training."""
        return self._figures


class CodedEmbedding(Hard):
    """Packed codes (V, B) uint8 and codebooks (M·K, D); codebook i is rows iK to iK+K-1."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codebooks: int,
        codewords: int,
        padding_idx: int | None = None,
        zero_padding: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.layout: Layout = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "codebooks": codebooks,
            "codewords": codewords,
            "padding_idx": padding_idx,
            "zero_padding": zero_padding,
            "scale": scale,
        }
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.zero_padding, self.scale = padding_idx, zero_padding, scale
        self.num_codebooks, self.codewords, self.bits = codebooks, codewords, bits_for(codewords)
        width = row_bytes(codebooks, self.bits)
        self.register_buffer("codes", torch.zeros(num_embeddings, width, dtype=torch.uint8))
        self.codes: Tensor
        self.codebooks = nn.Parameter(torch.zeros(codebooks * codewords, embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) -> rows (..., D), times the table's own scale."""
        flat_N = ids.reshape(-1)
        rows_ND = self._sum_of(self._entries(self.codes[flat_N]), self.codebooks)
        if self.padding_idx is not None:
            rows_ND = self._keep_padding(rows_ND, flat_N)
        if self.scale != 1.0:
            rows_ND = rows_ND * self.scale
        return rows_ND.view(*ids.shape, self.embedding_dim)

    def attend(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): products with the codebooks, gathered and
        summed."""
        products_PN = self.codebooks @ hidden.reshape(-1, self.embedding_dim).T
        logits_VN = self._sum_of(self._entries(self.codes), products_PN)
        if self.padding_idx is not None and self.zero_padding:
            keep_V = torch.arange(self.num_embeddings, device=hidden.device) != self.padding_idx
            logits_VN = logits_VN * keep_V[:, None]
        return logits_VN.T.reshape(*hidden.shape[:-1], self.num_embeddings)

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), built on demand; without the scale, as in the original module."""
        rows_VD = self._sum_of(self._entries(self.codes), self.codebooks)
        if self.padding_idx is None:
            return rows_VD
        return self._keep_padding(rows_VD, torch.arange(self.num_embeddings, device=rows_VD.device))

    def _entries(self, packed_NB: Tensor) -> Tensor:
        """Codebook rows (N, M) named by packed codes."""
        offsets = torch.arange(self.num_codebooks, device=packed_NB.device) * self.codewords
        return unpack(packed_NB, self.num_codebooks, self.bits) + offsets

    def _sum_of(self, entries_NM: Tensor, vectors_PX: Tensor) -> Tensor:
        return F.embedding_bag(entries_NM, vectors_PX, mode="sum")

    def _keep_padding(self, rows_ND: Tensor, ids_N: Tensor) -> Tensor:
        """As nn.Embedding does: no gradient through the padding row; a zero row stays zero."""
        assert self.padding_idx is not None
        padding_N1 = ids_N.eq(self.padding_idx)[:, None]
        fixed = torch.zeros_like(rows_ND) if self.zero_padding else rows_ND.detach()
        return torch.where(padding_N1, fixed, rows_ND)

    def ideal_bits(self) -> int:
        """|V|·M·⌈log2 K⌉ + 32·M·K·D, the paper's count (float32 codebooks)."""
        codes = self.num_embeddings * self.num_codebooks * self.bits
        return codes + 32 * self.num_codebooks * self.codewords * self.embedding_dim


def _fit_residual(
    options: CompositionalCodes, table_VD: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    return residual_quantise(
        table_VD,
        options.codebooks,
        options.codewords,
        options.beam,
        options.rounds,
        options.seed,
        progress.step,
    )


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


def _padding_is_zero(table_VD: Tensor, padding_idx: int | None) -> bool:
    return padding_idx is not None and not table_VD[padding_idx].any()


def _reconstruction(table_VD: Tensor, codes_VM: Tensor, books_MKD: Tensor) -> dict[str, float]:
    """½||ŷ - x||² and ||ŷ - x|| averaged over rows, the error relative to the table's variance,
    codes in use."""
    squares, distances, spread = 0.0, 0.0, 0.0
    mean_D = table_VD.float().mean(0)
    for rows, codes in zip(table_VD.split(8192), codes_VM.split(8192), strict=True):
        error_N = (decode(codes, books_MKD) - rows.float()).square().sum(-1)
        squares, distances = squares + float(error_N.sum()), distances + float(error_N.sqrt().sum())
        spread += float((rows.float() - mean_D).square().sum())
    used = sum(int(column.unique().numel()) for column in codes_VM.T) / (
        codes_VM.shape[1] * books_MKD.shape[1]
    )
    count = len(table_VD)
    return {
        "reconstruction_loss": squares / count / 2,
        "mean_distance": distances / count,
        "relative_error": squares / max(spread, 1e-30),
        "codewords_used": used,
    }
