"""An encoder as one ONNX file for onnxruntime, by transformers' exporter (extra `onnx`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from plmcc.export.decompositions import Decomposed, quiet
from plmcc.utils.types import Values


class _Onnx(OnnxExporter, Decomposed):
    """To an ONNX graph."""


def write_onnx(
    module: nn.Module, inputs: dict[str, Tensor], shapes: Values, file: Path, int8: bool
) -> None:
    """Write a module as one ONNX file.

    Args:
        module: called with `inputs` by name, returns a dictionary of tensors.
        inputs: an example.
        shapes: the free dimensions of each input, as `torch.export` takes them.
        file: where it goes.
        int8: round the weights of linear layers, by output, and activations as they come
            (onnxruntime's dynamic quantization).
    """
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
    exporter: Any = _Onnx  # made for models, and for parts of them
    with quiet():
        program = exporter().export_program(module, dict(inputs), config)[0]
        free = map(str, program.graph.inputs[0].shape.dims)
        names = dict(zip(free, ("batch", "length"), strict=True))
        for port in (*program.graph.inputs, *program.graph.outputs):
            sizes = (names.get(str(size), size) for size in port.shape.dims)
            port.shape = type(port.shape)(list(sizes))
        importlib.import_module("onnx_ir").save(program, file)
        if int8:
            _round(file)


def _round(file: Path) -> None:
    quantization = importlib.import_module("onnxruntime.quantization")
    rounded = file.with_suffix(".int8")
    # Without VNNI instructions, sums of pairs of 8-bit products saturate: an output was off by 0.39
    # of its scale on such a processor. Weights of 7 bits are right on every one.
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    quantization.quantize_dynamic(file, rounded, reduce_range=True, **options)
    rounded.replace(file)
