"""Opening the program of an encoder in the runtime that it was exported for.

Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from plmcc.diagnostics import error
from plmcc.export.targets import PROGRAMS
from plmcc.inference.cuda_graphs import Run, load
from plmcc.utils.extras import library
from plmcc.utils.text import first_line


def open_program(
    folder: Path, target: str, device: str, inputs: Sequence[str], outputs: Sequence[str]
) -> Run:
    """Return what turns the inputs of a program into its outputs, both in the order of their names.

    Args:
        folder: of the export.
        target: what it was exported to.
        device: aoti: where it runs.
        inputs: their names.
        outputs: their names.

    Raises:
        PlmccError: the file is damaged, or the runtime is not installed.
    """
    file = folder / PROGRAMS[target]
    if target == "aoti":
        return open_aoti(file, device)
    return _onnx(file, inputs, outputs) if target == "onnx" else _executorch(file)


def open_aoti(file: Path, device: str, replayed: bool = False) -> Run:
    """Load an AOTInductor package (`plmcc.inference.cuda_graphs.load`).

    Raises:
        PlmccError: it is damaged.
    """
    try:
        return load(file, device, replayed)
    except RuntimeError as problem:
        message = f"a program of the export cannot be loaded: {first_line(problem)}"
        raise error("PLM402", message, str(file)) from None


def _onnx(file: Path, names: Sequence[str], wanted: Sequence[str]) -> Run:
    onnxruntime = library("onnxruntime", "onnx", "this", str(file))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as problem:  # the library has kinds of its own
        message = f"a program of the export cannot be loaded: {first_line(problem)}"
        raise error("PLM402", message, str(file)) from None
    taken = {port.name for port in session.get_inputs()}  # what the graph does not read is gone

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n in taken}
        return [torch.from_numpy(found) for found in session.run(list(wanted), given)]

    return run


def _executorch(file: Path) -> Run:
    executorch = library("executorch.runtime", "executorch", "this", str(file))
    program = executorch.Runtime.get().load_program(file)
    method = program.load_method("forward")

    def run(inputs: list[Tensor]) -> list[Tensor]:
        # The outputs are overwritten by the next call.
        return [found.clone() for found in method.execute(inputs)]

    return run
