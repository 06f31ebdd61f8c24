"""What else passes are checked on: tiny models in half precision, with tied and with shared linear
layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from plmcc.ir.program import Program
from plmcc.ir.sharing import share
from plmcc.testing.tiny import NAMES, tiny


@dataclass(frozen=True)
class Variant:
    """A tiny model of an architecture, changed."""

    architecture: str
    change: Callable[[PreTrainedModel], None] = lambda model: None
    saved: bool = True
    """Whether it can be saved without the pass that would have made it."""

    def model(self) -> PreTrainedModel:
        """Return the model, the same with each call."""
        made = tiny(self.architecture)
        self.change(made)
        return made


def _half(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)  # type: ignore[arg-type]


def _tie(model: PreTrainedModel) -> None:
    """Give the query and the key of each attention one weight."""
    for site in Program(model).attention():
        found = getattr(site, "linears", {})
        if "q" in found and "k" in found:
            query, key = (model.get_submodule(found[role]) for role in ("q", "k"))
            key.weight = query.weight


def _share(model: PreTrainedModel) -> None:
    """Let the layers of each stack use the tensors of its first one."""
    for path in dict.fromkeys(p.rpartition(".")[0] for p in Program(model).layer_paths()):
        stack = model.get_submodule(path)
        names = [name for name, _ in stack.named_children()]
        share(stack, dict.fromkeys(names[1:], names[0]))


VARIANTS = {name: Variant(name) for name in NAMES} | {
    "bert_bfloat16": Variant("bert", _half),
    "t5_bfloat16": Variant("t5", _half),
    "bert_tied": Variant("bert", _tie, saved=False),
    "gpt2_shared": Variant("gpt2", _share, saved=False),
}
"""All models by name."""
