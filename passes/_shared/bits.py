"""Packing of small integers into bytes, row by row (a helper of the passes, not a pass).

A row of M codes of b bits takes ceil(M·b/8) bytes, most significant bit first; the spare bits at
its end are 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PART = 8192
"""Rows that are packed at once."""


def bits_for(codewords: int) -> int:
    """Bits that hold a code in 0..codewords-1."""
    return max(1, (codewords - 1).bit_length())


def row_bytes(codes: int, bits: int) -> int:
    """Bytes of a packed row of `codes` codes of `bits` bits each."""
    return (codes * bits + 7) // 8


def pack(codes_VM: Tensor, bits: int) -> Tensor:
    """Pack integer codes (V, M) of `bits` bits each into uint8 rows (V, ceil(M·bits/8))."""
    shifts = torch.arange(bits - 1, -1, -1, device=codes_VM.device)
    packed = [
        # By parts: a bit takes eight bytes until it is packed.
        np.packbits((part_NM.long()[..., None] >> shifts & 1).flatten(1).cpu().numpy(), axis=1)
        for part_NM in codes_VM.split(_PART)
    ]
    return torch.from_numpy(np.concatenate(packed)).to(codes_VM.device)


def unpack_bits(packed_NB: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Read bits (N, bits) of a dtype from uint8 rows (N, B): a byte at a time, from a list of all
    256."""
    bytes_ = torch.arange(256, device=packed_NB.device)
    locations = torch.arange(7, -1, -1, device=packed_NB.device)
    every = (bytes_[:, None] >> locations & 1).to(dtype)
    rows = every.index_select(0, packed_NB.flatten().int())
    return rows.view(packed_NB.shape[0], 8 * packed_NB.shape[1])[:, :bits]


def unpack(packed_NB: Tensor, codes: int, bits: int) -> Tensor:
    """Read `codes` codes of `bits` bits (at most 16) from uint8 rows (N, B); int64 (N, codes).

    Two and four bits, where no code straddles a byte, take a shift and a mask; the general case
    reads the 24-bit window that begins at the code's first byte.
    """
    device = packed_NB.device
    if bits in (1, 2, 4, 8):
        shifts = torch.arange(8 - bits, -1, -bits, device=device)
        fields = packed_NB.long()[..., None] >> shifts & ((1 << bits) - 1)
        return fields.flatten(-2)[..., :codes]
    start = torch.arange(codes, device=device) * bits
    byte, last = start // 8, packed_NB.shape[-1] - 1
    window = torch.zeros_like(packed_NB[..., :1], dtype=torch.long)
    for step in range(3):
        window = window << 8 | packed_NB[..., (byte + step).clamp(max=last)].long()
    return window >> (24 - bits - start % 8) & ((1 << bits) - 1)
