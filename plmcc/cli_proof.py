"""`plmcc verify` and `plmcc reproduce`: what an artifact is, and that it can be made again."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from plmcc.cli_plan import Format, Output, print_json


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="What plmcc has written.")],
    output: Output = Format.text,
) -> None:
    """Prove that an artifact is what was written, and that it computes what it did then."""
    from plmcc import seal

    if artifact.is_dir():
        seal.check(artifact)  # at once, before torch is imported

    from plmcc.terminal import calm
    from plmcc.verify import prove

    calm()
    proof = prove(artifact)
    if output is Format.json:
        print_json({"ok": True, "folder": str(artifact)} | asdict(proof))
        return
    typer.echo(f"{artifact}: verified")
    typer.echo(f"  {proof.files} files as they were written")
    typer.echo(f"  {proof.tensors} tensors, none missing, left over or random")
    typer.echo(f"  outputs within {proof.difference:.1e} of their scale")
    if proof.generates:
        typer.echo("  the same tokens with cache and without")
    for name in proof.unknown:
        typer.echo(f"  note: nothing records {name}")


def reproduce(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="What plmcc has written.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The original, if it is not where it was.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="DIR", help="Where paths of data start.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Keep the second result.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Points that a metric may differ by.")
    ] = 0.1,
    output: Output = Format.text,
) -> None:
    """Run the recipe of an artifact again, and compare: to the bit, and in every metric."""
    from plmcc import seal

    seal.read(artifact)  # at once, before torch is imported

    from plmcc.reproduce import reproduce as run_again
    from plmcc.terminal import calm

    calm()
    text = output is Format.text
    with (
        tempfile.TemporaryDirectory(prefix="plmcc-reproduce-") as place,
        nullcontext() if text else redirect_stdout(sys.stderr),  # the Trainer prints
    ):
        target = folder or Path(place) / artifact.resolve().name
        found = run_again(artifact, target, model, base, typer.echo if text else lambda _: None)
    same = found.within(tolerance)
    if not text:
        print_json({"ok": same, "folder": str(artifact)} | found.to_json())
    elif found.identical:
        typer.echo(f"{artifact}: reproduced to the bit")
    else:
        typer.echo(f"{artifact}: {'reproduced, not to the bit' if same else 'not reproduced'}")
        typer.echo(f"  weights differ by up to {found.difference:.2e} of their tensor's largest")
        if found.stage:
            typer.echo(f"  from the stage {found.stage} on")
    for one in found.metrics if text else ():
        typer.echo(f"  {one.metric} on {Path(one.data).name}: {one.then:.2f}, now {one.now:.2f}")
    if not same:
        raise typer.Exit(1)
