"""Whether transformers loads a model without plmcc."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from plmcc.api import Hard, Soft
from plmcc.rewrite import View
from plmcc.utils.text import first_line


def needs_plmcc(model: PreTrainedModel) -> str:
    """Say why a model can only be loaded with plmcc; empty where its class, built from its
    configuration, has the same modules, shapes and shared tensors."""
    for path, module in model.named_modules():
        if isinstance(module, (Hard, Soft, View)):
            return f"{path} is a {type(module).__name__}"
    try:
        with torch.device("meta"):
            built: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config))
    except Exception as problem:  # whatever an architecture makes of its configuration
        return f"its configuration does not build it: {first_line(problem)}"
    had, has = ({n: v.shape for n, v in m.state_dict().items()} for m in (built, model))
    if had != has:
        name = next(n for n in (*had, *has) if had.get(n) != has.get(n))
        return f"its configuration does not build {name} in this shape"
    if _shared(built) != _shared(model):
        return "its layers share tensors"
    return ""


def _shared(model: PreTrainedModel) -> set[frozenset[str]]:
    """The names of each tensor that has several."""
    names: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
