"""Running the programs of an encoder-decoder: caches, and translation from token ids to token ids.

Nothing here imports transformers. Shape suffixes: B sentences at first, A sentences still open, N
beams, S source tokens, T steps that the self-attention cache has room for, H heads, D width of a
head, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from plmcc.inference.beam_search import GenerationSettings, search_tokens

# Room in the self-attention cache, in tokens; when it is full it grows by as much, or by a quarter.
# Attention reads all of it, so that a large cache costs time, and growing copies it. On a GPU what
# costs time is launching, and a cache that has grown elsewhere means another CUDA graph.
_ROOM, _ROOM_CUDA = 8, 32
# Tokens of padding that cost as much as another call of the encoder, roughly.
_CALL = 64


class Programs(Protocol):
    """The compiled functions of a model; `plmcc.inference.programs` says what they compute."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and width of each self-attention cache: keys of all layers, then values."""

    @property
    def restrictions(self) -> tuple[tuple[int, ...], bool]:
        """`Search.restrictions` that `step` keeps to."""

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        """Read the source."""

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        """Read one target token in each beam and return at least `candidates` continuations."""


def in_range(source_BS: Tensor, vocabulary: int) -> bool:
    """Whether there are token ids, and all of them are in the vocabulary."""
    return source_BS.numel() > 0 and bool(((source_BS >= 0) & (source_BS < vocabulary)).all())


@torch.inference_mode()
def decode(
    programs: Programs, source_BS: Tensor, mask_BS: Tensor, search: GenerationSettings
) -> Tensor:
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
    encoded = _encoded(programs, source_BS.contiguous(), mask_BS.contiguous())
    return search_tokens(Decoder(programs, encoded, search), source_BS.shape[0], search)


def _encoded(programs: Programs, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
    """Read the source, on a CPU in groups of like length: padding costs as much as words there."""
    length_B = mask_BS.cumsum(1).argmax(1) + 1  # up to the last token, wherever padding stands
    order_B = length_B.argsort()
    groups = [order_B] if source_BS.is_cuda else _groups(order_B, length_B)
    if len(groups) == 1:
        return programs.encode(source_BS, mask_BS)
    whole: list[Tensor] = []
    for rows in groups:
        longest = max(2, int(length_B[rows[-1]]))
        parts = programs.encode(
            source_BS[rows, :longest].contiguous(), mask_BS[rows, :longest].contiguous()
        )
        if not whole:
            whole = _room(parts, *source_BS.shape)
        whole[0][rows, :, :, :longest] = parts[0]
        for cache, part in zip(whole[1:], parts[1:], strict=True):
            cache[rows, :, :longest] = part
    return whole


def _groups(order_B: Tensor, length_B: Tensor) -> list[Tensor]:
    """Cut sentences, ordered by length, where a new group saves more padding than a call costs."""
    groups, start = [], 0
    lengths = length_B[order_B].tolist()
    for end in range(1, len(lengths)):
        # What the sentences so far would be padded by, if the group went on to the end.
        if (lengths[-1] - lengths[end - 1]) * (end - start) > _CALL:
            groups.append(order_B[start:end])
            start = end
    return [*groups, order_B[start:]]


def _room(parts: list[Tensor], batch: int, length: int) -> list[Tensor]:
    """Return the mask and the caches of a whole batch, all padding."""
    mask, *caches = parts
    lowest = torch.finfo(mask.dtype).min
    room = [mask.new_full((batch, 1, 1, length), lowest)]
    return room + [c.new_zeros(batch, c.shape[1], length, c.shape[3]) for c in caches]


class Decoder:
    """The beams of sentences and their caches (`plmcc.inference.beam_search.BeamState`)."""

    def __init__(
        self, programs: Programs, encoded: Sequence[Tensor], search: GenerationSettings
    ) -> None:
        self.programs = programs
        self.candidates, self.beams = search.candidates, search.num_beams
        self.limit = search.max_length
        self.mask, *cross = encoded
        self.cross_cache = cross
        self.self_cache: list[Tensor] = []
        self.length = 0  # tokens read
        self.slots_ANT = torch.full((len(self.mask), self.beams, 0), -1, device=self.mask.device)
        self.positions = torch.arange(self.limit, device=self.mask.device).split(1)
        self.each = torch.arange(self.beams, device=self.mask.device)

    def step(self, token_AN: Tensor, parent_AN: Tensor) -> tuple[Tensor, Tensor]:
        """Read a token in each beam."""
        device = self.mask.device
        if self.length == self.slots_ANT.shape[2]:
            self._grow()
        if self.beams > 1:
            index = parent_AN.to(device)[:, :, None].expand_as(self.slots_ANT)
            self.slots_ANT = self.slots_ANT.gather(1, index)
        self.slots_ANT[:, :, self.length] = self.each
        # Compiled programs rely on the layout of their inputs and do not check it.
        token_AN = token_AN.to(device).contiguous()
        at = self.positions[self.length]
        inputs = [token_AN, self.slots_ANT, at, self.mask, *self.self_cache, *self.cross_cache]
        scores_ANK, tokens_ANK = self.programs.step(self.candidates, inputs)
        self.length += 1
        return scores_ANK.cpu(), tokens_ANK.cpu()

    def keep(self, index_A: Tensor) -> None:
        """Go on with these sentences."""
        index_A = index_A.to(self.mask.device)
        self.mask, self.slots_ANT = self.mask[index_A], self.slots_ANT[index_A]
        self.cross_cache = [cache.index_select(0, index_A) for cache in self.cross_cache]
        self.self_cache = [cache.index_select(0, index_A) for cache in self.self_cache]

    def _grow(self) -> None:
        least = _ROOM_CUDA if self.mask.is_cuda else _ROOM
        room = min(self.length + max(least, self.length // 4), max(self.limit, 2))
        more = (0, room - self.length)
        self.slots_ANT = functional.pad(self.slots_ANT, more, value=-1)
        if not self.self_cache:
            size = (len(self.mask), room, self.beams)
            self.self_cache = [
                self.mask.new_zeros(size[0], heads, *size[1:], width)
                for heads, width in self.programs.shapes
            ]
        else:
            self.self_cache = [
                functional.pad(cache, (0, 0, 0, 0, *more)) for cache in self.self_cache
            ]
