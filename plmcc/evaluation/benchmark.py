"""`plmcc bench`: a compressed model beside another one, in time and in memory.

Both are timed in turn in one process, eager and compiled, for each batch size and length. How long
each takes to load, and the most memory that it needs, is measured in a fresh process of its own.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.evaluation.decoding import LEAST, TOKENS, Decoding, measure_decoding
from plmcc.evaluation.latency import Latency, inputs_of, measure
from plmcc.models.source import Source, load_source
from plmcc.utils.types import Values

_SAME = 0.03
"""Part of the time within which two models count as equally fast."""


@dataclass(frozen=True)
class Footprint:
    """What one model needs in a process of its own."""

    load_seconds: float
    """From the weight files to a model in memory; imports are not counted."""
    peak_bytes: int
    """The most memory of the process, or on a GPU of its tensors, while the largest batch runs."""


@dataclass(frozen=True)
class Benchmark:
    """All that `plmcc bench` measures; times in seconds."""

    baseline: str
    compressed: str
    device: str
    threads: int
    rows: list[Latency]
    baseline_footprint: Footprint
    footprint: Footprint
    graph_breaks: int
    """Of the compressed model under torch.compile; the whole model is one graph where it is 0."""
    recompiles: int
    """Graphs of the compressed model beyond the first, over all batch sizes and lengths."""
    decoding: list[Decoding] = field(default_factory=list)
    """Of models that generate: the time of the prompt and of the tokens after it."""

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


def _check_readable(source: Source, length: int) -> None:
    """Check that a model reads so many tokens."""
    if source.model.main_input_name != "input_ids":
        message = "only models that read token ids are timed"
        raise error("PLM303", message, source.name, got=source.model.main_input_name)
    longest = source.max_length(length)
    if longest < length:
        raise error(
            "PLM303",
            "the model cannot read so many tokens",
            source.name,
            got=str(length),
            allowed=f"at most {longest}",
            hint="name shorter ones by --length",
        )


def bench(
    folder: Path,
    baseline: str,
    batches: Sequence[int] = (1, 32),
    lengths: Sequence[int] = (32, 128),
    modes: Sequence[str] = ("eager", "compiled"),
    seconds: float = 4.0,
    log: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure.

    Args:
        folder: an artifact, or any model directory.
        baseline: a model directory or hub id.
        batches: batch sizes.
        lengths: tokens in a row.
        modes: `eager`, `compiled`.
        seconds: about how long each measurement takes.
        log: called with what is being measured.

    Raises:
        PlmccError: a model cannot be loaded, reads something else than tokens, or not as many.
    """
    log("loading")
    compressed = load_source(folder)
    source = load_source(baseline, compressed.task)
    for one in (source, compressed):
        _check_readable(one, max(lengths))
    rows: list[Latency] = []
    decoding: list[Decoding] = []
    graph_breaks = recompiles = 0
    for mode, length in itertools.product(modes, lengths):
        log(f"{mode}, {length} tokens")
        timed = (tuple(batches), length, mode == "compiled", seconds)
        rows += measure(source.model, compressed.model, *timed)
        decoding += _decoding(source, compressed, batches, length, mode == "compiled", seconds, log)
    if "compiled" in modes:
        log("graphs")
        graph_breaks, recompiles = _graphs(compressed.model, batches, lengths)
    largest = str(max(batches)), str(max(lengths))
    log("memory")
    footprints = [_fresh(name, *largest) for name in (baseline, str(folder))]
    return Benchmark(
        source.name,
        str(folder),
        str(compressed.model.device.type),
        torch.get_num_threads(),
        rows,
        footprints[0],
        footprints[1],
        graph_breaks,
        recompiles,
        decoding,
    )


def _decoding(
    original: Source,
    compressed: Source,
    batches: Sequence[int],
    length: int,
    compiled: bool,
    seconds: float,
    log: Callable[[str], None],
) -> list[Decoding]:
    """Time the generation of models that generate, as far as they can after so long a prompt."""
    models = (original.model, compressed.model)
    if not all(model.can_generate() for model in models):
        return []
    wanted = length + TOKENS + 1
    taken = length if not models[0].config.is_encoder_decoder else 0
    room = min(one.max_length(wanted) for one in (original, compressed)) - taken - 1
    if room < LEAST:
        log(f"no room to generate after {length} tokens")
        return []
    log(f"{'compiled' if compiled else 'eager'}, generating after {length} tokens")
    return measure_decoding(*models, batches, length, compiled, seconds, min(TOKENS, room))


@torch.inference_mode()
def _graphs(
    model: PreTrainedModel, batches: Sequence[int], lengths: Sequence[int]
) -> tuple[int, int]:
    """Return how often the compiled model falls back to Python, and how often it is compiled
    again."""
    torch._dynamo.reset()
    counters.clear()
    model.compile(dynamic=True)
    for batch in batches:
        for length in lengths:
            model(**inputs_of([model], batch, length))
    breaks = sum(counters["graph_break"].values())
    return breaks, max(0, counters["stats"]["unique_graphs"] - 1 - breaks)


def _fresh(name: str, batch: str, length: str) -> Footprint:
    command = [sys.executable, "-m", "plmcc.evaluation.benchmark", name, batch, length]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise error("PLM402", f"a fresh process cannot run the model: {reason}", name)
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


@torch.inference_mode()
def footprint(name: str, batch: int, length: int) -> Footprint:
    """Load a model and run it once, in a process that has done nothing else."""
    start = time.perf_counter()
    model = load_source(name).model.eval()
    loaded = time.perf_counter() - start
    model(**inputs_of([model], batch, length))
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Footprint(round(loaded, 3), peak)


def verdict(found: Benchmark) -> str:
    """Say in plain words whether the compressed model is faster."""
    faster = [row for row in found.rows if row.ratio < 1 - _SAME - row.spread / 2]
    slower = [row for row in found.rows if row.ratio > 1 + _SAME + row.spread / 2]
    if not faster and not slower:
        return "No speed-up: it is as fast as the baseline, within the spread."
    best = max(found.rows, key=lambda row: 1 / row.ratio)
    if not slower:
        where = "everywhere" if len(faster) == len(found.rows) else "in some settings"
        return f"Faster {where}: up to {1 / best.ratio:.2f} times ({_where(best)})."
    worst = max(slower, key=lambda row: row.ratio)
    if not faster:
        return f"No speed-up: slower, up to {worst.ratio:.2f} times ({_where(worst)})."
    return (
        f"Faster in some settings, up to {1 / best.ratio:.2f} times ({_where(best)}), "
        f"and slower in others, up to {worst.ratio:.2f} times ({_where(worst)})."
    )


def _where(row: Latency) -> str:
    return f"{row.mode}, batch {row.batch}, {row.length} tokens"


if __name__ == "__main__":
    from plmcc.diagnostics import PlmccError

    try:
        print(json.dumps(asdict(footprint(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
    except PlmccError as problem:
        print(" ".join(problem.render().split()), file=sys.stderr)
        sys.exit(1)
