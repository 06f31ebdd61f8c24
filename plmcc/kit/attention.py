"""What attention modules of passes need for compiled beam search: the beams of a sentence are
queries to the same keys."""

from __future__ import annotations

import torch
from torch import Tensor


def beams_as_queries(q: Tensor, sentences: int | torch.SymInt) -> Tensor:
    """Turn the beams of a sentence into its queries: `(A*N, H, 1, K)` -> `(A, H, N, K)`."""
    q_ANHK: Tensor = q[:, :, 0].unflatten(0, (sentences, -1))
    return q_ANHK.transpose(1, 2)


def queries_as_beams(x: Tensor) -> Tensor:
    """Turn the queries of a sentence into its beams: `(A, H, N, W)` -> `(A*N, 1, H, W)`."""
    return x.transpose(1, 2).flatten(0, 1)[:, None]


def bias_of_places(bias: Tensor, beams: int | torch.SymInt) -> Tensor:
    """Return the position bias of places `(1, H, 1, P)` from that of steps, which come first in a
    bias computed for P keys."""
    steps = bias.shape[-1] // beams
    return bias[..., :steps].repeat_interleave(beams, -1, output_size=bias.shape[-1])
