"""`plmcc shrink` and `plmcc advise`: from a model to a small one, without knowing the passes."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plmcc.cli.options import Format, Output, Overwrite, print_json
from plmcc.cli.recipes import check_model
from plmcc.diagnostics import Diagnostic, PlmccError, error
from plmcc.utils.files import check_outside, matching_files
from plmcc.utils.outputs import free, output_place

if TYPE_CHECKING:
    from plmcc.experiments.advise import Advice
    from plmcc.experiments.candidates import Candidate
    from plmcc.experiments.shrink import Shrunk

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory or a hub id; it is not changed.")
]
_Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="Text like that the model will read; repeatable."),
]
_Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Labeled data to judge by; else held-out text."),
]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME", help="Column of the data with the text; twice for pairs."
    ),
]
_Label = Annotated[
    str | None, typer.Option("--label", metavar="NAME", help="Column of the data with the label.")
]
_Metric = Annotated[
    str | None, typer.Option("--metric", help="The metric; by default that of the task.")
]
_Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="LIMITS",
        help="Limits that must all hold: size<=30MB (weights, tokenizer and configuration), "
        "drop<=1 (points of the metric below the original; also 5%), speed>=2, quality>=80.",
    ),
]
_Effort = Annotated[
    str,
    typer.Option(
        "--effort", help="quick: no training; normal: some hundred steps; best: four times more."
    ),
]
_Recipes = Annotated[
    list[Path] | None,
    typer.Option(
        "--recipe", metavar="FILE", help="Choose from these recipes, not the shipped ones."
    ),
]
_Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="What results are measured in: torch, or onnx (an int8 file in onnxruntime, written "
        "to DIR.onnx); auto: onnx for encoders where the target has a limit of speed.",
    ),
]
_Directory = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Directory for the result."),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Stop after the table of candidates with planned sizes.")
]


def shrink(
    model: _Model,
    text: _Texts = None,
    data: _Data = None,
    column: _Columns = None,
    label: _Label = None,
    metric: _Metric = None,
    target: _Target = "drop<=1",
    effort: _Effort = "normal",
    recipe: _Recipes = None,
    runtime: _Runtime = "auto",
    output: _Directory = None,
    dry_run: _DryRun = False,
    overwrite: Overwrite = False,
    printed: Output = Format.text,
) -> None:
    """Find the smallest result that is still good, and write it.

    Recipes that fit the model are planned, some are tried, the best is trained and written. After
    an interruption, the same command continues.
    """
    _check(model, text or [], data, effort, target, metric, runtime)
    judged = _evaluated(data, column, label)
    place = _place(output, model, dry_run, overwrite)

    from plmcc.experiments import shrink as engine
    from plmcc.utils.terminal import calm

    calm()
    how: Any = (effort, recipe or [], runtime, _say)
    asked = engine.Asked(model, text or [], target, judged, metric, *how)
    show = _table if printed is Format.text else _silent
    try:
        found = engine.find(asked, place, dry_run=dry_run, overwrite=overwrite, table=show)
    except PlmccError as problem:
        raise PlmccError(*map(_with_options, problem.diagnostics)) from problem.__cause__
    print_json(found.to_json()) if printed is Format.json else _print(found, place)
    if found.verdict not in (None, "ACCEPT"):
        raise typer.Exit(1)


def advise(
    model: _Model,
    text: _Texts = None,
    recipe: _Recipes = None,
    printed: Output = Format.text,
) -> None:
    """Show where the bytes and the time of a model are, and what could be saved."""
    check_model(model)
    for name in text or []:
        matching_files(name, None)

    from plmcc.experiments.advise import advise as engine
    from plmcc.utils.terminal import calm

    calm()
    found = engine(model, text or [], recipe or [])
    print_json(found.to_json()) if printed is Format.json else _print_advice(found, text or [])


def _place(output: Path | None, model: str, dry_run: bool, overwrite: bool) -> Path:
    if output is None and not dry_run:
        raise error("PLM502", "the output directory is missing", "--output", hint="add -o DIR")
    place = output_place(output or Path("shrunk"))
    if not dry_run:
        free(place, overwrite)
        if Path(model).is_dir():
            check_outside(place, Path(model))
    return place


def _evaluated(data: str | None, columns: list[str] | None, label: str | None) -> Any:
    """The labeled data as an `evaluate` section.

    Raises:
        PlmccError: there are columns, and no data.
    """
    if data is None and (columns or label):
        message = "columns are those of labeled data, and there are none"
        got = f"--column {columns[0]}" if columns else f"--label {label}"
        raise error("PLM502", message, "--data", got=got, hint="add --data FILE")
    if data is None:
        return None
    if len(columns or ()) > 2:
        message, got = "a row has one or two texts", " ".join(columns or ())
        raise error("PLM502", message, "--column", got=got)
    text = columns[0] if columns and len(columns) == 1 else columns
    given = {"data": data, "text": text, "label": label}
    return {name: value for name, value in given.items() if value is not None}


def _check(
    model: str,
    text: list[str],
    data: str | None,
    effort: str,
    target: str,
    metric: str | None,
    runtime: str,
) -> None:
    """Refuse what can be known before anything is imported."""
    from plmcc.experiments.goal import check_asked

    check_model(model)
    check_asked(target, effort, metric, runtime)
    if not (text or data or Path(model).is_file()):  # a file is one of word vectors
        message = "there is no text, and nothing to judge results by"
        raise error("PLM502", message, "--text", hint="add --text FILE, or --data FILE")
    for name in [*text, *([data] if data and not data.startswith("hub:") else [])]:
        matching_files(name, None)


def _with_options(found: Diagnostic) -> Diagnostic:
    """An error that names keys of a recipe, as one that names options."""
    keys = {"`text:`": "`--column`", "`label:`": "`--label`", "`target:`": "`--column` twice"}
    keys["add --skip-broken"] = "name a model: a file here is one of word vectors"
    texts = [found.hint, found.allowed]
    for key, option in keys.items():
        texts = [text.replace(key, option) for text in texts]
    return replace(found, hint=texts[0], allowed=texts[1])


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _silent(found: list[Candidate]) -> None:
    """Print nothing."""


def _table(found: list[Candidate]) -> None:
    from rich.table import Table

    from plmcc.experiments.space import written
    from plmcc.report.words import megabytes
    from plmcc.utils.terminal import console

    table = Table("recipe", "values", "planned size", "parameters")
    for one in found:
        if one.recipe is not None:
            sizes = megabytes(one.size), f"{one.parameters:,}"
            table.add_row(one.name, written(one.values), *sizes)
    console().print(table)
    for one in found:
        if one.recipe is None:
            typer.echo(f"  not {one.title}: {one.reason}")


def _print(found: Shrunk, place: Path) -> None:
    if found.verdict is None:
        typer.echo(f"{found.words}; nothing was tried (--dry-run)")
        return
    if found.result is not None:
        typer.echo(f"written: {place} (recipe.yaml in it makes it again)")
        beside = place.with_name(f"{place.name}.onnx")
        if found.runtime == "onnx":
            typer.echo(f"written: {beside} (for servers of onnxruntime; measured)")
    typer.echo(f"{found.verdict}: {found.words}")


def _print_advice(found: Advice, text: list[str]) -> None:
    from rich.table import Table

    from plmcc.report.words import megabytes
    from plmcc.utils.terminal import console

    typer.echo(f"{found.model}: {megabytes(found.size)}, task {found.task}")
    table = Table("part", "bytes", "of the weights", "of the time")
    for part in found.components:
        time = "" if part.operations is None else f"{part.operations:.0%}"
        share = f"{part.share:.0%}" if part.share else ""
        table.add_row(part.name, megabytes(part.bytes), share, time)
    console().print(table)
    _table(found.candidates)
    named = "".join(f" --text {shlex.quote(name)}" for name in text) or " --text FILE"
    named += " --data FILE" if found.task == "translation" else ""
    command = f"plmcc shrink {shlex.quote(found.model)}{named} --target"
    typer.echo(f"next: {command} 'drop<=1' -o DIR")
    typer.echo(f"      {command} 'size<=0.3x' --dry-run")
