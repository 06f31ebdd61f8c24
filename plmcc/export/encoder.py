"""The program of an encoder, with or without a head: what goes in, what comes out, and for which
sizes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.export.targets import PROGRAMS
from plmcc.inference.aoti import package
from plmcc.ir.probes import positions_of, vocabulary_of
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
"""What a program returns, as far as the model has it. A pooler is left out: many are random."""
_EXAMPLE = (2, 9)
# ExecuTorch sets memory aside for the largest input.
_MOST = {"batch": 8, "length": 512}


class Forward(nn.Module):
    """The forward pass that is exported: tensors in, a dictionary of tensors out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(  # noqa: D102, as the class says
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


def check_encoder(model: PreTrainedModel, to: str) -> None:
    """Refuse a model that writes text, or reads something else.

    Raises:
        PlmccError: it does.
    """
    kind = type(model).__name__
    if (
        model.config.is_encoder_decoder
        or model.can_generate()
        or model.main_input_name != INPUTS[0]
    ):
        also = " and translation models" if to == "aoti" else ""
        message = f"{kind} does not go to {to}: only encoders of text{also} do"
        hint = "use `plmcc.compile`"
        if model.config.is_encoder_decoder and to != "aoti":
            hint = "use `--to aoti`, or `plmcc.compile`"
        raise error("PLM401", message, model.config.name_or_path or kind, hint=hint)


def encoder_program(
    model: PreTrainedModel, to: str = "aoti"
) -> tuple[Forward, dict[str, Tensor], dict[str, Any]]:
    """Return what is exported of an encoder: module, example inputs, and for each of them its free
    dimensions, as `torch.export` takes them."""
    inputs = example(model, *_EXAMPLE)
    named = {n: Dim(n, min=low, max=high) for n, (low, high) in _dimensions(model, to).items()}
    free = dict(enumerate(named.values()))
    return Forward(model).eval(), inputs, dict.fromkeys(inputs, free)


def _dimensions(model: PreTrainedModel, to: str) -> dict[str, list[int | None]]:
    """Return the smallest and largest batch and length."""
    # A length of one token is a case of its own for torch.export.
    found: dict[str, list[int | None]] = {"batch": [1, None], "length": [2, longest(model)]}
    if to != "executorch":
        return found
    return {n: [low, min(high or _MOST[n], _MOST[n])] for n, (low, high) in found.items()}


def write_encoder(model: PreTrainedModel, folder: Path, to: str, int8: bool) -> Values:
    """Write the program of an encoder; return what the manifest says of its inputs and outputs.

    Args:
        model: on the device and in the dtype of the program.
        folder: where the program goes.
        to: a target.
        int8: onnx: let onnxruntime round linear layers.

    Raises:
        PlmccError: the model's code cannot be exported.
    """
    module, inputs, shapes = encoder_program(model, to)
    dimensions = _dimensions(model, to)
    with torch.no_grad():
        outputs = module(**inputs)
    file = folder / PROGRAMS[to]
    try:
        if to == "aoti":
            package((module, tuple(inputs.values()), tuple(shapes.values())), file)
        else:
            _portable(module, inputs, shapes, file, to, int8)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as problem:
        message = f"{type(model).__name__} cannot be exported to {to}: {first_line(problem)}"
        raise error("PLM401", message, hint="use `plmcc.compile`") from problem
    if to != "aoti":
        dimensions["length"][0] = 1  # where there is no case of its own
    limits = _values(model)
    return {
        "inputs": [_port(n, x, _EXAMPLE) | {"values": limits[n]} for n, x in inputs.items()],
        "outputs": [_port(n, x, _EXAMPLE) for n, x in outputs.items()],
        "dimensions": dimensions,
    }


def _portable(
    module: nn.Module,
    inputs: dict[str, Tensor],
    shapes: Values,
    file: Path,
    to: str,
    int8: bool,
) -> None:
    # Imported where they are needed: extras bring what they import.
    from plmcc.export.decompositions import quiet

    with quiet():
        if to == "onnx":
            from plmcc.export.onnx import write_onnx

            write_onnx(module, inputs, shapes, file, int8)
        else:
            from plmcc.export.executorch import write_executorch

            write_executorch(module, inputs, shapes, file)


def _port(name: str, value: Tensor, example: tuple[int, int]) -> Values:
    """What a manifest says of a tensor; sizes of the example stand for the free dimensions."""
    shape: list[int | str] = ["batch", *value.shape[1:]]
    if value.dim() > 1 and value.shape[1] == example[1]:
        shape[1] = "length"
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def example(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs of a program, with padding at the end of the last row: ids and mask, and types
    where the model tells texts apart."""
    random = torch.Generator().manual_seed(seed)
    limits = _values(model)
    ids = torch.randint(0, limits["input_ids"], (batch, length), generator=random)
    mask = torch.ones_like(ids)
    mask[-1, max(1, length - 2) :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in limits:
        types = torch.zeros_like(ids)
        types[:, length // 2 :] = 1
        inputs["token_type_ids"] = types
    return {name: value.to(model.device) for name, value in inputs.items()}


def _values(model: PreTrainedModel) -> dict[str, int]:
    """How many values each input of a program can have; the first of them is 0."""
    values = {"input_ids": vocabulary_of(model), "attention_mask": 2}
    types = getattr(model.config, "type_vocab_size", 0)
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        values["token_type_ids"] = types
    return values


def longest(model: PreTrainedModel) -> int | None:
    """Return how many tokens a text can have, None if there is no limit.

    RoBERTa and its like count positions from behind the padding token's number.
    """
    positions = positions_of(model)
    for path, module in model.named_modules():
        if positions and path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(positions, module.num_embeddings - skipped)
    return positions
