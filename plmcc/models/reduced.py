"""Small random copies of a model: its architecture with few layers and small widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from plmcc.artifact.verify import first_output
from plmcc.diagnostics import PlmccError
from plmcc.ir.modules import stack_depths
from plmcc.ir.probes import probe_inputs
from plmcc.models.source import outline

_DEPTHS = (2, 3, 4, 6, 8, 12)
_LARGE = 8_000_000
"""Parameters from which on widths are made small too."""
_WIDTHS = dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 64)
_WIDTHS |= dict.fromkeys(("head_dim", "d_kv"), 16) | {"embedding_size": 32}
_WIDTHS |= dict.fromkeys(
    (
        "intermediate_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "hidden_dim",
    ),
    128,
)
_HEADS = (
    "num_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
)
_HEAD_COUNT = 4


def reduced_configs(
    model: PreTrainedModel, least: int = 1, most: float = math.inf
) -> Iterator[PreTrainedConfig]:
    """Yield configs of reduced copies of a model, the smallest first, the last one as deep as it.

    Args:
        model: may be on the meta device.
        least: how many layers a copy has at least.
        most: how many parameters it has at most.
    """
    stacks = set(stack_depths(model).values())
    deepest = max(stacks, default=1)
    depths = [d for d in _DEPTHS if least <= d < deepest] + [deepest]
    for depth in depths:
        config = _shortened(model.config, stacks, depth)
        try:
            whole = outline(config, type(model), {}, "the reduced copy")
        except PlmccError:  # other entries depend on the number of layers
            continue
        count = sum(p.numel() for p in whole.parameters())
        if count > _LARGE:
            small = _narrowed(config)
            if _works(small, model, most):
                yield small
        if count <= most:
            yield config


def _shortened(config: PreTrainedConfig, stacks: set[int], depth: int) -> PreTrainedConfig:
    """Return a config with at most `depth` layers in every stack."""
    short = copy.deepcopy(config)
    for part in {id(c): c for c in (short, short.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if not ("layer" in name or "attention" in name) or isinstance(value, bool):
                continue
            if isinstance(value, int) and value in stacks and "layer" in name:
                setattr(part, name, min(value, depth))
            elif isinstance(value, list) and len(value) in stacks:
                setattr(part, name, value[:depth])
    return short


def _narrowed(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with small widths, as many query heads to a key-value head as before."""
    small = copy.deepcopy(config)
    known = small.to_dict()
    heads = next((known[name] for name in _HEADS if known.get(name)), _HEAD_COUNT)
    ratio = heads // (known.get("num_key_value_heads") or heads)
    shared = max(2, _HEAD_COUNT // ratio)  # of one, none can be removed
    values: dict[str, int] = dict(_WIDTHS) | dict.fromkeys(_HEADS, shared * ratio)
    values["num_key_value_heads"] = shared
    for name, value in values.items():
        if isinstance(known.get(name), int):
            setattr(small, name, min(known[name], value))
    return small


def _works(config: PreTrainedConfig, model: PreTrainedModel, most: float) -> bool:
    """Whether the sizes fit together, so that a model is built and runs."""
    try:
        built = outline(config, type(model), {}, "the reduced copy")
        if sum(p.numel() for p in built.parameters()) > most:
            return False
        made = drawn(model, config, 0)
        first_output(made, probe_inputs(made))
    except Exception:  # whatever an architecture makes of sizes that do not fit
        return False
    return True


def drawn(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model of the class of another, with another config and random weights."""
    set_seed(seed)
    build: Any = type(model)
    made: PreTrainedModel = build._from_config(copy.deepcopy(config), dtype=model.dtype)
    made.train(False)
    if made.dtype is torch.float16:  # processors compute little in it
        made.float()
    return made
