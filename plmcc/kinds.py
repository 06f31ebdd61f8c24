"""What a module is, told by its code and parameters, never by its class name."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ATTENTION_CALLS = {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"}


def is_attention(module: nn.Module) -> bool:
    """Say whether a module computes attention itself: its code names an attention function.

    A wrapper around such a module (attention with its output projection and residual) is not one.
    """
    if isinstance(module, PreTrainedModel):
        return False  # whole models name attention functions to choose between them
    cls: Any = type(module)
    names = _names_in_code(cls)
    maps = [p for child in module.children() for p in child.parameters(recurse=False)]
    by_softmax = "softmax" in names and sum(p.dim() == 2 for p in maps) >= 2
    return not _ATTENTION_CALLS.isdisjoint(names) or by_softmax


def is_leaf(module: nn.Module) -> bool:
    """Say whether a layer graph calls this module as it is."""
    if not list(module.children()) or is_attention(module):
        return True
    is_library = type(module).__module__.startswith("torch.nn")
    return is_library and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def is_linear(module: nn.Module | None) -> bool:
    """Say whether a module is a linear map: `nn.Linear`, or GPT-2's transposed `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def is_norm(module: nn.Module | None) -> bool:
    """Say whether a module is a norm: all its parameters are vectors, its weight among them."""
    parameters = dict(module.named_parameters()) if module is not None else {}
    return "weight" in parameters and all(p.dim() == 1 for p in parameters.values())


@functools.cache
def _names_in_code(cls: Any) -> frozenset[str]:
    """Return the names that the methods of a model's class use, those of nn.Module left out."""
    own = [c for c in cls.__mro__ if not c.__module__.startswith("torch.")]
    methods = [inspect.unwrap(v) for c in own for v in vars(c).values() if inspect.isfunction(v)]
    return frozenset(name for method in methods for name in method.__code__.co_names)
