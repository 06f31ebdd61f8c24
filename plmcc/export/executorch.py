"""An encoder as an ExecuTorch program for XNNPACK, by transformers' exporter (extra
`executorch`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.exporters.configs import ExecutorchConfig
from transformers.exporters.exporter_executorch import ExecutorchExporter

from plmcc.export.decompositions import Decomposed, quiet
from plmcc.utils.types import Values


class _Executorch(ExecutorchExporter, Decomposed):
    """To an ExecuTorch program."""


def write_executorch(
    module: nn.Module, inputs: dict[str, Tensor], shapes: Values, file: Path
) -> None:
    """Write a module as an ExecuTorch program for XNNPACK; arguments as those of `write_onnx`."""
    config = ExecutorchConfig(dynamic=True, dynamic_shapes=shapes)
    exporter: Any = _Executorch
    with quiet():
        program = exporter().export_program(module, dict(inputs), config)[0]
        exporter.save_program(program, file)
