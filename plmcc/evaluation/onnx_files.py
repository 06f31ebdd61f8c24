"""ONNX files in onnxruntime: their quality on data, and their time beside each other."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from plmcc.export.encoder import longest
from plmcc.ir.probes import vocabulary_of

SHAPES = ((1, 32), (32, 64))
"""Batches and lengths that files are timed with."""
_ROUNDS = 6
_STATES = "token_embeddings"


def opened(file: Path) -> Any:
    """Return a session of one thread on the processor."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def running(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """Return a model whose forward pass is a file.

    Args:
        model: what the file was exported from; it stays as it is.
        file: an encoder's, with or without a head.
    """
    session = opened(file)
    outputs = [port.name for port in session.get_outputs()]
    inputs = [port.name for port in session.get_inputs()]

    def forward(**given: object) -> ModelOutput:
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        fed = {name: value.cpu().numpy() for name, value in tensors.items()}
        fed.setdefault("token_type_ids", np.zeros_like(fed["input_ids"]))
        values = session.run(outputs, {name: fed[name] for name in inputs})
        found = dict(zip(outputs, map(torch.from_numpy, values), strict=True))
        if _STATES in found:
            found["last_hidden_state"] = found.pop(_STATES)
        return ModelOutput(found)

    copied = copy.copy(model)
    copied.forward = forward
    return copied


def speeds(
    original: Path,
    other: Path,
    model: PreTrainedModel,
    seconds: float = 3.0,
    tokens: int | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> dict[tuple[int, int], float]:
    """Return by batch and length how many times as fast as the original a file is.

    Args:
        original: a file.
        other: another file with the same inputs.
        model: that of one of the files.
        seconds: about how long each batch is timed.
        tokens: how many token ids both files know; by default those of the model.
        shapes: batches and lengths; a length is at most what the model reads.
    """
    known = tokens or vocabulary_of(model)
    sessions = [opened(original), opened(other)]
    most = longest(model) or SHAPES[-1][1]
    asked = dict.fromkeys((batch, min(length, most)) for batch, length in shapes)
    return {shape: _ratio(sessions, known, *shape, seconds) for shape in asked}


def _ratio(sessions: list[Any], tokens: int, batch: int, length: int, seconds: float) -> float:
    """The shortest time of each, in turn: what other processes take of the machine only adds."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tokens, (batch, length), generator=random)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["token_type_ids"] = torch.zeros_like(ids)
    fed = [{port.name: given[port.name].numpy() for port in s.get_inputs()} for s in sessions]
    for session, inputs in zip(sessions, fed, strict=True):
        session.run(None, inputs)
    best, rounds = [math.inf, math.inf], 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or rounds < _ROUNDS:
        for which in (0, 1) if rounds % 2 else (1, 0):
            start = time.perf_counter()
            sessions[which].run(None, fed[which])
            best[which] = min(best[which], time.perf_counter() - start)
        rounds += 1
    return best[0] / best[1]
