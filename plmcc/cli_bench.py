"""`plmcc bench`: a compressed model beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli_plan import Format, Output, print_json
from plmcc.diagnostics import error

if TYPE_CHECKING:
    from plmcc.bench_command import Benchmark, Footprint

_MODES = ["eager", "compiled"]
_BATCHES, _LENGTHS = [1, 32], [32, 128]


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model.")],
    baseline: Annotated[str, typer.Option("--baseline", help="What it is compared with.")],
    batch: Annotated[list[int], typer.Option("--batch", min=1, help="Repeatable.")] = _BATCHES,
    length: Annotated[
        list[int], typer.Option("--length", min=1, help="Tokens in a row; repeatable.")
    ] = _LENGTHS,
    mode: Annotated[
        list[str], typer.Option("--mode", help="eager, compiled; repeatable.")
    ] = _MODES,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 4.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    output: Output = Format.text,
) -> None:
    """Time a compressed model and another one, in turn, in one process."""
    for name in mode:
        if name not in _MODES:
            raise error("PLM502", "there is no such mode", "--mode", given=name,
                        allowed=", ".join(_MODES))  # fmt: skip
    if not artifact.is_dir():
        raise error("PLM401", "there is no such directory", str(artifact))

    import torch

    from plmcc import bench_command as engine
    from plmcc.terminal import calm

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

    from plmcc.terminal import console

    table = Table(
        "", "batch", "tokens", "baseline", "compressed", "rows a second", "time", "spread"
    )
    for row in found.rows:
        times = [f"{1000 * value:.2f} ms" for value in (row.original, row.compressed)]
        rate = f"{row.batch / row.compressed:,.0f}"
        sizes = str(row.batch), str(row.length)
        table.add_row(row.mode, *sizes, *times, rate, f"x{row.ratio:.3f}", f"{row.spread:.3f}")
    console().print(table)
    typer.echo(f"baseline:   {_needs(found.baseline_footprint)}")
    typer.echo(f"compressed: {_needs(found.footprint)}")
    if any(row.mode == "compiled" for row in found.rows):
        typer.echo(f"compiled: {found.graph_breaks} graph breaks, {found.recompiles} recompiles")
    typer.echo(f"{found.device}, {found.threads} threads. {verdict}")


def _needs(footprint: Footprint) -> str:
    peak = footprint.peak_bytes / 1e6
    return f"loads in {footprint.load_seconds:.2f} s, {peak:,.0f} MB at most while it runs"
