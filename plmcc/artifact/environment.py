"""Versions and machine, as a lock and a manifest record them."""

from __future__ import annotations

import platform

import torch

from plmcc.utils.types import Values
from plmcc.utils.versions import installed

_LIBRARIES = (
    "plmcc",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    # A checkout on the path runs without being installed.
    found = {name: installed(name) or "not installed" for name in _LIBRARIES}
    return {"python": platform.python_version()} | found


def hardware() -> Values:
    """Return what the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "system": platform.system(),
    }
