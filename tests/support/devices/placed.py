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

from plmcc import Pipeline
from plmcc.passes.compositional_codes import CompositionalCodes
from support import script
from support.devices.pretended import NAME, pretended, register
from support.tiny_models import tiny

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
    once = script("benchmarks/gpu/once.py")
    logits, tokens = once.applied(name, "cpu")
    with pretended() as seen, trainer_takes_it():
        model = once.compressed(name, DEVICE)
        seen.waits.clear()
        found, others = once.answered(name, model, DEVICE)
    waits = {" ".join(key): count for key, count in seen.waits.items() if "passes/" in key[2]}
    return {
        "name": name,
        "difference": float((found - logits).abs().max() / logits.abs().max()),
        "same_tokens": tokens is None or bool(torch.equal(tokens, others)),
        "waits": waits,
    }


def head_elsewhere() -> dict[str, Any]:
    """A head on another device than the coded table that it shares."""
    model: Any = tiny("qwen3")
    Pipeline([CompositionalCodes(codebooks=4, codewords=16, rounds=0)])(model)
    x_BLD = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(x_BLD)
        with pretended():
            model.to(DEVICE)
            found = model.lm_head(x_BLD.to(f"{NAME}:1"))
            place = str(found.device)
            difference = float((found.cpu() - expected).abs().max())
    return {"name": "a head elsewhere", "device": place, "difference": difference}


if __name__ == "__main__":
    register()
    for given in sys.argv[1:]:
        print(json.dumps(compare(given)), flush=True)
    print(json.dumps(head_elsewhere()), flush=True)
