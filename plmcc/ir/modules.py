"""What a module is, told by its code and parameters, never by its class name."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import typing
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ATTENTION_CALLS = {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"}

_CACHE_CALLS = {"get_seq_length", "is_updated", "self_attention_cache", "update"}
"""What code asks a cache for, and no other argument."""


def is_attention(module: nn.Module) -> bool:
    """Say whether a module computes attention itself: its code names an attention function.

    A wrapper around such a module (attention with its output projection and residual) is not one.
    """
    if isinstance(module, PreTrainedModel):
        return False  # whole models name attention functions to choose between them
    cls: object = type(module)
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


def cache_argument(cls: type[nn.Module]) -> str | None:
    """Return the name of the argument of `forward` that holds the keys and values of earlier
    tokens, or None.

    Its name has changed more than once (`past_key_value`, `past_key_values`, `cache`), so it is
    told by its annotation, or by what the code asks it for.
    """
    found: object = cls
    return _cache_argument(found)


@functools.cache
def _cache_argument(cls: Any) -> str | None:
    forward = inspect.unwrap(cls.forward)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    typed = [p.name for p in named if _is_cache(p.annotation)]
    asked = _asked_for(forward, _CACHE_CALLS) if not typed else set()
    found = typed or [p.name for p in named if p.name in asked]
    return found[0] if len(found) == 1 else None


def _is_cache(annotation: object) -> bool:
    kinds = typing.get_args(annotation) or (annotation,)
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds)


def _asked_for(function: Any, attributes: set[str]) -> set[str]:
    """Return the names of which a function's source reads one of the attributes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # code that was made while running
        return set()
    read = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in attributes]
    return {n.value.id for n in read if isinstance(n.value, ast.Name)}


def checkpoint_activations(model: PreTrainedModel, on: bool = True) -> None:
    """Let a model compute the activations of its layers again in the backward pass, or no longer.

    transformers called that gradient checkpointing once, and warns of the old name now.
    """
    live: Any = model
    names = set(dir(type(model)))
    kind = "activation" if "activation_checkpointing_enable" in names else "gradient"
    if on:
        getattr(live, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(live, f"{kind}_checkpointing_disable")()


@functools.cache
def _names_in_code(cls: Any) -> frozenset[str]:
    """Return the names that the methods of a model's class use, those of nn.Module left out."""
    own = [c for c in cls.__mro__ if not c.__module__.startswith("torch.")]
    methods = [inspect.unwrap(v) for c in own for v in vars(c).values() if inspect.isfunction(v)]
    return frozenset(name for method in methods for name in method.__code__.co_names)


def stack_depths(model: nn.Module) -> dict[str, int]:
    """Return the length of every list of modules that lies in no other list, by its path."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(p.isdigit() for p in path.split("."))
    }


def output_depth(config: PreTrainedConfig) -> int:
    """Return the number of layers of the stack that makes the output: of an encoder-decoder, those
    of its decoder."""
    config = config.get_text_config()
    for name in ("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else ():
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(config.num_hidden_layers)
