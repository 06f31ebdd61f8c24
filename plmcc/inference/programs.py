"""An encoder-decoder as two programs of tensors: `Encode` (the source) and `Step` (one token of the
target). The model's own code runs in them, over caches of ours.

Shape suffixes: B sentences at first, A sentences still open, N beams, R rows (A * N), S source
tokens, T steps that the self-attention cache has room for, H heads, D width of a head (keys and
values may differ), E width of hidden states, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from plmcc.inference.beam_attention import beam_attention
from plmcc.ir.modules import cache_argument, output_depth
from plmcc.kit.attention import beams_as_queries


class EncoderProgram(nn.Module):
    """Read the source.

    Called with `source_BS` and `mask_BS` (int64; 1 is a token, 0 padding). Returns `mask_B11S`, to
    be added to the scores of cross-attention, then the keys of each layer's cross-attention and
    the values of each (`BHSD`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(  # noqa: D102, as the class says
        self, source_BS: Tensor, mask_BS: Tensor
    ) -> tuple[Tensor, ...]:
        encoder: Any = self.model.get_encoder()
        hidden = encoder(input_ids=source_BS, attention_mask=mask_BS).last_hidden_state
        mask_B11S = (1 - mask_BS).to(hidden.dtype)[:, None, None, :] * torch.finfo(hidden.dtype).min
        # The decoder makes its own keys and values of the source; what else it computes here is
        # not returned, so that no compiler keeps it.
        _, caches = recorded(self.model, source_BS[:, 0], hidden, mask_B11S)
        # `Step` is compiled for this layout, and does not check.
        return (mask_B11S, *(cache.contiguous() for cache in caches))


def recorded(
    model: PreTrainedModel, token_R: Tensor, hidden_RSE: Tensor, mask_R11S: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the decoder on one first token.

    Returns:
        The self-attention caches `RHTD` (T is 1) and the cross-attention caches `RHSD`: keys of all
        layers, then values of all layers.
    """
    size = output_depth(model.config)
    own, cross = ([_Recorded() for _ in range(size)] for _ in range(2))
    self_mask = mask_R11S.new_zeros(token_R.shape[0], 1, 1, 1)
    cache = EncoderDecoderCache(Cache([*own]), Cache([*cross]))
    _decode(model, token_R, hidden_RSE, self_mask, mask_R11S, cache)
    return _tensors(own), _tensors(cross)


class DecoderStep(nn.Module):
    """Read one token of the target in each beam.

    Called with `token_AN` (int64), `slots_ANT` (int64: for each beam and each step of its history,
    the beam in whose name the token was written; this step's are the beams' own; -1 for steps to
    come), `position` (int64 of shape `[1]`: tokens read before), `mask_A11S`, and a list of caches:
    self-attention keys of all layers, values of all layers (`AHTND`), which are written in place,
    then those of cross-attention (`AHSD`). Returns the best candidates, `scores_ANK` and
    `tokens_ANK`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        candidates: int,
        restrictions: tuple[tuple[int, ...], bool] = ((), False),
    ) -> None:
        super().__init__()
        self.model = model
        banned, self.renormalized = restrictions
        self.candidates = candidates
        # A tensor of the program: made in each step, it would be copied to the GPU, which waits,
        # and no CUDA graph could hold the step.
        ids_N = torch.tensor(banned, dtype=torch.long, device=model.device) if banned else None
        self.banned: Tensor | None
        self.register_buffer("banned", ids_N, persistent=False)

    def forward(  # noqa: D102, as the class says
        self,
        token_AN: Tensor,
        slots_ANT: Tensor,
        position: Tensor,
        mask_A11S: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        size = output_depth(self.model.config)
        keys, values, cross_keys, cross_values = (
            caches[start : start + size] for start in range(0, 4 * size, size)
        )
        own = [_Written(k, v, position) for k, v in zip(keys, values, strict=True)]
        cross = [_Fixed(k, v) for k, v in zip(cross_keys, cross_values, strict=True)]
        cache = EncoderDecoderCache(Cache([*own]), Cache([*cross]))
        beams = torch.arange(token_AN.shape[1], device=token_AN.device)
        hidden = (slots_ANT[..., None] != beams).to(mask_A11S.dtype).flatten(2)
        own_mask_A1NP = hidden[:, None] * torch.finfo(mask_A11S.dtype).min
        # Only its presence and shape count: keys and values are in the cache.
        memory = mask_A11S.new_zeros(()).expand(
            token_AN.numel(), cross_keys[0].shape[2], self.model.config.hidden_size
        )
        with beam_attention(self.model):
            logits_RV = _decode(
                self.model, token_AN.flatten(), memory, own_mask_A1NP, mask_A11S, cache
            )
        return topk_log_probs(
            logits_RV.unflatten(0, token_AN.shape), self.candidates, self.banned, self.renormalized
        )


def topk_log_probs(
    logits_V: Tensor, candidates: int, banned: Tensor | None = None, renormalized: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the `candidates` best tokens of each row: log probabilities and ids, best first.

    A single candidate comes with its logit: greedy search needs no probability. Banned tokens are
    none of them; they have their part in the sum of probabilities, unless `renormalized`.
    """
    whole = logits = logits_V.float()
    if banned is not None:
        logits = logits.index_fill(-1, banned, -math.inf)
    if renormalized or banned is None:
        whole = logits
    if candidates == 1:
        scores, tokens = logits.max(-1, keepdim=True)
        return scores, tokens
    size = logits.shape[-1]
    wanted = math.isqrt(size * candidates)
    groups = next((g for g in range(wanted, 2 * wanted) if size % g == 0), wanted)
    if size < 4 * groups:
        scores, tokens = logits.topk(candidates, dim=-1)
        return scores - whole.logsumexp(-1, keepdim=True), tokens
    # Token t is in group t % groups. The best tokens are in the groups with the best maxima, which
    # are quick to find: for 256 rows of 8,000, log-softmax and topk took 8.9 ms, this 3.1.
    filled = nn.functional.pad(logits, (0, -size % groups), value=-math.inf)
    rows_WG = filled.unflatten(-1, (-1, groups))
    best_G = rows_WG.amax(-2)
    chosen_K = best_G.topk(candidates, dim=-1).indices
    index_WK = chosen_K[..., None, :].expand(*chosen_K.shape[:-1], rows_WG.shape[-2], candidates)
    scores, flat = rows_WG.gather(-1, index_WK).flatten(-2).topk(candidates, dim=-1)
    highest = (best_G if whole is logits else whole).amax(-1, keepdim=True)
    total = (whole - highest).exp().sum(-1, keepdim=True).log() + highest
    tokens = flat // candidates * groups + chosen_K.gather(-1, flat % candidates)
    return scores - total, tokens


def _decode(
    model: nn.Module,
    token_R: Tensor,
    hidden_RSE: Tensor,
    self_mask: Tensor,
    cross_mask: Tensor,
    cache: EncoderDecoderCache,
) -> Tensor:
    named = cache_argument(type(model))
    assert named is not None, "a model that generates takes a cache"
    # Masks of four dimensions to be added are taken as they are, by every attention.
    output = model(
        decoder_input_ids=token_R[:, None],
        decoder_attention_mask=self_mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden_RSE),
        attention_mask=cross_mask,
        use_cache=True,
        **{named: cache},
    )
    logits_RV: Tensor = output.logits[:, -1]
    return logits_RV


def _tensors(layers: Sequence[_Layer]) -> list[Tensor]:
    return [*(layer.keys for layer in layers), *(layer.values for layer in layers)]


class _Layer(CacheLayerMixin):
    """A layer's cache. Its keys and values are tensors from the start, but for `_Recorded`."""

    is_compileable = True
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise AssertionError("masks are given whole")


class _Recorded(_Layer):
    """Keeps the keys and values of the first token, or of the source."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Fixed(_Layer):
    """Keys and values of the source."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("the cache says that it is complete")

    def get_seq_length(self) -> int:
        return self.keys.shape[2]  # type: ignore[no-any-return]


class _Written(_Layer):
    """Keys and values of the tokens read before, with room for more: written at `position`."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.position = position

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, cache_AHTND: Tensor, new_RH1D: Tensor) -> Tensor:
        new_AHND = beams_as_queries(new_RH1D, cache_AHTND.shape[0])
        return cache_AHTND.index_copy_(2, self.position, new_AHND[:, :, None]).flatten(2, 3)

    def get_seq_length(self) -> Any:
        return self.position[0]
