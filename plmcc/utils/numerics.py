"""Comparing tensors."""

from __future__ import annotations

from torch import Tensor


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return max |found - expected| / max |expected|, computed in float64.

    The absolute difference where `expected` is all zeros, infinity where the shapes differ, and nan
    where a value is nan.
    """
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    one, two = found.detach().double(), expected.detach().double()
    return float((one - two).abs().max()) / (float(two.abs().max()) or 1.0)
