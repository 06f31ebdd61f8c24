"""A small random copy of a model: its architecture, config and tokenizer, with few layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from plmcc.diagnostics import error
from plmcc.ir.modules import stack_depths
from plmcc.models.source import Source, outline
from plmcc.planning.cost import cost
from plmcc.planning.plan import Plan, plan
from plmcc.recipe.load import Recipe

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


def reduced_copy(recipe: Recipe, source: Source, base: Any = None) -> tuple[Source, Plan]:
    """Return a reduced copy on which the rules of a recipe match, on the CPU, and its plan.

    It has two layers, or as many as the rules need (`keep: 6`, `expect: 12`); where that is still
    large, small widths too, if the architecture allows them. Weights are drawn by the recipe's
    seed.

    Args:
        recipe: what will be done to it.
        source: the model, on the meta device.
        base: the folder that relative data paths may start at besides the current one.

    Raises:
        PlmccError: the model is compressed already. If the rules match no reduced copy, the plan of
            the deepest one has the problems.
    """
    if getattr(source.model.config, "quantization_config", None) is not None:
        raise error(
            "PLM502",
            "a reduced copy needs an original model, but this one is compressed",
            source.name,
        )
    made: Plan | None = None
    for config in _configs(source.model, _least(recipe)):
        model = outline(config, type(source.model), {}, source.name)
        trial = replace(source, model=model, tokenizer=copy.deepcopy(source.tokenizer))
        made = plan(recipe, trial, base, brief=True)
        if not made.problems:
            reduced = replace(
                source, model=_drawn(source.model, config, recipe.seed), scratch=False
            )
            return reduced, made
    assert made is not None
    return source, made


def _least(recipe: Recipe) -> int:
    """The number of layers that the layer maps of distillation speak of."""
    trained = [stage.train for stage in recipe.steps() if stage.train]
    maps = [t.distill.layers for t in trained if t.distill and t.distill.layers]
    return max((max(m.values()) + 1 for m in maps), default=1)


def _configs(model: PreTrainedModel, least: int) -> Iterator[PreTrainedConfig]:
    """Yield configs of reduced copies, the smallest first."""
    stacks = set(stack_depths(model).values())
    deepest = max(stacks, default=1)
    depths = [d for d in _DEPTHS if least <= d < deepest] + [deepest]
    for depth in depths:
        config = _shortened(model.config, stacks, depth)
        whole = outline(config, type(model), {}, "the reduced copy")
        if sum(p.numel() for p in whole.parameters()) > _LARGE:
            small = _narrowed(config)
            if _works(small, model):
                yield small
        yield config


def _shortened(config: PreTrainedConfig, stacks: set[int], depth: int) -> PreTrainedConfig:
    """Return a config with at most `depth` layers in every stack."""
    short = copy.deepcopy(config)
    for part in {id(c): c for c in (short, short.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "layer" not in name or isinstance(value, bool):
                continue
            if isinstance(value, int) and value in stacks:
                setattr(part, name, min(value, depth))
            elif isinstance(value, list) and len(value) in stacks:
                setattr(part, name, value[:depth])
    return short


def _narrowed(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with small widths, as many query heads to a key-value head as before."""
    small = copy.deepcopy(config)
    known = small.to_dict()
    heads = next((known[name] for name in _HEADS if known.get(name)), _HEAD_COUNT)
    values: dict[str, int] = dict(_WIDTHS) | dict.fromkeys(_HEADS, _HEAD_COUNT)
    ratio = heads // (known.get("num_key_value_heads") or heads)
    values["num_key_value_heads"] = max(1, _HEAD_COUNT // ratio)
    for name, value in values.items():
        if isinstance(known.get(name), int):
            setattr(small, name, min(known[name], value))
    return small


def _works(config: PreTrainedConfig, model: PreTrainedModel) -> bool:
    """Whether the sizes fit together: the model is built, and runs, on the meta device."""
    try:
        built = outline(config, type(model), {}, "the reduced copy")
    except ValueError:
        return False
    return cost(built, 8).unknown == ""


def _drawn(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    set_seed(seed)
    build: Any = type(model)
    drawn: PreTrainedModel = build._from_config(copy.deepcopy(config), dtype=model.dtype)
    drawn.train(False)
    if drawn.dtype is torch.float16:  # processors compute little in it
        drawn.float()
    return drawn
