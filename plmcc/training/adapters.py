"""Low-rank adapters (LoRA): few parameters are trained beside frozen weights, and added to them at
the end. Hu et al., "LoRA", ICLR 2022 (2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plmcc.api import LinearSite, Soft
from plmcc.diagnostics import error
from plmcc.ir.program import Program
from plmcc.recipe.sections import Lora
from plmcc.utils.extras import library


def adapted(model: PreTrainedModel, asked: Lora) -> list[str]:
    """Return the paths of the linear layers that get an adapter: those that the targets name,
    except what a pass has replaced or masks.

    Raises:
        PlmccError: there are none.
    """
    owned = tuple(f"{path}." for path, part in model.named_modules() if isinstance(part, Soft))
    found = []
    for site in Program(model).resolve(asked.targets, "linear", location="train.trainable"):
        if not isinstance(site, LinearSite) or len(site.paths) > 1:
            continue
        inside = f"{site.path}.".startswith(owned) or parametrize.is_parametrized(site.module)
        if not inside and site.module.get_parameter("weight").is_floating_point():
            found.append(site.path)
    if not found:
        message = "no linear layer is left that could have an adapter"
        hint = "write `trainable: passes`, or `trainable: all`"
        raise error("PLM303", message, "train.trainable", got="lora", hint=hint)
    return found


def count(model: PreTrainedModel, asked: Lora) -> int:
    """Return how many parameters the adapters have."""
    linears = [model.get_submodule(path) for path in adapted(model, asked)]
    sizes = [sum(linear.get_parameter("weight").shape) for linear in linears]
    return int(asked.r * sum(sizes))


@contextmanager
def adapters(model: PreTrainedModel, asked: Lora) -> Iterator[None]:
    """Give linear layers adapters while a stage is trained, and merge them into the weights.

    All other parameters keep whether they are trained. Where the training fails, the weights stay
    as they were.

    Raises:
        PlmccError: peft is not installed, or no layer can have an adapter.
    """
    peft = library("peft", "peft", "`trainable: {lora: ...}`", "train.trainable")
    paths = adapted(model, asked)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    alpha = asked.r if asked.alpha is None else asked.alpha
    turned = isinstance(model.get_submodule(paths[0]), Conv1D)  # of GPT-2, all are
    options = {"r": asked.r, "lora_alpha": alpha, "lora_dropout": asked.dropout}
    config = peft.LoraConfig(**options, target_modules=paths, fan_in_fan_out=turned)
    peft.inject_adapter_in_model(config, model)
    kind = library("peft.tuners.lora.layer", "peft", "LoRA", "train.trainable").LoraLayer
    wrapped: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, kind)}
    assert set(wrapped) == set(paths), "peft matches other layers than it was told"
    bases = {id(p) for m in wrapped.values() for p in m.get_base_layer().parameters()}
    for name, parameter in model.named_parameters():
        if name in before and id(parameter) not in bases:
            parameter.requires_grad_(before[name])
    merge = False
    try:
        yield
        merge = True
    finally:
        for path, module in wrapped.items():
            if merge:
                module.merge()
            model.set_submodule(path, module.get_base_layer())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        for part in (model, *model.modules()):
            vars(part).pop("peft_config", None)
