"""Loading artifacts and lowering them: torch.compile, and AOTInductor for `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from plmcc.artifact.load import load
from plmcc.inference.aoti import CompiledPrograms
from plmcc.inference.generate import Generate, compilable


def compile(
    model: PreTrainedModel | str | Path, dynamic: bool = True, **options: object
) -> PreTrainedModel:
    """Compile a model, or an artifact, in place; `generate()` and all else stay.

    The forward pass goes through torch.compile. `generate` of an encoder-decoder runs programs of
    plmcc (`programs`): greedy and beam search give the tokens that transformers gives, and
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
    """Return whether at most two of every four neighboring weights of a row are not zero."""
    if weight_OI.shape[1] % 4:
        return False
    return bool((functional.avg_pool1d((weight_OI != 0).float(), 4) <= 0.5).all())
