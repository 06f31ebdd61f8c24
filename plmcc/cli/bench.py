"""`plmcc bench`: the latency and memory of a compressed model and of a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli.options import Artifact, Format, Output, print_json
from plmcc.diagnostics import did_you_mean, error

if TYPE_CHECKING:
    from plmcc.evaluation.benchmark import Benchmark, Footprint

_MODES = ["eager", "compiled"]
_BATCHES, _LENGTHS = [1, 32], [32, 128]
_Baseline = Annotated[
    str, typer.Option("--baseline", metavar="MODEL", help="The model to compare with.")
]
_Batch = Annotated[list[int], typer.Option("--batch", min=1, help="Batch size; repeatable.")]
_Length = Annotated[
    list[int], typer.Option("--length", min=1, help="Sequence length in tokens; repeatable.")
]
_Mode = Annotated[list[str], typer.Option("--mode", help="eager or compiled; repeatable.")]
_Seconds = Annotated[float, typer.Option(min=0.1, help="Duration of each measurement.")]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of CPU threads; by default what torch chooses.")
]


def bench(
    artifact: Artifact,
    baseline: _Baseline,
    batch: _Batch = _BATCHES,
    length: _Length = _LENGTHS,
    mode: _Mode = _MODES,
    seconds: _Seconds = 4.0,
    threads: _Threads = None,
    output: Output = Format.text,
) -> None:
    """Measure latency and memory of a compressed model and a baseline, in one process."""
    for name in mode:
        if name not in _MODES:
            hint, allowed = did_you_mean(name, _MODES), ", ".join(_MODES)
            raise error("PLM502", "unknown mode", "--mode", got=name, allowed=allowed, hint=hint)
    if not artifact.is_dir():
        raise error("PLM401", "the directory does not exist", str(artifact))

    import torch

    from plmcc.evaluation import benchmark as engine
    from plmcc.utils.terminal import calm

    calm()
    if threads:
        torch.set_num_threads(threads)
    found = engine.bench(
        artifact, baseline, batch, length, mode, seconds, lambda line: typer.echo(line, err=True)
    )
    verdict = engine.verdict(found)
    if output is Format.json:
        print_json(found.to_json() | {"verdict": verdict})
    else:
        _print(found, verdict)


def _print(found: Benchmark, verdict: str) -> None:
    from rich.table import Table

    from plmcc.utils.terminal import console

    table = Table("", "batch", "tokens", "baseline", "compressed", "rows/s", "time", "spread")
    for row in found.rows:
        times = [f"{1000 * value:.2f} ms" for value in (row.original, row.compressed)]
        rate = f"{row.batch / row.compressed:,.0f}"
        sizes = str(row.batch), str(row.length)
        table.add_row(row.mode, *sizes, *times, rate, f"x{row.ratio:.3f}", f"{row.spread:.3f}")
    console().print(table)
    typer.echo(f"baseline:   {_memory(found.baseline_footprint)}")
    typer.echo(f"compressed: {_memory(found.footprint)}")
    if any(row.mode == "compiled" for row in found.rows):
        typer.echo(f"compiled: {found.graph_breaks} graph breaks, {found.recompiles} recompiles")
    typer.echo(f"{found.device}, {found.threads} threads. {verdict}")


def _memory(footprint: Footprint) -> str:
    peak = footprint.peak_bytes / 1e6
    return f"loads in {footprint.load_seconds:.2f} s, peak memory {peak:,.0f} MB"
