"""Adaptive codes (AdaComp): words that matter to the task get longer binary codes.

Kim, Kim and Lee, "Adaptive Compression of Word Embeddings", ACL 2020. From its abstract: each word
learns, through Gumbel-softmax and with the task, which of N codebooks of different sizes it uses,
and so the length of its code; then, with lengths fixed, it learns discrete codes through a network
with a binary constraint. Reconstructed from the abstract and a review, not read in the paper:
everything else. C_i (l_i, D) is a codebook and its own encoder (tied); e are rows of the original
table, z = round(σ(C_i e)) with a straight-through gradient, e' = Σ_i y_i (C_iᵀ z + c_i) with
y = softmax((α_w + G)/τ) and one logit α_w^i for each word and codebook. Losses beside the task's:
the squared error of the reconstruction relative to the rows' mean square, on a sample of the
vocabulary, for all codebooks alike so that only the task moves α; and ||C_i C_iᵀ - I||²/l_i. The
codebooks begin as near-lossless binarization fits them, from which the constant c_i is taken too.
Where lengths have to meet a budget, word w gets the best of α_w^i - λ l_i.
A word that the task never shows has no gradient in α (with a tied head all words have one): it
keeps the shortest code, or with a budget the length that its own reconstruction asks for.
Stored: codebook indices (⌈log2 N⌉ bits a word), the codes grouped by length without gaps, C and c
in the model's dtype; codebooks that no word uses are left out. The dense table is never built: a
lookup reads the bits of its rows, a tied head multiplies group by group.
Shapes: V rows, D dimensions, N codebooks (or tokens, where said), l bits of a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import Hard, Miss, Objective, Pass, Planned, Program, Site, Soft, TableSite, Values
from plmcc.kit import Progress, check_counts, check_range
from plmcc.kit.tables import (
    CompressedTable,
    Table,
    common_layout,
    matched_tables,
    reconstruction,
    table_of,
)
from plmcc.passes._shared.binarize import Binarizer
from plmcc.passes._shared.bits import pack, unpack
from plmcc.passes.adaptive_codes.lengths import (
    choose,
    pack_stream,
    ranks_in_groups,
    read_bits,
    selector_bits,
    unpack_stream,
)
from plmcc.passes.adaptive_codes.training import AdaptiveTraining

_TILE = 4096
"""Rows that a tied head looks at at once."""
_DEVIATIONS = 3.0
"""Standard deviations of the table's values that are the unit of the codebooks."""


class AdaptiveCodes(Pass):
    """Replace an embedding table by binary codes whose length is learned for each word."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Kim, Kim and Lee, ACL 2020, aclanthology.org/2020.acl-main.364"
    hazards: ClassVar[tuple[str, ...]] = (
        "Reconstructed from the paper's abstract: coefficients and schedules are not the paper's.",
        "Without a budget, words that do not occur in the training data get the shortest codes.",
    )

    targets: str | list[str] = "input_embeddings"
    """The embedding tables to replace, each with the output head tied to it."""
    lengths: list[int] = Field([32, 64, 128, 256], min_length=1, max_length=16)
    """l_i: bits of a code in each codebook, in increasing order."""
    bits_per_word: float | None = Field(None, gt=0)
    """Budget: maximum average of the bits per word, including its codebook index."""
    selection: float = Field(0.5, gt=0, lt=1)
    """Fraction of the training in which lengths are learned; then they are fixed."""
    temperature: float = Field(1.0, gt=0)
    """τ of the Gumbel-softmax."""
    reconstruction_weight: float = Field(1.0, ge=0)
    """Loss weight of the table's relative squared error."""
    orthogonality_weight: float = Field(0.01, ge=0)
    """Loss weight of the code vectors' distance from orthogonality."""
    epochs: int = Field(10, ge=1)
    """Passes over the vocabulary that initialize each codebook."""
    selector_learning_rate: float = Field(0.05, gt=0)
    """Learning rate of the logits of the lengths."""
    codebook_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the codebooks in training; by default that of the Trainer."""
    seed: int = Field(0, ge=0)
    """Seed of the initial codebooks and their batches."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> AdaptiveCodes:
        if self.lengths[0] < 1 or sorted(set(self.lengths)) != self.lengths:
            raise ValueError("`lengths` must be positive and increasing")
        least = self.lengths[0] + (len(self.lengths) - 1).bit_length()
        if self.bits_per_word is not None and self.bits_per_word < least:
            raise ValueError(f"`bits_per_word` is below {least}, the size of the shortest codes")
        return self

    def needs_training(self) -> str:
        """With a budget the reconstruction alone gives lengths."""
        if self.bits_per_word is not None or len(self.lengths) == 1:
            return ""
        return "lengths are learned: without training every word gets the shortest code"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield embedding tables; one no larger than its codes and codebooks is a miss."""
        yield from matched_tables(program, self.targets, self.expect, self._refusal)

    def _refusal(self, rows: int, dims: int) -> str:
        if self.lengths[-1] > rows:
            return f"a codebook of {self.lengths[-1]} vectors for a table of only {rows} rows"
        least = rows * (self.lengths[0] + selector_bits(len(self.lengths))) // 8
        if least + 4 * dims * sum(length + 1 for length in self.lengths) >= 4 * rows * dims:
            return f"the codes and codebooks would be larger than the {rows} x {dims} table"
        return ""

    def plan(self, site: Site) -> Planned:
        """How many words have which length is learned: with a budget, the longest codes that it
        allows, else the longest for all."""
        assert isinstance(site, TableSite)
        rows = site.num_embeddings
        shortest, longest = self.lengths[0], self.lengths[-1]
        longer = rows
        if self.bits_per_word is not None and longest > shortest:
            left = self.bits_per_word - selector_bits(len(self.lengths)) - shortest
            longer = min(rows, int(rows * left / (longest - shortest)))
        counts = [0] * len(self.lengths)
        counts[0] += rows - longer
        counts[-1] += longer
        module = AdaptiveEmbedding(**common_layout(site), lengths=self.lengths, counts=counts)
        about = "at most: how long the codes become is learned" if len(counts) > 1 else ""
        table_VD = table_of(site)
        return Planned(module, about, rows * len(counts), table_VD.nbytes)

    def replace(self, site: Site, program: Program) -> Soft:
        """Fit a codebook of each length to the table, all words' lengths undecided."""
        assert isinstance(site, TableSite)
        table_VD = table_of(site)
        span = _DEVIATIONS * float(table_VD.float().square().mean().sqrt()) or 1.0
        books, biases = [], []
        with Progress(f"codebooks for {site.path}") as progress:
            for length in self.lengths:
                binarizer = Binarizer(length, "none", False, self.epochs, 75, 0.001, 1.0, self.seed)
                weight_lD, bias_D = binarizer.fit(
                    table_VD.float() / span, lambda done: progress.step("binarize", done)
                )
                books.append(weight_lD)
                biases.append(bias_D)
        return SoftAdaptive(self, common_layout(site), table_VD, span, books, biases)

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Reconstruction and orthogonality, the clock of the two phases, and learning rates."""
        assert isinstance(soft, SoftAdaptive)
        return AdaptiveTraining(soft, self)


class SoftAdaptive(Table, Soft):
    """Logits (V, N), codebooks (Σ l, D) and constants (N, D) over the frozen original table.

    While lengths are learned, a row in training mode is a mixture of all codebooks; else it is
    what its own codebook makes of it.
    """

    def __init__(
        self,
        options: AdaptiveCodes,
        layout: Values,
        table_VD: Tensor,
        span: float,
        books: list[Tensor],
        biases: list[Tensor],
    ) -> None:
        super().__init__(**layout)
        self.lengths, self.span, self.temperature = options.lengths, span, options.temperature
        budget = options.bits_per_word
        self.mean_budget = budget and budget - selector_bits(len(books))
        self.selected = False
        self.register_buffer("table", table_VD / span, persistent=False)
        self.register_buffer("choice", torch.zeros_like(table_VD[:, 0], dtype=torch.long))
        self.table: Tensor
        self.choice: Tensor
        self.codebooks = nn.Parameter(torch.cat(books).to(table_VD.dtype))
        self.bias = nn.Parameter(torch.stack(biases).to(table_VD.dtype))
        logits_VN = torch.zeros(len(table_VD), len(books), device=table_VD.device)
        if (
            budget is not None
        ):  # bits go where they help the reconstruction, until the task is heard
            logits_VN = -self._errors(torch.arange(len(table_VD), device=table_VD.device))
        self.logits = nn.Parameter(logits_VN)
        self._metrics = reconstruction(table_VD, self._chosen_rows)

    def select(self) -> None:
        """Fix the lengths."""
        if not self.selected:
            self.choice.copy_(self.chosen())
            self.selected = True

    def chosen(self) -> Tensor:
        """The codebook (V,) of each word, within the budget."""
        return self.choice if self.selected else choose(self.logits, self.lengths, self.mean_budget)

    def selection(self, ids_N: Tensor) -> Tensor:
        """y: weights (N tokens, N codebooks) that sum to 1; one-hot but while lengths are
        learned."""
        if self.training and not self.selected:
            return F.gumbel_softmax(self.logits[ids_N], self.temperature)
        weights_NN = F.one_hot(self.chosen()[ids_N], len(self.lengths)).to(self.logits.dtype)
        # Data parallelism waits for the gradient of every parameter, also when lengths are fixed.
        return weights_NN + 0 * self.logits[ids_N] if self.training else weights_NN

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D)."""
        return self._mixed(ids_N, self.selection(ids_N))

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V), by tiles of the vocabulary: with the code vectors and constants, and
        then with codes weighted by selection, and its weights."""
        every_V = torch.arange(self.num_embeddings, device=hidden_ND.device)
        weights_VN = self.selection(every_V).to(hidden_ND.dtype)
        inner_NP = hidden_ND @ torch.cat([self.codebooks, self.bias]).T * self.span
        lengths_N = torch.tensor(self.lengths, device=hidden_ND.device)
        tiles = zip(self.table.split(_TILE), weights_VN.split(_TILE), strict=True)
        parts = []
        for x_ND, weights_NN in tiles:
            weights_Nl = weights_NN.repeat_interleave(lengths_N, 1, output_size=sum(self.lengths))
            codes_Nl = self._codes(x_ND, self.codebooks) * weights_Nl
            parts.append(inner_NP @ torch.cat([codes_Nl, weights_NN], -1).T)
        return torch.cat(parts, -1)

    def distance(self, ids_N: Tensor) -> Tensor:
        """Squared error relative to the mean square of the rows: of all codebooks alike, or of the
        chosen ones."""
        errors_NN = self._errors(ids_N)
        if not self.selected:
            return errors_NN.mean()
        return errors_NN.gather(1, self.choice[ids_N][:, None]).mean()

    def orthogonality(self) -> Tensor:
        """Σ_i ||C_i C_iᵀ - I||²/l_i."""
        grams = [book_lD.float() @ book_lD.float().T for book_lD in self._books()]
        parts = [(g - torch.eye(len(g), device=g.device)).square().sum() / len(g) for g in grams]
        return torch.stack(parts).sum()

    def mean_length(self) -> float:
        """Mean bits of a code."""
        counts = self.chosen().bincount(minlength=len(self.lengths)).tolist()
        total = sum(count * length for count, length in zip(counts, self.lengths, strict=True))
        return float(total / self.num_embeddings)

    def statistics(self) -> dict[str, float]:
        """Reconstruction errors before any training, and lengths as they are."""
        return self._metrics | {"mean_length": self.mean_length()}

    @torch.no_grad()
    def harden(self) -> Hard:
        """Write out the codes, grouped by length; codebooks that no word uses are dropped."""
        choice_V, books = self.chosen(), self._books()
        used = choice_V.unique().tolist()
        locations = [(choice_V == index).nonzero()[:, 0] for index in used]
        bits = [
            self._codes(self.table[ids], books[index]).flatten()
            for index, ids in zip(used, locations, strict=True)
        ]
        hard = AdaptiveEmbedding(
            **self.layout,  # type: ignore[arg-type]
            lengths=[self.lengths[index] for index in used],
            counts=[len(ids) for ids in locations],
        ).to(self.codebooks.device)
        hard.codes.copy_(pack_stream(torch.cat(bits)))
        if len(used) > 1:
            dense_V = torch.stack([choice_V == index for index in used]).long().argmax(0)
            hard.selector.copy_(pack(dense_V[None], hard.selector_bits)[0])
        hard.codebooks = nn.Parameter(torch.cat([books[index] for index in used]) * self.span)
        hard.bias = nn.Parameter(self.bias[used] * self.span)
        return hard

    def _books(self) -> list[Tensor]:
        return list(self.codebooks.split(self.lengths))

    def _codes(self, x_ND: Tensor, book_lD: Tensor) -> Tensor:
        """z (N, l): exactly 0 or 1, with the gradient of the sigmoid."""
        inner_Nl = x_ND @ book_lD.T
        smooth_Nl = inner_Nl.sigmoid()
        return (inner_Nl > 0).to(x_ND.dtype) + (smooth_Nl - smooth_Nl.detach())

    def _made(self, ids_N: Tensor) -> list[Tensor]:
        """What each codebook makes of rows (N, D), in units of the span."""
        x_ND = self.table[ids_N]
        books = enumerate(self._books())
        return [self._codes(x_ND, book_lD) @ book_lD + self.bias[i] for i, book_lD in books]

    def _mixed(self, ids_N: Tensor, weights_NN: Tensor) -> Tensor:
        parts = torch.stack(self._made(ids_N), 1)
        return (parts * weights_NN.to(parts.dtype)[..., None]).sum(1) * self.span

    def _chosen_rows(self, ids_N: Tensor) -> Tensor:
        return self._mixed(ids_N, F.one_hot(self.chosen()[ids_N], len(self.lengths)))

    def _errors(self, ids_N: Tensor) -> Tensor:
        """Relative squared errors (N tokens, N codebooks)."""
        size = self.table.float().square().sum(-1).mean().clamp(min=1e-12)
        x_ND = self.table[ids_N].float()
        errors = [(made - x_ND).square().sum(-1) / size for made in self._made(ids_N)]
        return torch.stack(errors, 1)


class AdaptiveEmbedding(CompressedTable):
    """Codes of several lengths in one stream of bits, group after group, words in the order of the
    vocabulary; codebook i has `lengths[i]` vectors and `counts[i]` words."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        lengths: list[int],
        counts: list[int],
        padding_idx: int | None = None,
        zero_padding: bool = False,
        scale: float = 1.0,
    ) -> None:
        if len(lengths) != len(counts) or sum(counts) != num_embeddings:
            raise ValueError("`counts` must give each of the words one of the `lengths`")
        own: Values = {"lengths": lengths, "counts": counts}
        super().__init__(num_embeddings, embedding_dim, padding_idx, zero_padding, scale, **own)
        self.lengths, self.counts = lengths, counts
        self.selector_bits = selector_bits(len(lengths))
        self.code_bits = sum(n * length for n, length in zip(counts, lengths, strict=True))
        self.register_buffer("codes", torch.zeros(-(-self.code_bits // 8), dtype=torch.uint8))
        self.codes: Tensor
        if self.selector_bits:
            width = -(-num_embeddings * self.selector_bits // 8)
            self.register_buffer("selector", torch.zeros(width, dtype=torch.uint8))
        self.selector: Tensor
        self.codebooks = nn.Parameter(torch.zeros(sum(lengths), embedding_dim))
        self.bias = nn.Parameter(torch.zeros(len(lengths), embedding_dim))

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D). Finding the codes counts through the vocabulary's indices."""
        choice_V, ranks_V = self._groups()
        own_NN = F.one_hot(choice_V[ids_N], len(self.counts)).to(torch.uint8)
        ranks_N1 = ranks_V[ids_N][:, None]
        codes, start = [], 0
        for index, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
            places_Nl = start + ranks_N1 * length + torch.arange(length, device=ids_N.device)
            bits_Nl = read_bits(self.codes, places_Nl.clamp(max=self.code_bits - 1))
            codes.append(bits_Nl * own_NN[:, index : index + 1])
            start += count * length
        dtype = self.codebooks.dtype
        return torch.cat(codes, -1).to(dtype) @ self.codebooks + own_NN.to(dtype) @ self.bias

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V): group by group, then in the order of the vocabulary."""
        bits_T = unpack_stream(self.codes, self.code_bits, hidden_ND.dtype)
        parts = (hidden_ND @ self.codebooks.T).split(self.lengths, -1)
        biases_NN = hidden_ND @ self.bias.T
        groups, start = [], 0
        for index, part_Nl in enumerate(parts):
            end = start + self.counts[index] * self.lengths[index]
            bits_nl = bits_T[start:end].view(-1, self.lengths[index])
            groups.append(torch.addmm(biases_NN[:, index : index + 1], part_Nl, bits_nl.T))
            start = end
        choice_V, places_V = self._groups()
        for index in range(1, len(self.counts)):
            before = sum(self.counts[:index])
            places_V = torch.where(choice_V == index, places_V + before, places_V)
        return torch.cat(groups, -1).index_select(-1, places_V)

    def check_loaded(self) -> None:
        """Check that as many words have each codebook as there are codes for."""
        choice_V, _ = self._groups()
        check_range("selector", choice_V, len(self.counts))
        found = torch.bincount(choice_V.long(), minlength=len(self.counts))
        check_counts("selector", found, found.new_tensor(self.counts))

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Each word's codebook (V,) and its rank among the words that have it (V,)."""
        if not self.selector_bits:
            ranks_V = torch.arange(self.num_embeddings, device=self.codes.device)
            return torch.zeros_like(ranks_V), ranks_V
        choice_V = unpack(self.selector[None], self.num_embeddings, self.selector_bits)[0]
        return choice_V, ranks_in_groups(choice_V, len(self.counts))

    def ideal_bits(self) -> int:
        """Σ_w l(w) + |V|·⌈log2 N⌉ + 32·D·(Σ l_i + N)."""
        stored = self.code_bits + self.num_embeddings * self.selector_bits
        return stored + 32 * self.embedding_dim * (sum(self.lengths) + len(self.lengths))
