"""Checkpoints of a training: with them it goes on to the same bits as if nothing had happened.

Optimizer, schedule and random states are the Trainer's own files. The weights are `save_tensors`',
as a model in training is no checkpoint of transformers; beside them is what objectives and averages
have gathered. A checkpoint counts when its last file, `complete`, is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from plmcc.api import State
from plmcc.utils import distributed
from plmcc.utils.files import write_json

COMPLETE = "complete"
_VALUES, _TENSORS = "objectives.json", "objectives.safetensors"
_SECONDS = 300.0
_SHARE = 0.05
"""The most of the time that checkpoints may take."""
_TOGETHER = 20
"""Steps between two times that several processes ask the first one's clock."""


class Stateful(Protocol):
    """Something that gathers values in a training."""

    def state(self) -> State:
        """Return them."""

    def restore(self, state: State) -> None:
        """Take them back."""


class Timer(TrainerCallback):
    """Asks for a checkpoint every five minutes, or more rarely where that would take long."""

    def __init__(self) -> None:
        self._last, self._wait = time.monotonic(), _SECONDS

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Ask, if it is time."""
        if distributed.world_size() > 1 and state.global_step % _TOGETHER:
            return
        if distributed.broadcast_from_main(time.monotonic() - self._last >= self._wait):
            control.should_save = True

    def saved(self, seconds: float) -> None:
        """Hear that a checkpoint was written, and how long that took."""
        self._last, self._wait = time.monotonic(), max(_SECONDS, seconds / _SHARE)


def finish(folder: Path) -> None:
    """Make a checkpoint count."""
    (folder / COMPLETE).touch()


def latest(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole, if there is one, and remove those that are not."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))
    whole = [one for one in found if (one / COMPLETE).exists()]
    for one in found:
        if one not in whole:
            shutil.rmtree(one)
    return whole[-1] if whole else None


def save_states(folder: Path, parts: Sequence[Stateful]) -> None:
    """Write what the parts of a training have gathered."""
    states = [part.state() for part in parts]
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, state in enumerate(states)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, folder / _TENSORS)
    plain = [{n: v for n, v in state.items() if not isinstance(v, Tensor)} for state in states]
    write_json(folder / _VALUES, plain)


@torch.no_grad()
def load_states(folder: Path, parts: Sequence[Stateful]) -> None:
    """Give it back."""
    states: list[State] = json.loads((folder / _VALUES).read_text("utf-8"))
    for key, value in load_file(folder / _TENSORS).items():
        index, _, name = key.partition(".")
        states[int(index)][name] = value
    for part, state in zip(parts, states, strict=True):
        part.restore(state)
