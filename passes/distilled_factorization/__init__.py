"""Distilled embedding (DNND, funneling decomposition): a table as the product of a non-negative and
a free factor.

Lioutas et al., "Improving Word Embedding Factorization for Compression Using Distilled Nonlinear
Neural Decomposition", Findings of EMNLP 2020 (1910.06720). Ẽ = ReLU(U) Vᵀ of rank r. Three steps:
train the model with its dense table (a pretrained model is that, or an earlier stage); fit U and V
to the table by L_e = (1/|V|) Σ ||e - ẽ||² alone; fine-tune everything by α L_y + (1 - α) L_e, where
L_y is the rest of the training loss. Matches embedding tables, tied heads included: the same
factors look up and multiply. The ReLU is on a parameter, so it is folded away at the end, and what
is left is a semi-non-negative factorization, no better than an SVD of rank r but for what it
learns. Stored: ReLU(U) (V, r), and Vᵀ (r, D) in the model's dtype. An entry of U that is not
positive has no gradient and stays where it is: their number is logged. The dense table is never
built: a lookup is a thin product, a tied head two.
Shapes: V rows, D dimensions, rank r, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from plmcc.api import (
    Hard,
    Miss,
    Objective,
    Pass,
    Planned,
    Program,
    Site,
    Soft,
    TableSite,
    Values,
    refuse_unused,
)
from plmcc.kit import Progress, check_counts
from plmcc.kit.tables import (
    CompressedTable,
    Table,
    common_layout,
    matched_tables,
    reconstruction,
    table_of,
)
from plmcc.passes._shared.bits import unpack
from plmcc.passes.distilled_factorization.factors import (
    embedding_loss,
    fit_factors,
    from_bitmask,
    quantized,
    random_factors,
    shifted_factors,
    svd_factors,
    to_bitmask,
)


class DistilledFactorization(Pass):
    """Replace an embedding table by two thin factors, one of them not negative, kept near the
    original table while the model trains."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Lioutas et al., Findings of EMNLP 2020, arXiv:1910.06720"
    hazards: ClassVar[tuple[str, ...]] = (
        "Without training afterwards it is no better than a truncated SVD of the same rank.",
        "Entries of the non-negative factor that become zero do not come back.",
    )

    targets: str | list[str] = "input_embeddings"
    """The embedding tables to replace, each with the output head tied to it."""
    rank: int = Field(64, ge=1)
    """r: columns of the factors."""
    alpha: float = Field(0.5, ge=0, le=1)
    """α: weight of the training loss; 1 - α is the weight of the distance to the original table."""
    initialization: Literal["shifted_svd", "paper", "random"] = "shifted_svd"
    """`paper`: an SVD whose negative half the ReLU cuts off. `shifted_svd`: nothing is cut off."""
    fit_steps: int = Field(200, ge=0)
    """Steps of Adam on the table alone before any training; each sees the whole table."""
    fit_learning_rate: float = Field(0.005, gt=0)
    """Learning rate of these steps, relative to the table's values."""
    storage: Literal["dense", "sparse", "uint8"] = "dense"
    """How the non-negative factor is stored: dense, without zeros, or in 256 levels per column."""
    seed: int = Field(0, ge=0)
    """Seed of the random initialization."""

    @model_validator(mode="after")
    def _seed_has_effect(self) -> DistilledFactorization:
        used = {"seed": self.initialization == "random"}
        refuse_unused(self, used, "unless `initialization` is `random`")
        return self

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield embedding tables, with a warning where the factors would be no smaller; a table
        with fewer rows or dimensions than the rank is a miss."""
        yield from matched_tables(program, self.targets, self.expect, self._refusal, self._warning)

    def _refusal(self, rows: int, dims: int) -> str:
        largest = min(rows, dims)
        if self.rank > largest:
            return f"rank {self.rank} is above {largest}, the maximum of a {rows} x {dims} table"
        return ""

    def _warning(self, rows: int, dims: int) -> str:
        width = 1 if self.storage == "uint8" else 4
        break_even = -(-4 * rows * dims // (width * rows + 4 * dims)) - 1
        if self.rank > break_even:
            return (
                f"rank {self.rank} is above {break_even}, the largest that makes the "
                f"{rows} x {dims} table smaller"
            )
        return ""

    def plan(self, site: Site) -> Planned:
        """The factors' size is known beforehand, but for how many zeros a sparse one leaves out."""
        assert isinstance(site, TableSite)
        table_VD = table_of(site)
        sparse, entries = self.storage == "sparse", len(table_VD) * self.rank
        about = "at most: how many entries of the factor become zero is learned" if sparse else ""
        module = FactorizedEmbedding(
            **common_layout(site),
            rank=self.rank,
            storage=self.storage,
            values=entries if sparse else 0,
        )
        # The factor trains as it is, whatever it is stored in, and beside it stands the original.
        trained = entries if self.storage == "uint8" else 0
        return Planned(module, about, trained, table_VD.nbytes)

    def replace(self, site: Site, program: Program) -> Soft:
        """Fit the factors to the table (the paper's second step)."""
        assert isinstance(site, TableSite)
        table_VD = table_of(site)
        with Progress(f"factors of {site.path}") as progress:
            factor_Vr, basis_rD = fit_factors(
                table_VD,
                self._start(table_VD),
                self.fit_steps,
                self.fit_learning_rate,
                lambda done: progress.step("fit", done),
            )
        layout = common_layout(site) | {"rank": self.rank, "storage": self.storage}
        return SoftFactors(layout, factor_Vr.to(table_VD.dtype), basis_rD.to(table_VD), table_VD)

    def _start(self, table_VD: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialization == "random":
            return random_factors(table_VD, self.rank, self.seed)
        start = shifted_factors if self.initialization == "shifted_svd" else svd_factors
        return start(table_VD, self.rank)

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """The paper's third step: α of the training loss, 1 - α of the distance to the table."""
        assert isinstance(soft, SoftFactors)
        return DistilledTable(soft, table_of(site), self.alpha)


class DistilledTable(Objective):
    """(1 - α) L_e, in the place of as much of the training loss; counts dead entries."""

    name = "distilled_table"

    def __init__(self, soft: SoftFactors, table_VD: Tensor, alpha: float) -> None:
        self.soft, self.table_VD, self.loss_weight = soft, table_VD, 1 - alpha
        self._last: Tensor | None = None

    def loss(
        self, batch: dict[str, Tensor], output: object, teacher: object | None
    ) -> Tensor | None:
        """(1 - α) (1/|V|) Σ ||e - ẽ||², in float32 under autocast too."""
        if self.loss_weight == 0:
            return None
        device = self.soft.factor.device
        self.table_VD = self.table_VD.to(device)
        with torch.autocast(device.type, enabled=False):
            positive_Vr, basis_rD = self.soft.positive().float(), self.soft.basis.float()
            distance = embedding_loss(self.table_VD.float(), positive_Vr, basis_rD)
        self._last = distance.detach()
        return self.loss_weight * distance

    def metrics(self) -> dict[str, float]:
        """Entries that cannot learn any more, and L_e."""
        found = {"dead_entries": float(self.soft.dead_entries())}
        return found if self._last is None else found | {"table_distance": float(self._last)}


class SoftFactors(Table, Soft):
    """U (V, r) and Vᵀ (r, D), both trainable: rows are ReLU(U) Vᵀ.

    What will be stored in 8 bits is rounded already, with the gradient of the identity.
    """

    def __init__(
        self, layout: Values, factor_Vr: Tensor, basis_rD: Tensor, table_VD: Tensor
    ) -> None:
        super().__init__(**layout)
        self.storage = layout["storage"]
        self.factor = nn.Parameter(factor_Vr.contiguous())
        self.basis = nn.Parameter(basis_rD.contiguous())
        self._metrics = reconstruction(table_VD, self.rows)
        self._metrics["dead_entries"] = float(self.dead_entries())

    def positive(self) -> Tensor:
        """ReLU(U) (V, r)."""
        positive_Vr = self.factor.relu()
        if self.storage != "uint8":
            return positive_Vr
        levels_Vr, steps_r = quantized(positive_Vr.detach())
        return positive_Vr + (levels_Vr * steps_r - positive_Vr).detach()

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D)."""
        if self.storage == "uint8":
            return self.positive()[ids_N] @ self.basis
        return self.factor[ids_N].relu() @ self.basis

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V): with Vᵀ, then with ReLU(U)."""
        return hidden_ND @ self.basis.T @ self.positive().T

    def dead_entries(self) -> int:
        """How many entries of U have no gradient."""
        return int((self.factor <= 0).sum())

    def harden(self) -> Hard:
        """Fold the ReLU into the factor, and the steps of 8-bit columns into Vᵀ."""
        positive_Vr, basis_rD = self.factor.detach().relu(), self.basis.detach().clone()
        layout: Values = dict(self.layout)
        parts: dict[str, Tensor] = {"factor": positive_Vr}
        if self.storage == "uint8":
            levels_Vr, steps_r = quantized(positive_Vr)
            parts = {"factor": levels_Vr.to(torch.uint8)}
            basis_rD = basis_rD * steps_r[:, None]
        elif self.storage == "sparse":
            parts = dict(zip(("mask", "starts", "values"), to_bitmask(positive_Vr), strict=True))
            layout["values"] = len(parts["values"])
        hard = FactorizedEmbedding(**layout).to(basis_rD.device, basis_rD.dtype)
        hard.load_state_dict({"basis": basis_rD, **parts})
        return hard

    def statistics(self) -> dict[str, float]:
        """Reconstruction errors and dead entries after fitting, before any training."""
        return self._metrics


class FactorizedEmbedding(CompressedTable):
    """A non-negative factor (V, r) and a basis (r, D): rows are their product.

    The factor is a parameter (`dense`), uint8 levels whose steps are in the basis (`uint8`), or a
    bit for every entry, where each row begins, and the entries that are not zero (`sparse`).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        storage: str,
        values: int = 0,
        padding_idx: int | None = None,
        zero_padding: bool = False,
        scale: float = 1.0,
    ) -> None:
        own: Values = {"rank": rank, "storage": storage}
        own |= {"values": values} if storage == "sparse" else {}
        super().__init__(num_embeddings, embedding_dim, padding_idx, zero_padding, scale, **own)
        self.rank, self.storage = rank, storage
        if storage == "dense":
            self.factor: Tensor = nn.Parameter(torch.zeros(num_embeddings, rank))
        elif storage == "uint8":
            self.register_buffer("factor", torch.zeros(num_embeddings, rank, dtype=torch.uint8))
        elif storage == "sparse":
            width = (rank + 7) // 8
            self.register_buffer("mask", torch.zeros(num_embeddings, width, dtype=torch.uint8))
            self.register_buffer("starts", torch.zeros(num_embeddings, dtype=torch.int32))
            self.values = nn.Parameter(torch.zeros(values))
        else:
            raise ValueError(f"no storage {storage!r}: dense, sparse, uint8")
        self.mask: Tensor
        self.starts: Tensor
        self.basis = nn.Parameter(torch.zeros(rank, embedding_dim))

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D): a thin product."""
        return self._factor(ids_N) @ self.basis

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V): two thin products."""
        return hidden_ND @ self.basis.T @ self._factor(slice(None)).T

    def check_loaded(self) -> None:
        """Check that each row begins where the one before ends."""
        if self.storage == "sparse":
            counts_V = unpack(self.mask, self.rank, 1).sum(1)
            ends_V = counts_V.cumsum(0)
            check_counts("starts", self.starts, ends_V - counts_V)
            check_counts("mask", ends_V[-1:].clamp(min=1), ends_V.new_tensor([len(self.values)]))

    def _factor(self, ids: Tensor | slice) -> Tensor:
        """Rows (N, r) of the factor in the basis's dtype."""
        if self.storage == "sparse":
            return from_bitmask(self.mask[ids], self.starts[ids], self.values, self.rank)
        return self.factor[ids].to(self.basis.dtype)

    def ideal_bits(self) -> int:
        """32·r·(|V| + D): the paper's count."""
        return 32 * self.rank * (self.num_embeddings + self.embedding_dim)
