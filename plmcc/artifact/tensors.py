"""The tensors of a live model in a safetensors file, each once, under the first of its names.

Unlike `save_pretrained` this holds any model as it is, between two passes or in the middle of a
training; it is read back into a model that has the same modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plmcc.diagnostics import error


@contextmanager
def writing(what: str, location: Path) -> Iterator[None]:
    """Turn what a full disk, or one that must not be written to, makes of the libraries into one
    sentence.

    Raises:
        PlmccError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        hint = "free disk space; finished work is kept, and --resume continues from there"
        raise error(
            "PLM501", f"{what} cannot be written: {reason}", str(location), hint=hint
        ) from None


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, a shared one under its first name only."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def save_tensors(model: nn.Module, file: Path) -> None:
    """Write them."""
    save_file({k: v.detach().contiguous() for k, v in unique_tensors(model).items()}, file)


@torch.no_grad()
def load_tensors(model: nn.Module, file: Path) -> None:
    """Read what `save_tensors` wrote; a tensor takes the dtype that the file has.

    Raises:
        ValueError: the model has other tensors than the file, or of other shapes.
    """
    saved, own = load_file(file), unique_tensors(model)
    if saved.keys() != own.keys():
        raise ValueError(f"the model has other tensors: {sorted(saved.keys() ^ own.keys())[:3]}")
    for name, value in own.items():
        if value.shape != saved[name].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)} in the model")
        if value.dtype == saved[name].dtype:
            value.copy_(saved[name])
        else:
            value.data = saved[name].to(value.device)
