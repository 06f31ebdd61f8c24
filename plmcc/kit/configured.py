"""Entries of a model's configuration that hold the sizes of its layers.

Which entry holds a size is tried out: a model built from the changed configuration, on the meta
device, has the wanted shapes, or it is another entry.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

Sizes = dict[str, int]
"""Values by dotted path in the configuration, such as `text_config.intermediate_size`."""
_WIDTHS = ("inner", "ffn", "ff", "intermediate")
_TRIES = 64


def live_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the different configuration objects of a model and the models in it."""
    found = {id(p.config): p.config for p in model.modules() if isinstance(p, PreTrainedModel)}
    return list(found.values())


def check_readable(config: PreTrainedConfig) -> None:
    """Read a configuration as from a file: some check there what they do not check in memory."""
    values = config.to_dict()
    for name in ("model_type", "base_model_type", "quantization_config"):
        values.pop(name, None)
    type(config).from_dict(json.loads(json.dumps(values)))


def sizes_for(
    model: PreTrainedModel,
    shapes: Mapping[str, Sequence[int]],
    changes: Sequence[tuple[str, int, int]],
) -> Sizes | None:
    """Return what entries have to be so that a model of this class has tensors of other shapes.

    Args:
        model: the model, of which the configuration says the present shapes.
        shapes: the wanted shapes by the names of tensors; all others stay.
        changes: for each size that changes, a word of its entries ("" for any), the size before,
            and the size that is wanted.

    Returns:
        None where no entries give these shapes.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted |= {name: tuple(shape) for name, shape in shapes.items()}
    choices = [_choices(model.config, *change) for change in changes]
    for combination in itertools.islice(itertools.product(*choices), _TRIES):
        sizes = {name: value for part in combination for name, value in part.items()}
        if _shapes(model, sizes) == wanted:
            return sizes
    return None


def configure(model: PreTrainedModel, sizes: Sizes) -> None:
    """Set entries of the configuration, also in the copies that parts of the model hold."""
    copies = live_configs(model)
    for path, value in sizes.items():
        holder, name = _holder(model.config, path)
        before = getattr(holder, name, None)
        for config in copies:
            if type(config) is type(holder) and getattr(config, name, None) == before:
                setattr(config, name, value)
        setattr(holder, name, value)


def _choices(config: PreTrainedConfig, word: str, before: int, after: int) -> list[Sizes]:
    """Return sets of entries that may hold a size: all that have its value, then each alone."""
    found, unset = [], []
    for path, value in _entries(config):
        name = path.rpartition(".")[2]
        if word in name and value == before and type(value) is int:
            found.append(path)
        elif value is None and not word and any(w in name for w in _WIDTHS):
            unset.append(path)  # GPT-2: four times the hidden size
    sets = [found] if found else []
    sets += [[path] for path in found if len(found) > 1] + [[path] for path in unset]
    return [dict.fromkeys(paths, after) for paths in sets]


def _entries(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _entries(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield prefix + name, value


def _holder(config: PreTrainedConfig, path: str) -> tuple[PreTrainedConfig, str]:
    """Return the object that holds an entry, and the name that it has there."""
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def _shapes(model: PreTrainedModel, sizes: Sizes) -> dict[str, tuple[int, ...]] | None:
    config = copy.deepcopy(model.config)
    for path, value in sizes.items():
        holder, name = _holder(config, path)
        setattr(holder, name, value)
    try:
        check_readable(config)
        with torch.device("meta"):
            trial: PreTrainedModel = type(model)._from_config(config)
    except Exception:  # whatever a configuration or model makes of values that do not fit
        return None
    return {name: tuple(value.shape) for name, value in trial.state_dict().items()}
