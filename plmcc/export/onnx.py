"""An encoder as an ONNX file for onnxruntime, by transformers' exporter (extra `onnx`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from plmcc.export.decompositions import Decomposed, quiet
from plmcc.utils.types import Values

_LARGEST = 1_900_000_000
"""Bytes of tensors that go into the file itself: protobuf ends at 2 GiB."""


class _Onnx(OnnxExporter, Decomposed):
    """To an ONNX graph."""


def write_onnx(
    module: nn.Module, inputs: dict[str, Tensor], shapes: Values, file: Path, int8: bool
) -> None:
    """Write a module as an ONNX file, with the tensors of a large one in a second file beside it.

    Args:
        module: called with `inputs` by name, returns a dictionary of tensors.
        inputs: an example.
        shapes: the free dimensions of each input, as `torch.export` takes them.
        file: where it goes.
        int8: quantize the weights of linear layers by output channel, and activations as they
            come (onnxruntime's dynamic quantization).
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
        large = sum(value.nbytes for value in module.state_dict().values()) > _LARGEST
        beside = f"{file.name}.data" if large else None
        importlib.import_module("onnx_ir").save(program, file, external_data=beside)
        if int8:
            _quantize(file, large)


def _quantize(file: Path, large: bool) -> None:
    quantization = importlib.import_module("onnxruntime.quantization")
    made = file.with_suffix(".int8")
    # Without VNNI instructions, sums of pairs of 8-bit products saturate: an output was off by 0.39
    # of its scale on such a processor. Weights of 7 bits are right on every one.
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    options |= {"use_external_data_format": large}
    quantization.quantize_dynamic(file, made, reduce_range=True, **options)
    made.replace(file)  # a second file keeps its name: the first one says where it is
    if large:
        file.with_name(f"{file.name}.data").unlink()
