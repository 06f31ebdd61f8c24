"""Small random copies of a model: its architecture with few layers and small widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from plmcc.artifact.verify import first_output
from plmcc.diagnostics import PlmccError
from plmcc.ir.modules import stack_depths
from plmcc.ir.probes import probe_inputs
from plmcc.models.source import outline

_DEPTHS = (2, 3, 4, 6, 8, 12)
_LARGE = 1_000_000
"""Parameters from which on widths are made small too."""
_STATES = ("hidden_size", "d_model", "n_embd", "dim")
_WIDTH, _STEP = 64, 32
"""Of states: the least multiple of the heads, and of what 4-bit weights are grouped by."""
_WIDTHS = dict.fromkeys(("head_dim", "d_kv"), 16) | {"embedding_size": 32}
_WIDTHS |= dict.fromkeys(
    (
        "intermediate_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "d_ff",
        "dff",
        "dim_ff",
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


@dataclass(frozen=True)
class Reducible:
    """What reduced copies of a model are made from: it may be changed meanwhile."""

    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype
    depths: frozenset[int]
    """Numbers of layers of its stacks."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Reducible:
        """Take it from a model, which may be on the meta device."""
        depths = frozenset(stack_depths(model).values())
        return cls(type(model), copy.deepcopy(model.config), model.dtype, depths)

    def configs(
        self, least: int = 1, most: float = math.inf, *, run: bool = True
    ) -> Iterator[PreTrainedConfig]:
        """Yield configs of reduced copies, the smallest first, the last one as deep as the model.

        Args:
            least: how many layers a copy has at least.
            most: how many parameters it has at most.
            run: leave out those with small widths that cannot be run.
        """
        deepest = max(self.depths, default=1)
        for depth in [*(d for d in _DEPTHS if least <= d < deepest), deepest]:
            config = _shortened(self.config, self.depths, depth)
            count = self._count(config)
            small = _narrowed(config) if _LARGE < count < math.inf else None
            if (
                small is not None
                and self._count(small) <= most
                and not (run and self._fails(small))
            ):
                yield small
            if count <= most and count < math.inf:
                yield config

    def drawn(self, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
        """Return a copy with random weights, on the CPU."""
        set_seed(seed)
        build: Any = self.kind
        made: PreTrainedModel = build._from_config(copy.deepcopy(config), dtype=self.dtype)
        made.train(False)
        if made.dtype is torch.float16:  # processors compute little in it
            made.float()
        return made

    def _count(self, config: PreTrainedConfig) -> float:
        """The parameters of a copy; infinity where its sizes do not fit together."""
        try:
            built = outline(config, self.kind, {}, "the reduced copy")
        except PlmccError:  # other entries depend on the number of layers, say
            return math.inf
        return sum(p.numel() for p in built.parameters())

    def _fails(self, config: PreTrainedConfig) -> bool:
        try:
            made = self.drawn(config, 0)
            first_output(made, probe_inputs(made))
            with TemporaryDirectory() as folder:  # transformers checks some configs there only
                made.config.save_pretrained(folder)
        except Exception:  # whatever an architecture makes of sizes that do not fit
            return True
        return False


def _shortened(config: PreTrainedConfig, stacks: frozenset[int], depth: int) -> PreTrainedConfig:
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
    step = math.lcm(shared * ratio, _STEP)
    width = -(-_WIDTH // step) * step
    values: dict[str, int] = dict(_WIDTHS) | dict.fromkeys(_HEADS, shared * ratio)
    values |= dict.fromkeys(_STATES, width)
    values["num_key_value_heads"] = shared
    for name, value in values.items():
        if isinstance(known.get(name), int):
            setattr(small, name, min(known[name], value))
    return small
