"""Recipes on a pretended device: `python -m support.devices.placed CASE...`.

Each case of `benchmarks/gpu/once.py` is fitted, trained, hardened, run and generated from, on the
CPU and there. A line of JSON each: the largest difference of the outputs, whether the tokens are
the same, and where modules of the passes wait for the device when they are run.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from support.devices.agreement import once
from support.devices.pretended import NAME, pretended, register

DEVICE = f"{NAME}:0"


@contextlib.contextmanager
def trainer_takes_it() -> Iterator[None]:
    """Let accelerate and the Trainer take the pretended device for theirs."""
    real: Any = TrainingArguments._setup_devices

    class Device:
        def __get__(self, arguments: Any, owner: object = None) -> Any:
            if arguments is None:
                return self
            if "_set_up" not in vars(arguments):
                vars(arguments)["_set_up"] = True
                real.func(arguments)
            PartialState._shared_state["device"] = torch.device(DEVICE)
            return torch.device(DEVICE)

    with mock.patch.object(TrainingArguments, "_setup_devices", Device()):
        yield


def compare(name: str) -> dict[str, Any]:
    script = once()
    logits, tokens = script.applied(name, "cpu")
    with pretended() as seen, trainer_takes_it():
        model = script.compressed(name, DEVICE)
        seen.waits.clear()
        found, others = script.answered(name, model, DEVICE)
    waits = {" ".join(key): count for key, count in seen.waits.items() if "passes/" in key[2]}
    return {
        "name": name,
        "difference": float((found - logits).abs().max() / logits.abs().max()),
        "same_tokens": tokens is None or bool(torch.equal(tokens, others)),
        "waits": waits,
    }


if __name__ == "__main__":
    register()
    for given in sys.argv[1:]:
        print(json.dumps(compare(given)), flush=True)
