"""Compressed attention (CAN): self-attention, cross-attention and feed-forward network of a decoder
layer become one sub-layer.

Li, Lin, Xiao and Zhu, "An Efficient Transformer Decoder with Compressed Sub-layers", AAAI 2021
(2101.00542). With decoder states X, encoder states H and U = LN(X) (post-norm: U = X):
A = softmax([Q·K_eᵀ ; Q·K_sᵀ] + mask) over all S + T keys, Q = U·W_q, K_s = U·W_ks, K_e = H·W_ke;
Z = act(A·[H·W_ve ; U·W_vs] + U·W_r), values and skip path of the feed-forward width f;
Y = X + Z·W_o (post-norm: LN(X + Z·W_o)). A gated network has two such Z, one of them activated.
It matches decoder layers whose residual branches are self-attention, cross-attention and
feed-forward network, pre-norm or post-norm, by dataflow. It saves sequential depth (one norm, one
softmax, two dependent GEMMs a layer), neither parameters nor operations, and its cache is larger
(d + f values a token instead of 2d). Stored: W_q, W_ks, W_vs, W_r as one matrix, W_ke, W_ve as
another, W_o.
Shapes: B sentences, T target tokens, S source tokens, P earlier and present target tokens, H heads,
K key width of a head, W value width of a head, D model width, F feed-forward width.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache

from plmcc.api import Hard, Miss, Pass, Program, Site, Soft
from plmcc.kit.attention import beams_as_queries, bias_of_places, queries_as_beams
from plmcc.passes.compressed_attention.layer import Parts, install, read
from plmcc.passes.compressed_attention.warm_start import Errors, warm_start


@dataclass(frozen=True)
class DecoderLayerSite(Site):
    """A decoder layer with its sub-layers taken apart."""

    parts: Parts = field(kw_only=True, repr=False)


class CompressedAttention(Pass):
    """Merge the sub-layers of decoder layers into one compressed-attention sub-layer each."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Li, Lin, Xiao and Zhu, AAAI 2021, arXiv:2101.00542"
    hazards: ClassVar[tuple[str, ...]] = (
        "It saves sequential depth, not parameters: a layer has about 19 % more weights.",
        "The key-value cache grows from 2d to d + f values a token (2.5 times where f = 4d).",
        "No warm start is exact for several heads: train afterwards, best with distillation.",
    )

    targets: str | list[str] = "decoder"
    """The layers to merge; layers without cross-attention are skipped."""
    activation: Literal["layer", "relu"] = "layer"
    """`layer`: the activation of the layer's own feed-forward network. `relu`: the paper's."""
    initialization: Literal["warm_start", "random"] = "warm_start"
    """`warm_start`: fitted to the outputs of the trained layer. `random`: the paper's."""
    warm_start_steps: int = Field(200, ge=0, le=100_000)
    """Warm start: gradient steps on the output of the layer after the least squares."""
    seed: int = Field(0, ge=0)
    """Seed of the random weights."""

    def needs_data(self) -> str:
        """The warm start is fitted to recorded calls of the layers."""
        if self.initialization == "random":
            return ""
        return "`initialization: warm_start` fits each layer to what it computes on data"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the decoder layers whose three sub-layers can be merged."""
        if not program.model.config.is_encoder_decoder:
            # Said once, and not that the default target names nothing.
            if self.targets != type(self).model_fields["targets"].default:
                program.resolve(self.targets, "layer", self.expect)
            reason = "it has no cross-attention: only an encoder-decoder has sub-layers to merge"
            yield Miss(type(program.model).__name__, reason)
            return
        for found in program.resolve(self.targets, "layer", self.expect):
            layer = found if isinstance(found, Miss) else program.layer(found.path)
            parts = layer if isinstance(layer, Miss) else read(layer)
            if isinstance(parts, Miss) or isinstance(found, Miss):
                yield cast(Miss, parts)
            else:
                yield DecoderLayerSite(
                    found.kind, found.paths, found.roles, found.modules, parts=parts
                )

    def replace(self, site: Site, program: Program) -> Soft:
        """Return the trainable merged sub-layer, at random or fitted to the layer's outputs."""
        assert isinstance(site, DecoderLayerSite)
        parts = site.parts
        weight = parts.up.weight
        # Every layer its own weights, the same in every run.
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.path.encode()))
        soft = SoftAttention(parts, self.activation, generator)
        soft.to(weight.device, weight.dtype)
        if self.initialization == "warm_start" and not weight.is_meta:
            calls = [call.arguments for call in program.data.record(site.path)]
            soft.errors = warm_start(soft, site.module, parts, calls, self.warm_start_steps)
        return soft


class _Attention(nn.Module):
    """What the trainable and the deployed form share: one softmax over the keys of both sides."""

    def __init__(self, num_heads: int, head_dim: int, gated: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.gated = num_heads, head_dim, gated
        self.scaling = head_dim**-0.5
        self.layer_idx: int | None = None
        self.attention_dropout = self.skip_dropout = self.activation_dropout = 0.0
        self.activation: nn.Module = nn.ReLU()
        self.position: nn.Module | None = None

    def adapt(self, parts: Parts, activation: str) -> None:
        """Take over from a layer what is not in any tensor of ours."""
        self.scaling, self.layer_idx = parts.scaling, parts.layer_idx
        self.attention_dropout, self.skip_dropout = parts.attention_dropout, parts.dropout
        self.activation_dropout = parts.activation_dropout
        self.activation = nn.ReLU() if activation == "relu" else parts.activation
        if "relative_attention_bias" in parts.self_attention._modules:
            # T5: the first layer computes the position bias for all; keep what it needs for that.
            self.position = copy.copy(parts.self_attention)
            table = parts.self_attention._modules["relative_attention_bias"]
            self.position.__dict__["_modules"] = {"relative_attention_bias": table}

    def project(self, u_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values and the skip path of decoder states."""
        raise NotImplementedError

    def project_memory(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of encoder states."""
        raise NotImplementedError

    def forward(
        self,
        u_BTD: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute the branch.

        Args:
            u_BTD: decoder states, normalized in a pre-norm layer.
            encoder_hidden_states: (B, S, D) states of the encoder.
            attention_mask: (B, 1, T, P), boolean (true: visible) or additive; None is causal.
            encoder_attention_mask: (B, 1, 1 or T, S), likewise; None shows all.
            past_key_values: an `EncoderDecoderCache`; the source side is computed once.
            position_bias: (1, H, T, P), added to the scores of target keys.

        Returns:
            the branch's output (B, T, D), the attention weights on target (B, H, T, P) and source
            (B, H, T, S), which sum to 1 together, and the position bias.
        """
        q, k, v, skip_BTF = self.project(u_BTD)
        q_BHTK = self._heads(q)
        past = self._past(past_key_values)
        k_BHPK, v_BHPW = self._target(k, v, past_key_values)
        k_BHSK, v_BHSW = self._source(encoder_hidden_states, past_key_values)
        beams = q_BHTK.shape[0] != k_BHPK.shape[0]  # compiled beam search: keys once a sentence
        if beams:
            q_BHTK = beams_as_queries(q_BHTK, k_BHPK.shape[0])
        if position_bias is None and self.position is not None:
            lengths = (q.shape[1], k_BHPK.shape[2])
            position_bias = self.position.compute_bias(  # type: ignore[operator]
                *lengths, device=q.device, past_seen_tokens=past
            )
        scores_BHTP = q_BHTK @ k_BHPK.transpose(-1, -2)
        if position_bias is not None:
            bias = bias_of_places(position_bias, q_BHTK.shape[2]) if beams else position_bias
            scores_BHTP = scores_BHTP + bias
        scores_BHTP = _masked(scores_BHTP, attention_mask, causal=True)
        scores_BHTS = _masked(q_BHTK @ k_BHSK.transpose(-1, -2), encoder_attention_mask)
        weights = torch.cat((scores_BHTS, scores_BHTP), -1).softmax(-1)
        weights = F.dropout(weights, self.attention_dropout, self.training)
        source_BHTS, target_BHTP = weights.split((k_BHSK.shape[2], k_BHPK.shape[2]), -1)
        # Two products, so that the source side is never copied behind the growing target side.
        mixed_BHTW = source_BHTS @ v_BHSW + target_BHTP @ v_BHPW
        mixed_BTHW = queries_as_beams(mixed_BHTW) if beams else mixed_BHTW.transpose(1, 2)
        inner_BTF = mixed_BTHW.flatten(2) + skip_BTF
        z_BTF = F.dropout(self._activate(inner_BTF), self.activation_dropout, self.training)
        output_BTD: Tensor = self.out_proj(z_BTF)  # type: ignore[operator]
        return output_BTD, target_BHTP, source_BHTS, position_bias

    def _activate(self, inner_BTF: Tensor) -> Tensor:
        if not self.gated:
            activated: Tensor = self.activation(inner_BTF)
            return activated
        gate, linear = inner_BTF.unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        product: Tensor = self.activation(gate) * linear
        return product.flatten(-2)

    def _heads(self, x_BTX: Tensor) -> Tensor:
        """Split into heads: (B, T, H·x) -> (B, H, T, x)."""
        heads: Tensor = x_BTX.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)

    def _past(self, cache: Any) -> object:
        """Return the number of target tokens in the cache."""
        if self.position is None or cache is None:
            return 0
        length = cache.get_seq_length(self.layer_idx)
        # A static cache counts in place, and the count before this call is wanted.
        return length.clone() if isinstance(length, Tensor) else length

    def _target(self, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._heads(k), self._heads(v)
        if cache is None:
            return keys, values
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        index = cast(int, self.layer_idx)
        return cast(tuple[Tensor, Tensor], own.update(keys, values, index))

    def _source(self, memory_BSD: Tensor, cache: object) -> tuple[Tensor, Tensor]:
        """Return keys and values of the encoder's states, computed once for a cache."""
        if not isinstance(cache, EncoderDecoderCache):
            k, v = self.project_memory(memory_BSD)
            return self._heads(k), self._heads(v)
        index = cast(int, self.layer_idx)
        if cache.is_updated.get(index):
            layer: Any = cache.cross_attention_cache.layers[index]
            return layer.keys, layer.values
        k, v = self.project_memory(memory_BSD)
        keys, values = cache.cross_attention_cache.update(self._heads(k), self._heads(v), index)
        cache.is_updated[index] = True
        return keys, values


def _masked(scores: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Apply a mask, (B, 1, T, keys); without one, hide the future if `causal`."""
    if mask is None:
        length, keys = scores.shape[-2:]
        if not causal or length == 1:
            return scores
        visible = torch.ones(length, keys, dtype=torch.bool, device=scores.device)
        mask = visible.tril(keys - length)
    elif mask.dim() != 4:
        raise ValueError(
            "compressed attention needs four-dimensional masks: load the model with "
            '`attn_implementation="sdpa"` or "eager"'
        )
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


class SoftAttention(Soft, _Attention):
    """The trainable form: every projection a linear of its own, initialized as in the paper."""

    def __init__(self, parts: Parts, activation: str, generator: torch.Generator) -> None:
        gated = parts.gate is not None
        _Attention.__init__(self, parts.num_heads, parts.head_dim, gated)
        self.adapt(parts, activation)
        self.kind, self.errors = activation, Errors()
        from_, cross = parts.projections, "cross_"
        width, inner = parts.up.in_features, parts.num_heads * parts.head_dim
        memory = from_[f"{cross}k"].in_features
        values = parts.up.out_features * (2 if gated else 1)

        def linear(inputs: int, outputs: int, like: nn.Linear) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=like.bias is not None)

        self.q_proj = linear(width, inner, from_["q"])
        self.k_proj = linear(width, inner, from_["k"])
        self.v_proj = linear(width, values, from_["v"])
        self.skip_proj = linear(width, values, parts.up)
        self.encoder_k_proj = linear(memory, inner, from_[f"{cross}k"])
        self.encoder_v_proj = linear(memory, values, from_[f"{cross}v"])
        self.out_proj = linear(parts.down.in_features, parts.down.out_features, parts.down)
        self._initialize(generator)

    def _initialize(self, generator: torch.Generator) -> None:
        """Xavier uniform with the fans of the fused matrices, and zero biases."""
        groups: list[list[nn.Linear]] = [
            [self.q_proj, self.k_proj, self.v_proj],
            [self.encoder_k_proj, self.encoder_v_proj],
            [self.skip_proj],
            [self.out_proj],
        ]
        for group in groups:
            fan = group[0].in_features + sum(linear.out_features for linear in group)
            for linear in group:
                bound = math.sqrt(6 / fan)
                nn.init.uniform_(linear.weight, -bound, bound, generator)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def project(self, u_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values and the skip path, with dropout before the last."""
        skip = self.skip_proj(F.dropout(u_BTD, self.skip_dropout, self.training))
        q = self.q_proj(u_BTD) * self.scaling
        return q, self.k_proj(u_BTD), self.v_proj(u_BTD), skip

    def project_memory(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of encoder states."""
        return self.encoder_k_proj(memory_BSD), self.encoder_v_proj(memory_BSD)

    def rewrite(self, program: Program, path: str) -> None:
        """Splice the branch into the layer's graphs."""
        install(program, path, self)

    def statistics(self) -> dict[str, float]:
        """Return the layer-wise errors of the warm start, and what the merge costs and saves."""
        weights = sum(p.numel() for p in self.parameters())
        cache = self.k_proj.out_features + self.v_proj.out_features
        sizes = {"parameters": float(weights), "cache_values_per_token": float(cache)}
        return sizes | self.errors.statistics()

    @torch.no_grad()
    def harden(self) -> Hard:
        """Return the fused form: the same function."""
        own = (self.q_proj, self.k_proj, self.v_proj, self.skip_proj)
        memory = (self.encoder_k_proj, self.encoder_v_proj)
        hard = MergedAttention(
            hidden_size=self.q_proj.in_features,
            memory_size=self.encoder_k_proj.in_features,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            intermediate_size=self.out_proj.in_features,
            gated=self.gated,
            bias=[int(any(p.bias is not None for p in group)) for group in (own, memory)]
            + [int(self.out_proj.bias is not None)],
            activation=self.kind,
        ).to(self.q_proj.weight.device, self.q_proj.weight.dtype)
        for name in ("scaling", "layer_idx", "activation", "position"):
            setattr(hard, name, getattr(self, name))
        for name in ("attention_dropout", "skip_dropout", "activation_dropout"):
            setattr(hard, name, getattr(self, name))
        _fuse(hard.in_proj, own)
        _fuse(hard.memory_proj, memory)
        _fuse(hard.out_proj, (self.out_proj,))
        # Queries are scaled once, in the weights.
        rows = slice(0, self.q_proj.out_features)
        hard.in_proj.weight[rows] *= self.scaling
        if hard.in_proj.bias is not None:
            hard.in_proj.bias[rows] *= self.scaling
        return hard


def _fuse(target: nn.Linear, parts: tuple[nn.Linear, ...]) -> None:
    target.weight.copy_(torch.cat([part.weight for part in parts]))
    if target.bias is not None:
        zeros = [part.weight.new_zeros(part.out_features) for part in parts]
        pairs = zip(parts, zeros, strict=True)
        target.bias.copy_(torch.cat([p.bias if p.bias is not None else z for p, z in pairs]))


class MergedAttention(Hard, _Attention):
    """The deployed form: one product for all that reads the decoder's states, one for the
    encoder's, one for the output. Queries come scaled out of the first."""

    def __init__(
        self,
        hidden_size: int,
        memory_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        gated: bool,
        bias: list[int],
        activation: str,
    ) -> None:
        _Attention.__init__(self, num_heads, head_dim, gated)
        self.layout = {
            "hidden_size": hidden_size,
            "memory_size": memory_size,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate_size,
            "gated": gated,
            "bias": bias,
            "activation": activation,
        }
        inner, values = num_heads * head_dim, intermediate_size * (2 if gated else 1)
        self.sizes = (inner, inner, values, values)
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=bool(bias[0]))
        self.memory_proj = nn.Linear(memory_size, inner + values, bias=bool(bias[1]))
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=bool(bias[2]))

    def project(self, u_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values and the skip path by one product."""
        q, k, v, skip = self.in_proj(u_BTD).split(self.sizes, -1)
        return q, k, v, skip

    def project_memory(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of encoder states by one product."""
        k, v = self.memory_proj(memory_BSD).split(self.sizes[1:3], -1)
        return k, v

    def rewrite(self, program: Program, path: str) -> None:
        """Take the place of the trainable form, or of the original layer's branches (loading)."""
        layer = program.layer(path)
        if not isinstance(layer, Miss):
            parts = read(layer)
            if isinstance(parts, Parts):
                self.adapt(parts, str(self.layout["activation"]))
        install(program, path, self)
