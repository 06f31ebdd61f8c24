"""Running the programs of an encoder-decoder: caches, and translation from token ids to token ids.

Nothing here imports transformers. Shape suffixes: B sentences, R rows, S source tokens, T places in
the self-attention cache, H heads, D width of a head, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from plmcc.search import Search, search_tokens

# Room in the self-attention cache, in tokens; doubled when it is full. Attention reads all of it,
# so that a large cache costs time, and growing copies it, so that many sizes do too.
_ROOM = 16


class Programs(Protocol):
    """The compiled functions of a model; `plmcc.programs` says what they compute."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and width of each self-attention cache: keys of all layers, then values."""

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        """Read the source."""

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        """Read one target token in each row and return at least `candidates` continuations."""


@torch.inference_mode()
def translate(programs: Programs, source_BS: Tensor, mask_BS: Tensor, search: Search) -> Tensor:
    """Translate sentences.

    Args:
        programs: the model.
        source_BS: token ids (int64), on any side padded.
        mask_BS: 1 for a token, 0 for padding (int64).
        search: how to search.

    Returns:
        `tokens_BL` (int64), from the start token on.
    """
    if source_BS.shape[1] == 1:  # a length of its own for torch.export
        source_BS, mask_BS = (functional.pad(x, (0, 1)) for x in (source_BS, mask_BS))
    rows = DecoderRows(
        programs, programs.encode(source_BS.contiguous(), mask_BS.contiguous()), search
    )
    return search_tokens(rows, source_BS.shape[0], search)


class DecoderRows:
    """The rows of a decoder and their caches (`plmcc.search.Rows`)."""

    def __init__(self, programs: Programs, encoded: Sequence[Tensor], search: Search) -> None:
        self.programs = programs
        self.candidates = search.candidates
        self.limit = search.max_length
        self.mask, *cross = encoded
        self.cross = cross
        self.own: list[Tensor] = []
        self.length = 0  # tokens read
        self.room = 0
        self.positions = torch.arange(self.limit, device=self.mask.device).split(1)
        if self.mask.shape[0] == 1:
            self.keep(torch.tensor([0]))

    def step(self, token_R: Tensor, parent_R: Tensor) -> tuple[Tensor, Tensor]:
        """Read a token in each row."""
        if self.length == self.room:
            self._grow()
        asked = token_R.shape[0]
        if asked == 1:
            token_R, parent_R = token_R.expand(2).contiguous(), torch.arange(2)
        # Compiled programs rely on the layout of their inputs and do not check it.
        small = (x.to(self.mask.device).contiguous() for x in (token_R, parent_R))
        position = self.positions[self.length]
        inputs = [*small, position, self.mask, *self.own, *self.cross]
        scores_RK, tokens_RK, *moved = self.programs.step(self.candidates, inputs)
        if moved:
            self.own = moved
        self.length += 1
        return scores_RK[:asked].cpu(), tokens_RK[:asked].cpu()

    def keep(self, row_R: Tensor) -> None:
        """Go on with these rows."""
        if len(row_R) == 1:
            # The programs take two rows or more: torch.export would make one row another program.
            row_R = row_R.expand(2)
        row_R = row_R.to(self.mask.device)
        self.mask = self.mask.index_select(0, row_R)
        self.cross = [cache.index_select(0, row_R) for cache in self.cross]
        self.own = [cache.index_select(0, row_R) for cache in self.own]

    def _grow(self) -> None:
        self.room = min(max(_ROOM, 2 * self.room), max(self.limit, 2))
        rows = self.mask.shape[0]
        grown = [
            self.mask.new_zeros(rows, heads, self.room, width)
            for heads, width in self.programs.shapes
        ]
        for old, new in zip(self.own, grown, strict=False):
            new[:, :, : self.length] = old
        self.own = grown
