"""Attention of beam search: the beams of a sentence are queries to the same keys.

Keys and values of the source are then held once a sentence, not once a beam. The target side holds
what every beam wrote at every step, at place `step * N + beam`, and a mask shows each beam the
places of its own history: nothing is moved when beams change their order.

Shape suffixes: A sentences, N beams, H heads, K width of a head, P keys (source tokens, or places
of the target side: steps * N).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plmcc.kit.attention import beams_as_queries, bias_of_places, queries_as_beams

_NAME = "plmcc_beams"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `query` is `(A*N, H, 1, K)`, `key` `(A, H, P, K)`."""
    q_AHNK = beams_as_queries(query, key.shape[0])
    q_AHNK = q_AHNK * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_AHNP = q_AHNK @ key.transpose(-1, -2)
    if position_bias is not None:
        if module.is_causal and q_AHNK.shape[2] != 1:
            position_bias = bias_of_places(position_bias, q_AHNK.shape[2])
        scores_AHNP = scores_AHNP + position_bias
    if attention_mask is not None:
        scores_AHNP = scores_AHNP + attention_mask
    return queries_as_beams(scores_AHNP.softmax(-1) @ value), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)


def shares_keys(model: PreTrainedModel) -> bool:
    """Return whether a model's attention can be exchanged: whether transformers says so."""
    return bool(type(model)._can_set_attn_implementation())


@contextmanager
def beam_attention(model: nn.Module) -> Iterator[None]:
    """Let the attention of a model take beams as queries; it must be `shares_keys`."""
    owners = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    configs = {id(config): config for config in owners}
    before = {at: config._attn_implementation for at, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for at, config in configs.items():
            config._attn_implementation = before[at]
