"""Sparse matrices as they are stored: a bit for every weight, or compressed rows.

With R rows, C columns, N values of b bytes that are not zero: `bitmask` takes R*ceil(C/8) + N*b
bytes, `csr` 4*(R+1) + N*(b + i), where a column index takes i = 2 bytes up to 65,536 columns and
else 4, and `int8_csr` 4*(R+1) + N*(1 + i) + b, the last for the scale. It comes back bit for bit;
only going to 8 bits (symmetric, so that zeros stay zeros) rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.kit import check_counts, check_range, check_starts
from plmcc.passes._shared.bits import pack, row_bytes, unpack

FORMS = ("bitmask", "csr", "int8_csr")
_LEVELS = 127


def index_type(columns: int) -> torch.dtype:
    """Return the dtype of column indices."""
    return torch.uint16 if columns <= 65_536 else torch.int32


def stored_bytes(form: str, shape: tuple[int, int], values: int, width: int) -> int:
    """Return the bytes of a matrix with so many values of `width` bytes, its bias left out."""
    rows, columns = shape
    if form == "bitmask":
        return rows * row_bytes(columns, 1) + values * width
    index = index_type(columns).itemsize
    value = 1 if form == "int8_csr" else width
    return 4 * (rows + 1) + values * (value + index) + (width if form == "int8_csr" else 0)


def levels_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit values (as floats, -127 to 127) of a matrix and their step."""
    largest = weight.detach().float().abs().amax()
    scale = (largest / _LEVELS).clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    return (weight.detach().float() / scale.float()).round().clamp(-_LEVELS, _LEVELS), scale


def rounded(weight: Tensor) -> Tensor:
    """Return what an 8-bit copy of a matrix holds, with the gradient of the identity."""
    levels, scale = levels_of(weight)
    return (levels * scale.float()).to(weight.dtype) + (weight - weight.detach())


class SparseLinear(nn.Module):
    """A linear map (out, in) whose stored weight is sparse; each call builds the dense one.

    `values` (N,) are the weights that are not zero, row by row: a parameter that trains, except
    in 8 bits.
    """

    def __init__(self, shape: tuple[int, int], values: int, form: str, bias: bool) -> None:
        super().__init__()
        assert form in FORMS, form
        self.shape, self.form = shape, form
        rows, columns = shape
        if form == "int8_csr":
            self.register_buffer("values", torch.zeros(values, dtype=torch.int8))
            self.register_buffer("scale", torch.zeros(()))
        else:
            self.values = nn.Parameter(torch.zeros(values))
        if form == "bitmask":
            packed = torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8)
            self.register_buffer("mask", packed)
        else:
            self.register_buffer("columns", torch.zeros(values, dtype=index_type(columns)))
            self.register_buffer("starts", torch.zeros(rows + 1, dtype=torch.int32))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows)) if bias else None)
        self.scale: Tensor
        self.mask: Tensor
        self.columns: Tensor
        self.starts: Tensor

    def parameter_count(self) -> int:
        """Return the number of weights that are not zero, and biases."""
        return self.values.numel() + (0 if self.bias is None else self.bias.numel())

    def check_loaded(self) -> None:
        """Check that each value has its place."""
        columns = self.shape[1]
        if self.form == "bitmask":
            ones = unpack(self.mask, columns, 1).sum()
            check_counts("mask", ones, ones.new_tensor(len(self.values)))
            return
        check_starts("starts", self.starts, len(self.values))
        check_range("columns", self.columns, columns)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None, form: str) -> SparseLinear:
        """Store a matrix."""
        levels, scale = levels_of(weight)
        keep = (levels if form == "int8_csr" else weight) != 0
        rows, columns = weight.shape
        made = cls((rows, columns), int(keep.sum()), form, bias is not None)
        made = made.to(weight.device)
        if form == "int8_csr":
            made.values.copy_(levels[keep])
            made.scale = scale
        else:
            made.values = nn.Parameter(weight[keep].clone())
        if form == "bitmask":
            made.mask.copy_(pack(keep, 1))
        else:
            made.columns.copy_(keep.nonzero()[:, 1])
            made.starts[1:] = keep.sum(1).cumsum(0)
        if bias is not None:
            made.bias = nn.Parameter(bias.clone())
        return made

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), built on demand."""
        values: Tensor = self.values
        if self.form == "int8_csr":
            values = (values.float() * self.scale.float()).to(self.scale.dtype)
        if self.form == "bitmask":
            zeros = values.new_zeros(self.shape)
            return zeros.masked_scatter(unpack(self.mask, self.shape[1], 1).bool(), values)
        counts = self.starts.diff().long()
        rows = torch.arange(self.shape[0], device=values.device)
        locations = rows.repeat_interleave(counts, output_size=len(values)) * self.shape[1]
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, locations + self.columns.long(), values).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to (..., in)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)
