"""What a training step costs under masks, relative to one without."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from plmcc.ir.probes import probe_inputs
from plmcc.models.source import load_source
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.rewrite import Replacement, match, replace_all

BATCH, LENGTH = 32, 64
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("MaP", {"method": "magnitude"}),
    ("MvP", {"method": "movement"}),
    ("MvP", {"method": "movement", "granularity": "hybrid", "density": 0.4}),
    ("SMvP", {"method": "soft_movement"}),
    ("L0", {"method": "l0"}),
)


class Training:
    """A model with its optimizer, stepped on the same batch."""

    def __init__(self, model: Any, done: list[Replacement], compiled: bool) -> None:
        self.model, self.inputs = model.train(), probe_inputs(model, BATCH, LENGTH)
        self.inputs["labels"] = torch.zeros(BATCH, dtype=torch.long, device=model.device)
        self.objectives = [one.objective for one in done if one.objective is not None]
        for objective in self.objectives:
            objective.begin(1000)
        self.ticks = 0
        self.optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
        self.run = torch.compile(model) if compiled else model

    def step(self) -> float:
        """Return the seconds of a step in the middle of the schedule."""
        start = time.perf_counter()
        self.ticks += 1
        for objective in self.objectives:
            objective.advance(0.5 + self.ticks / 1e6)  # the clock has to move
        output = self.run(**self.inputs)
        loss = output.loss
        for objective in self.objectives:
            extra = objective.loss(self.inputs, output, None)
            loss = loss if extra is None else loss + extra
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def bytes(self) -> int:
        """Return the memory of parameters, gradients and optimizer, after a step."""
        tensors = [t for p in self.model.parameters() for t in (p, p.grad) if t is not None]
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in [*tensors, *(v for v in states if torch.is_tensor(v))])


def step_rows(dense: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Time steps with and without masks in turn."""
    for compiled in (False, True):
        for name, options in SETTINGS:
            yield _row(dense, name, options, compiled, seconds)


def _row(
    dense: Path, name: str, options: dict[str, Any], compiled: bool, seconds: float
) -> dict[str, Any]:
    model = load_source(dense, "text-classification").model
    masked = copy.deepcopy(model)
    done = replace_all(masked, match(masked, [MovementPruning(**options)]))
    runs = [Training(model, [], compiled), Training(masked, done, compiled)]
    times = _in_turn([run.step for run in runs], seconds)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "part": "step",
        "method": name,
        "granularity": options.get("granularity", "weight"),
        "mode": "compiled" if compiled else "eager",
        "time_ratio": round(middle, 3),
        "spread": round(high - low, 3),
        "dense_seconds": round(statistics.median(times[0]), 4),
        "memory_ratio": round(runs[1].bytes() / runs[0].bytes(), 3),
    }


def _in_turn(steps: list[Callable[[], float]], seconds: float) -> list[list[float]]:
    for _ in range(2):  # compiling, and the optimizer's memory
        slowest = max(step() for step in steps)
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(min(200, max(5, int(seconds / (2 * slowest + 1e-9))))):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(steps[which]())
    return times
