"""What transformers' exporters to ONNX and ExecuTorch need besides, for the code of passes."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from transformers.exporters.exporter_dynamo import DynamoExporter

_ATEN: Any = torch.ops.aten


def _right(value: Any, locations: Any) -> object:
    return torch.div(value, 2**locations, rounding_mode="floor")


def _left(value: Any, locations: Any) -> object:
    return value * 2**locations


def _int_mm(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    # In float32 sums of 8-bit products are exact up to 2^24, and near it beyond.
    return (a_NK.float() @ b_KM.float()).to(torch.int32)


_DECOMPOSED: dict[object, Callable[..., object]] = {
    _ATEN.__rshift__.Tensor: _right,
    _ATEN.__rshift__.Scalar: _right,
    _ATEN.__lshift__.Tensor: _left,
    _ATEN.__lshift__.Scalar: _left,
    _ATEN._int_mm.default: _int_mm,
}
"""What passes use and runtimes lack, in what they have."""


class Decomposed(DynamoExporter):
    """Comes between a transformers exporter and its base: the graph without those operations."""

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """Export a module, as the base does."""
        program, metadata = super().export_program(model, sample_inputs, config)
        return program.run_decompositions(_DECOMPOSED), metadata


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the terminal what the exporters tell of their progress and of versions, when they
    are imported too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
