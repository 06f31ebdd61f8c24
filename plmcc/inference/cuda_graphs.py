"""Loading compiled programs, and replaying steps of a decoder as CUDA graphs.

Nothing here imports transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plmcc.utils.text import first_line

Run = Callable[[list[Tensor]], list[Tensor]]
Capture = Callable[[Run, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]
_MOVING = 3  # inputs of `programs.Step` that are new in each step: tokens, slots, position


def load(file: Path, device: str, replayed: bool = False) -> Run:
    """Load an AOTInductor package.

    Args:
        file: the package. It holds machine code, which is run.
        device: "cpu", "cuda" (the current GPU) or "cuda:N".
        replayed: run it as a CUDA graph where its caches stay in place, if it is on a GPU.

    Raises:
        RuntimeError: it is no package, or damaged.
    """
    place = torch.device(device)
    graphs = replayed and place.type == "cuda"
    index = -1 if place.index is None else place.index
    loaded = torch._inductor.aoti_load_package(str(file), graphs, device_index=index)
    # The callable that torch puts around the loader parses its signature in every call.
    run: Run = loaded.loader.boxed_run
    return CudaGraphStep(run) if graphs else run


class CudaGraphStep:
    """A step of the decoder whose kernels are launched as one CUDA graph.

    A graph reads and writes fixed addresses. Those of the caches change when they grow or when
    sentences end; the first call with new ones runs as usual, the second is captured, and from then
    on tokens, slots and position are copied to where the graph reads them. Its outputs are
    overwritten by the next call. Not for several threads at once.
    """

    def __init__(self, run: Run, capture: Capture | None = None) -> None:
        self._run = run
        self._capture = capture or captured
        self._key: tuple[object, ...] = ()
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run a step. `inputs` are those of `programs.DecoderStep`, the caches flat."""
        key = (
            *((x.shape, x.dtype) for x in inputs[:_MOVING]),
            *((x.data_ptr(), x.shape) for x in inputs[_MOVING:]),
        )
        if key != self._key:
            self._key, self._replay = key, None
            # The caches are kept, lest others get their addresses, and so are a graph's inputs.
            self._inputs = [x.clone() for x in inputs[:_MOVING]] + inputs[_MOVING:]
            return self._run(list(inputs))
        for own, given in zip(self._inputs[:_MOVING], inputs[:_MOVING], strict=True):
            own.copy_(given)
        if self._replay is None:
            try:
                self._replay, self._outputs = self._capture(self._run, self._inputs)
            except RuntimeError as problem:
                message = f"running without CUDA graphs: {first_line(problem)}"
                warnings.warn(message, stacklevel=2)
                self._capture = _uncaptured
                self._replay, self._outputs = _uncaptured(self._run, self._inputs)
        self._replay()
        return list(self._outputs)


def captured(run: Run, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """Return what replays a run on these inputs, and the outputs that it writes.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph):
        outputs = run(list(inputs))
    return graph.replay, outputs


def _uncaptured(run: Run, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    outputs: list[Tensor] = []

    def again() -> None:
        outputs[:] = run(list(inputs))

    return again, outputs
