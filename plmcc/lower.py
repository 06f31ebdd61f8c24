"""Loading artifacts and lowering them: torch.compile, and AOTInductor for `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from plmcc.artifact import METHOD
from plmcc.compiled import CompiledPrograms
from plmcc.diagnostics import PlmccError, error
from plmcc.generate import Generate, compilable
from plmcc.tasks import auto_class, task_of


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load an artifact by the class it was saved from.

    Args:
        folder: an artifact directory.
        options: passed on to `from_pretrained` (`dtype`, `device_map` ...).

    Raises:
        PlmccError: the folder is no artifact of plmcc, or it is damaged.
    """
    folder = Path(folder)
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(
            "PLM401", "there is no config.json", str(folder), cure="name an artifact directory"
        ) from None
    except (OSError, ValueError) as problem:
        raise error("PLM401", f"config.json cannot be read: {problem}", str(folder)) from None
    if not isinstance(values, dict) or values.get("model_type") != METHOD:
        raise error(
            "PLM401",
            "this model was not written by plmcc",
            str(folder),
            cure="use transformers to load it",
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        task = task_of((config.architectures or [""])[0], folder)
        kind = auto_class(task, config)
        model: PreTrainedModel = kind.from_pretrained(folder, config=config, **options)
    except (PlmccError, KeyboardInterrupt):
        raise
    except Exception as problem:  # whatever transformers does with a config that makes no sense
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        cure = "`plmcc verify` says which file was changed"
        raise error("PLM402", f"the artifact cannot be loaded: {reason}", str(folder),
                    cure=cure) from problem  # fmt: skip
    return model


def compile(
    model: PreTrainedModel | str | Path, dynamic: bool = True, **options: Any
) -> PreTrainedModel:
    """Compile a model, or an artifact, in place; `generate()` and all else stay.

    The forward pass goes through torch.compile. `generate` of an encoder-decoder runs programs of
    plmcc (`plmcc.programs`): greedy and beam search give the tokens that transformers gives, and
    whatever else is asked for is left to transformers, as are models whose attention or cache is
    their own. A program is compiled when it is first
    needed, for all batch sizes and lengths; it keeps the weights of that moment.

    On GPUs with kernels for 2:4 sparsity (compute capability 8.0 and above), linear layers in half
    precision of which two of every four weights are zero run through them.

    Args:
        model: a model, or the directory of an artifact.
        dynamic: compile the forward pass once for any batch size and length.
        options: passed on to `torch.compile`.

    Raises:
        PlmccError: as `load`.
    """
    if isinstance(model, (str, Path)):
        model = load(model)
    model.eval()
    _use_sparse_kernels(model)
    model.compile(dynamic=dynamic, **options)
    if compilable(model):
        generator: Any = Generate(model, CompiledPrograms(model))
        model.generate = generator
    return model


@torch.no_grad()
def _use_sparse_kernels(model: nn.Module) -> None:
    """Store the weights of linear layers that have the pattern as torch's semi-structured ones."""
    for module in model.modules():
        if type(module) is nn.Linear and _has_kernel(module.weight) and two_of_four(module.weight):
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)


def _has_kernel(weight: Tensor) -> bool:
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    # Whole tiles of the kernels in half precision.
    whole = weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0
    return whole and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def two_of_four(weight_OI: Tensor) -> bool:
    """Return whether at most two of every four neighbouring weights of a row are not zero."""
    if weight_OI.shape[1] % 4:
        return False
    return bool((functional.avg_pool1d((weight_OI != 0).float(), 4) <= 0.5).all())
