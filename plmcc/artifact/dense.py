"""An artifact as an ordinary model: tables decoded, layers merged, shared ones copied."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plmcc.diagnostics import error
from plmcc.utils.text import first_line


@torch.no_grad()
def densified(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same architecture that computes the same without plmcc.

    Args:
        model: an artifact that was loaded; it stays as it is.

    Raises:
        PlmccError: a part of it has another structure than its architecture can be built with.
    """
    kind, config = type(model), _plain_config(model)
    try:
        made: PreTrainedModel = kind._from_config(config, dtype=model.dtype)
    except Exception as problem:  # whatever an architecture makes of its configuration
        raise _refused(f"its configuration does not build it: {first_line(problem)}") from problem
    state, values = model.state_dict(), {}
    for name, wanted in made.state_dict().items():
        found = state.get(name)
        if found is None or found.shape != wanted.shape:
            found = _decoded(model, made, name)
        if found is None or found.shape != wanted.shape:
            raise _refused(f"{name} has another form than the architecture builds")
        values[name] = found.to(wanted.dtype)
    made.load_state_dict(values)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.train(False)
    return made


def _plain_config(model: PreTrainedModel) -> Any:
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("base_model_type", None)
    return CONFIG_MAPPING[model.config.model_type].from_dict(values)


def _decoded(model: PreTrainedModel, made: PreTrainedModel, name: str) -> Tensor | None:
    """Return a tensor that a rewritten module has as an attribute, such as the weight of a coded
    table."""
    path, _, attribute = name.rpartition(".")
    try:
        owner: Any = model.get_submodule(path)
    except AttributeError:
        return None
    value = getattr(owner, attribute, None)
    if value is None or attribute != "weight":
        return None
    dense: Tensor = value * 1  # of a lazy one, the values
    plain: nn.Module = made.get_submodule(path)
    return dense.T if isinstance(plain, Conv1D) else dense


def _refused(reason: str) -> Exception:
    message = "this artifact cannot be written as an ordinary checkpoint"
    hint = "load it with `import plmcc`, or export it to onnx or aoti"
    return error("PLM401", message, got=reason, hint=hint)
