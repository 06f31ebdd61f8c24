"""Codes of several lengths: choosing lengths within a budget, and a stream of bits (a helper, not a
pass).

Shapes: V words, N codebooks, T bits of a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmcc.passes._shared.bits import pack, unpack_bits


def selector_bits(books: int) -> int:
    """Bits that say which of so many codebooks a word has: ⌈log2 N⌉."""
    return (books - 1).bit_length()


def choose(logits_VN: Tensor, lengths: list[int], mean_length: float | None) -> Tensor:
    """The codebook (V,) of each word: the best of logit - λ·length, the shorter one in doubt.

    λ is the least that keeps the mean length within `mean_length`; 0 without one.
    """
    logits_VN = logits_VN.detach().double()
    length_N = torch.tensor(lengths, device=logits_VN.device, dtype=torch.double)

    def best(price: float) -> Tensor:
        return (logits_VN - price * length_N).argmax(-1)

    def fits(price: float) -> bool:
        return mean_length is None or float(length_N[best(price)].mean()) <= mean_length

    if fits(0.0):
        return best(0.0)
    assert mean_length is not None
    assert mean_length >= lengths[0], "the shortest codes are over the budget"
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return best(high)


def pack_stream(bits_T: Tensor) -> Tensor:
    """Pack bits (T,) into bytes (⌈T/8⌉,), the first into the highest place."""
    return pack(bits_T[None], 1)[0]


def unpack_stream(packed_B: Tensor, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The first `count` bits of a stream, as 0 and 1 of a dtype."""
    return unpack_bits(packed_B[None], count, dtype)[0]


def read_bits(packed_B: Tensor, locations: Tensor) -> Tensor:
    """Bits (...) at places (...) of a stream, as uint8 0 and 1."""
    shifts = (7 - locations % 8).to(torch.uint8)
    return packed_B[locations // 8] >> shifts & 1


def ranks_in_groups(choice_V: Tensor, groups: int) -> Tensor:
    """How many earlier words (V,) are in the same group."""
    ranks_V = torch.zeros_like(choice_V)
    for group in range(groups):
        own_V = choice_V == group
        ranks_V = torch.where(own_V, own_V.cumsum(0) - 1, ranks_V)
    return ranks_V
