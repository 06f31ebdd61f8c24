"""Comparing tensors, and going through large ones by parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_ELEMENTS = 2**24
"""Elements of a part: 64 MB in float32."""


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


def by_rows(*tensors: Tensor, elements: int = _ELEMENTS) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of tensors of equally many rows, of the first one at most so many elements.

    Logits of large vocabularies take gigabytes, and what is computed from them as many again.
    """
    rows = max(1, elements // max(1, tensors[0][:1].numel()))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def divergence(theirs_NV: Tensor, mine_NV: Tensor, each: bool = False) -> Tensor:
    """KL(theirs || mine) of each row of logits (N,), in nats. `each`: of labels that do not exclude
    one another, the sum over these."""
    if each:
        theirs_NV, mine_NV = (
            torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1) for x in (theirs_NV, mine_NV)
        )
    else:
        theirs_NV, mine_NV = (x.log_softmax(-1) for x in (theirs_NV, mine_NV))
    terms = F.kl_div(mine_NV, theirs_NV, log_target=True, reduction="none")
    return terms.flatten(1).sum(-1)
