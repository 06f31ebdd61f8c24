"""Opening the program of an encoder in the runtime that it was exported for.

Nothing here imports transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from plmcc.diagnostics import error
from plmcc.export_targets import PROGRAMS
from plmcc.extras import library
from plmcc.manifest import Manifest
from plmcc.replay import Run, load


def open_program(folder: Path, manifest: Manifest) -> Run:
    """Return what turns the inputs of a program into its outputs, both in the manifest's order.

    Raises:
        PlmccError: the file is damaged, or the runtime is not installed.
    """
    file = folder / PROGRAMS[manifest.target]
    if manifest.target == "aoti":
        return open_aoti(file, manifest.device)
    return _onnx(file, manifest) if manifest.target == "onnx" else _executorch(file)


def open_aoti(file: Path, device: str, replayed: bool = False) -> Run:
    """Load an AOTInductor package (`plmcc.replay.load`).

    Raises:
        PlmccError: it is damaged.
    """
    try:
        return load(file, device, replayed)
    except RuntimeError as problem:
        line = (str(problem).strip() or "damaged").splitlines()[0]
        message = f"a program of the export cannot be loaded: {line}"
        raise error("PLM402", message, str(file)) from None


def _onnx(file: Path, manifest: Manifest) -> Run:
    onnxruntime = library("onnxruntime", "onnx", "this", str(file))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [port["name"] for port in manifest.inputs]
    wanted = [port["name"] for port in manifest.outputs]
    taken = {port.name for port in session.get_inputs()}  # what the graph does not read is gone

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n in taken}
        return [torch.from_numpy(found) for found in session.run(wanted, given)]

    return run


def _executorch(file: Path) -> Run:
    executorch = library("executorch.runtime", "executorch", "this", str(file))
    program = executorch.Runtime.get().load_program(file)
    method = program.load_method("forward")

    def run(inputs: list[Tensor]) -> list[Tensor]:
        # The outputs are overwritten by the next call.
        return [found.clone() for found in method.execute(inputs)]

    return run
