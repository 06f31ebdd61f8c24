"""Telling attention modules that they have fewer heads than before."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from plmcc.api import Values
from plmcc.kit.graphs import cache_argument
from plmcc.kit.integers import check_range
from plmcc.kit.parts import Attention

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")
_KEPT = "_plmcc_kept_heads"


class KeptHeads(nn.Module):
    """The places (int64) of the heads that an attention still has, of the original's. A module of
    its own, so that layers can share it."""

    def __init__(self, index_K: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index_K)
        self.index: Tensor


def resize(attention: nn.Module, block: Attention, kept: list[int]) -> None:
    """Tell an attention module how many heads it has; `kept` numbers those of before.

    Modules of a layer that lost all heads go on with one that is zero.
    """
    ratio = block.heads // block.kv_heads
    heads = max(len(kept), ratio)
    sizes = dict.fromkeys(_HEADS, (block.heads, heads))
    sizes |= dict.fromkeys(_KV_HEADS, (block.kv_heads, heads // ratio))
    sizes |= dict.fromkeys(_WIDTHS, (block.heads * block.head_dim, heads * block.head_dim))
    for name, (old, new) in sizes.items():
        if getattr(attention, name, None) == old:
            setattr(attention, name, new)
    if getattr(attention, "has_relative_attention_bias", None) is not None:
        _select_bias(attention, kept or list(range(ratio)), block.heads)


def _select_bias(attention: nn.Module, kept: list[int], heads: int) -> None:
    """T5: one layer computes the position bias of all heads for all layers; every layer takes the
    heads that it has left, and hands on the whole."""
    # A tensor of the model: a list would be copied to the device in every call.
    known = next(attention.parameters(), None)
    device = None if known is None else known.device
    index_K = torch.tensor(kept, dtype=torch.long, device=device)
    before = getattr(attention, _KEPT, None)
    if before is not None:
        before.index = before.index[index_K]
        return
    attention.add_module(_KEPT, KeptHeads(index_K))
    attention._plmcc_all_heads = heads  # type: ignore[assignment]
    cls = type(attention)

    @functools.wraps(cls.forward)  # whoever asks for the signature gets that of before
    def forward(self: Any, *args: object, **kwargs: object) -> tuple[object, ...]:
        attended: tuple[object, ...] = self._attend(dict(zip(names, args, strict=False)) | kwargs)
        return attended

    names = list(inspect.signature(cls.forward).parameters)[1:]
    body: Values = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body |= {"__doc__": cls.__doc__, "forward": forward, "_cache": cache_argument(cls)}
    attention.__class__ = type(cls.__name__, (_WithFewerHeads, cls), body)


class _WithFewerHeads:
    """Stands before a T5 attention class: position biases come and go with all heads."""

    _cache: str | None
    """What the class before calls the cache."""

    def check_loaded(self) -> None:
        """Check that the kept heads are heads of the original."""
        live = cast(Any, self)
        check_range("kept heads", getattr(self, _KEPT).index, live._plmcc_all_heads)

    def compute_bias(self, *args: object, **kwargs: object) -> Tensor:
        """Return the bias (1, kept heads, T, S)."""
        whole: Tensor = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return whole[:, getattr(self, _KEPT).index]

    def _attend(self, given: Values) -> tuple[object, ...]:
        """Attend with the kept heads; return the position bias (1, all heads, T, S)."""
        live = cast(Any, self)
        run: Any = super().forward  # type: ignore[misc]
        position_bias, cache = given.get("position_bias"), given.get(self._cache or "")
        if position_bias is not None:
            result = run(**given | {"position_bias": position_bias[:, getattr(self, _KEPT).index]})
            return (result[0], position_bias, *result[2:])
        past = 0 if cache is None else cache.get_seq_length(live.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        result = run(**given)
        part: Tensor = result[1]
        if live.has_relative_attention_bias:
            sizes = part.shape[-2:]
            whole: Tensor = super().compute_bias(  # type: ignore[misc]
                *sizes, device=part.device, past_seen_tokens=past
            )
        else:  # cross-attention: zeros
            whole = part[:, :1].expand(-1, live._plmcc_all_heads, -1, -1)
        return (result[0], whole, *result[2:])
