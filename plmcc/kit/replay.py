"""Layers that run one by one on calibration data, while what is below them is being changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from plmcc.ir.calibration import Calibration, Call, observing
from plmcc.utils.types import Values


class Replay:
    """The layers of a stack in their order. Each reads what the layers before it return now, not
    what they returned when the model was run.

    The model runs once on all data; of every layer the arguments are kept, of the first the hidden
    states too: (rows, L, D) of memory for all data. Where the layers are no chain, in which each
    reads the output of the one before, the whole model runs anew for every question.
    """

    def __init__(self, data: Calibration, layers: Sequence[nn.Module]) -> None:
        self.data, self.layers = data, layers
        self.states: list[Tensor] = []
        self.chained = True
        self._arguments: list[list[Values]] = [[] for _ in layers]
        self._names: list[str] = []
        numbers = {layer: index for index, layer in enumerate(layers)}
        last: list[Tensor] = []

        def note(layer: nn.Module, call: Call) -> None:
            index, x = numbers[layer], call.input
            name = next(n for n, v in call.arguments.items() if v is x)
            if index == 0:
                self.states.append(x)
            elif not last or last[0] is not x:
                self.chained = False
            last[:] = [call.result]
            self._names.append(name)
            self._arguments[index].append({n: v for n, v in call.arguments.items() if n != name})

        data.observe(layers, note)
        counts = {len(calls) for calls in self._arguments}
        self.chained &= counts == {len(data.data.batches)}

    def observe(
        self, index: int, modules: Iterable[nn.Module], note: Callable[[nn.Module, Call], None]
    ) -> None:
        """Run a layer, given by its number, on all data, and call `note` after each call of one of
        the modules in it. Layers before it must have been passed by `advance`."""
        if not self.chained:
            self.data.observe(modules, note)
            return
        with observing(modules, note):
            for batch in range(len(self.states)):
                self._run(index, batch)

    def advance(self, index: int) -> None:
        """Let the next layer read what this one returns now."""
        if self.chained:
            for batch in range(len(self.states)):
                self.states[batch] = self._run(index, batch)

    def _run(self, index: int, batch: int) -> Tensor:
        layer, mode = self.layers[index], self.layers[index].training
        given = {self._names[0]: self.states[batch], **self._arguments[index][batch]}
        try:
            layer.eval()
            with torch.no_grad(), self.data.masked(batch):
                found = layer(**given)
        finally:
            layer.train(mode)
        made = found[0] if isinstance(found, tuple) else found
        assert isinstance(made, Tensor)
        return made
