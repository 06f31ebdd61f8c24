"""What a configuration may ask for, looked at before anything is built from it.

A lock proves integrity, not origin: a configuration whose numbers fit nothing takes minutes and all
memory, inside transformers, before a tensor is looked at.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from plmcc.artifact.format import MOST_LAYERS, NEW
from plmcc.diagnostics import error
from plmcc.utils.files import read_json

_MOST = 100_000
"""So many labels or experts are made in no time."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_COUNT = re.compile(r"^_?(num|n)_|experts|heads|labels|depth")
_NO_COUNT = re.compile(r"position|token|vocab")


def check_config(folder: str | Path) -> None:
    """Refuse a local `config.json` with numbers that its weight files cannot hold.

    Raises:
        PlmccError: it cannot be read, or it has.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        return  # of the hub, or said by who looks for it
    try:
        values = read_json(file)
    except (OSError, ValueError) as problem:
        raise error("PLM401", f"config.json cannot be read: {problem}", str(folder)) from None
    if not isinstance(values, dict):
        return
    largest = 0
    for path, number in _numbers(values):
        key = path[-1]
        if not _COUNT.search(key) or _NO_COUNT.search(key):
            continue
        allowed = MOST_LAYERS if "layer" in key else _MOST
        if number > _MOST and "layer" not in key:
            largest = largest or _largest(Path(folder))
            allowed = max(allowed, largest)
        if number > allowed:
            message = "the weight files cannot hold what the configuration says"
            place = f"{file}: {'.'.join(path)}"
            raise error("PLM402", message, place, got=str(number), allowed=f"at most {allowed:,}")


def check_size(folder: str | Path, config: PreTrainedConfig, kind: Any) -> None:
    """Refuse a configuration that describes an ordinary model much larger than its weight files:
    what these lack would be allocated. (An artifact is looked at when its modules are built.)

    Raises:
        PlmccError: it does.
    """
    held = _held(Path(folder))
    if not held or getattr(config, "quantization_config", None) is not None:
        return
    build = getattr(kind, "_from_config", None) or kind.from_config
    try:
        with torch.device("meta"):
            model: torch.nn.Module = build(copy.deepcopy(config))
    except Exception:  # loading it says why
        return
    asked = sum(value.numel() for value in model.parameters())
    if asked > 2 * held + NEW:  # a value has at least half a byte
        message = "the configuration describes a model much larger than the weight files"
        given = f"{asked:,} parameters in {held:,} bytes"
        raise error("PLM402", message, f"{folder}/config.json", got=given)


def _held(folder: Path) -> int:
    """Return the bytes of the weight files."""
    return sum(file.stat().st_size for end in _WEIGHTS for file in folder.glob(f"*{end}"))


def _numbers(values: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Go through the integers of a configuration, with the keys that lead to them."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key not in ("quantization_config", "id2label", "label2id"):
                yield from _numbers(value, (*path, str(key)))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, path)
    elif type(values) is int and path:
        yield path, values


def _largest(folder: Path) -> int:
    """Return the largest dimension of the tensors in the weight files."""
    found = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # said when it is loaded
        found = max(found, *(size for shape in shapes for size in shape), 0)
    return found
