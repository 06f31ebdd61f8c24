"""`plmcc verify`, `reproduce` and `diff`: whether artifacts and models are what they should be."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli.options import Artifact, Format, Output, print_json
from plmcc.cli.recipes import check_model
from plmcc.diagnostics import error

if TYPE_CHECKING:
    from plmcc.pipeline.reproduce import Reproduced


def verify(artifact: Artifact, output: Output = Format.text) -> None:
    """Verify the checksums of an artifact, its tensors, and its outputs in a fresh process."""
    from plmcc.artifact import lock

    if not artifact.is_dir():
        raise error("PLM401", "the directory does not exist", str(artifact))
    lock.check(artifact)  # before torch is imported

    from plmcc.artifact.verify import prove
    from plmcc.utils.terminal import calm

    calm()
    proof = prove(artifact)
    if output is Format.json:
        print_json({"ok": True, "folder": str(artifact)} | asdict(proof))
        return
    typer.echo(f"{artifact}: verified")
    typer.echo(f"  {proof.files} files with the recorded checksums")
    typer.echo(f"  {proof.tensors} tensors; none is missing, unexpected or random")
    typer.echo(f"  relative difference of the outputs: {proof.difference:.1e}")
    if proof.generates:
        typer.echo("  the same tokens with the cache and without")
    if proof.texts:
        typer.echo(f"  the recorded {' and '.join(proof.texts)} of texts")
    for name in proof.unknown:
        typer.echo(f"  note: {name} is not in the lock file")


def push(
    artifact: Artifact,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name on the hub: OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create it as a private repository.")
    ] = False,
) -> None:
    """Verify an artifact, and upload it to the Hugging Face Hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as problem:
        allowed = "OWNER/NAME, of letters, digits and ._-"
        message = f"this is no name of the hub: {problem}".splitlines()[0]
        raise error("PLM502", message, "NAME", got=name, allowed=allowed) from None
    verify(artifact, Format.text)

    from huggingface_hub import HfApi

    api = HfApi()
    try:
        typer.echo(f"uploading to {api.endpoint}/{name}", err=True)
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=artifact)
    except OfflineModeIsEnabled:
        hint = "unset HF_HUB_OFFLINE"
        raise error("PLM502", "the hub cannot be reached offline", name, hint=hint) from None
    except (HfHubHTTPError, OSError) as problem:
        reason = " ".join(str(problem).split())[:300]
        hint = "`hf auth login` stores a token; check the name and your rights"
        raise error("PLM501", f"the upload failed: {reason}", name, hint=hint) from None
    typer.echo(f"uploaded: {made}")


_Root = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        help="Directory that relative paths start from; by default the current one.",
    ),
]
_Outside = Annotated[
    bool,
    typer.Option(
        "--allow-outside",
        help="Read also what the recipe names by absolute paths or outside of that directory, "
        "and definitions of lm_eval tasks, which may run code.",
    ),
]
_Second = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Keep the second result here.")
]
_Tolerance = Annotated[
    float, typer.Option("--tolerance", min=0, help="Largest difference of a metric, in points.")
]


def reproduce(
    artifact: Artifact,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The original model, if it is no longer where it was."),
    ] = None,
    data_root: _Root = None,
    allow_outside: _Outside = False,
    folder: _Second = None,
    tolerance: _Tolerance = 0.1,
    output: Output = Format.text,
) -> None:
    """Run the recipe of an artifact again; compare the weights bit by bit, and all metrics."""
    from plmcc.artifact import lock

    lock.read(artifact)  # before torch is imported

    from plmcc.pipeline.reproduce import reproduce as run_again
    from plmcc.utils.terminal import calm

    calm()
    text = output is Format.text
    with (
        tempfile.TemporaryDirectory(prefix="plmcc-reproduce-") as location,
        nullcontext() if text else redirect_stdout(sys.stderr),  # the Trainer prints
    ):
        target = folder or Path(location) / artifact.resolve().name
        say = typer.echo if text else lambda _: None
        found = run_again(artifact, target, model, data_root, allow_outside=allow_outside, log=say)
    same = found.within(tolerance)
    if text:
        _print(artifact, found, same)
    else:
        print_json({"ok": same, "folder": str(artifact)} | found.to_json())
    if not same:
        raise typer.Exit(1)


def _print(artifact: Path, found: Reproduced, same: bool) -> None:
    if found.identical:
        typer.echo(f"{artifact}: reproduced; the weights are identical")
    else:
        verdict = "reproduced within the tolerance" if same else "not reproduced"
        typer.echo(f"{artifact}: {verdict}; the weights differ")
        typer.echo(f"  largest relative difference of a weight: {found.difference:.2e}")
        if found.stage:
            typer.echo(f"  first stage that differs: {found.stage}")
    for one in found.metrics:
        typer.echo(f"  {one.metric} on {Path(one.data).name}: {one.then:.2f}, now {one.now:.2f}")


class Kind(StrEnum):
    """How `plmcc diff` writes the difference."""

    text = "text"
    json = "json"
    html = "html"


def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="The first model: directory, artifact or hub id.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The second model, in any such form.")],
    kind: Annotated[Kind, typer.Option("--format", help="text, json or html.")] = Kind.text,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file.")
    ] = None,
) -> None:
    """Show the modules in which two models differ, and the difference in size and cost."""
    for name in (first, second):
        check_model(name)

    from plmcc.planning.diff import cells
    from plmcc.planning.diff import diff as compare
    from plmcc.report.html import document, table
    from plmcc.utils.terminal import calm

    calm()
    found = compare(first, second)
    tables = cells(found)
    if kind is Kind.html:
        text = document(f"{first} and {second}", [table(*one) for one in tables])
    elif kind is Kind.json:
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False)
    else:
        text = _plain(tables)
    typer.echo(text) if file is None else file.write_text(text + "\n", encoding="utf-8")


def _plain(tables: list[tuple[str, list[str], list[list[str]]]]) -> str:
    from rich.table import Table

    from plmcc.utils.terminal import console

    shown = console()
    with shown.capture() as captured:
        for title, header, rows in tables:
            one = Table(*header, title=title)
            for row in rows:
                one.add_row(*row)
            shown.print(one if rows else "The modules are the same.")
    return captured.get().rstrip("\n")
