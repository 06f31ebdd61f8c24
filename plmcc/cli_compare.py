"""`plmcc compare`: recipes and their rivals side by side."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plmcc.cli_plan import Format, Output, print_json
from plmcc.diagnostics import did_you_mean, error

if TYPE_CHECKING:
    from plmcc.compare import Compared, Comparison

_HELP = "Recipes, and last the model: a directory, a hub id or a file of word vectors."


def compare(
    given: Annotated[list[str], typer.Argument(metavar="RECIPE... MODEL", help=_HELP)],
    data: Annotated[
        list[str], typer.Option("--data", help="Labelled data to judge by; repeatable.")
    ],
    metric: Annotated[
        str | None, typer.Option("--metric", help="What is computed; by default the task's.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change all recipes.")
    ] = None,
    rivals: Annotated[
        bool, typer.Option(help="Beside them int8, int4, SVD, PQ, RQ and a cut vocabulary.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write compare.html and compare.json."),
    ] = None,
    printed: Output = Format.text,
) -> None:
    """Compare recipes by size and quality, with what else as many bytes could do."""
    from plmcc.recipe import load_recipe

    if len(given) < 2:
        message = "a comparison needs recipes and a model"
        raise error("PLM502", message, given=given[0], cure="plmcc compare RECIPE... MODEL")
    *names, model = given
    if model.endswith((".yaml", ".yml")):
        message = "the last argument is the model, and this is a recipe"
        raise error("PLM502", message, given=model, cure="plmcc compare RECIPE... MODEL")
    files = [Path(name) for name in names]
    for file in files:  # mistakes show at once, before torch is imported
        load_recipe(file, overrides or ())
    if output is not None and output.exists() and not output.is_dir():
        raise error("PLM501", "there is a file of this name", str(output), cure="choose another")
    _check_metric(metric)

    from plmcc import compare as engine
    from plmcc.terminal import calm

    calm()
    recipes = [(f.stem, load_recipe(f, overrides or (), real=True)) for f in files]
    tasks = {recipe.task for _, recipe in recipes}
    if len(tasks) > 1:
        message = "the recipes are for different tasks"
        raise error("PLM502", message, given=", ".join(sorted(tasks)), cure="compare them apart")
    asked = engine.comparison(recipes, model, data, metric, files[0].parent)
    with redirect_stdout(sys.stderr):  # the Trainer prints its log
        rows = engine.compare(asked, rivals, lambda line: typer.echo(line, err=True))
    values = to_json(asked, rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (output / "compare.json").write_text(text, encoding="utf-8")
        (output / "compare.html").write_text(page(asked, rows), encoding="utf-8")
    if printed is Format.json:
        print_json(values)
    else:
        _print(asked, rows)


def _check_metric(metric: str | None) -> None:
    from typing import get_args

    from plmcc.recipe_parts import Metric

    beside = ("fidelity", "kl_divergence")
    known = [name for name in get_args(Metric) if name not in beside]
    if metric in beside:
        message = f"a comparison is made by labelled data, and `{metric}` looks at the original"
        raise error("PLM502", message, "--metric", given=metric, allowed=", ".join(known))
    if metric is not None and metric not in known:
        raise error("PLM502", "there is no such metric", "--metric", given=metric,
                    allowed=", ".join(known), cure=did_you_mean(metric, known))  # fmt: skip


def to_json(asked: Comparison, rows: list[Compared]) -> dict[str, Any]:
    """Return all that was found, as plain values."""
    found = [row.to_json() for row in rows]
    return {"model": asked.model, "metric": asked.metric, "data": list(asked.data), "rows": found}


def _cells(asked: Comparison, rows: list[Compared]) -> tuple[list[str], list[list[str]]]:
    whole = rows[0].table_bytes
    header = ["", "settings", "table", "smaller", "model"]
    header += [f"{asked.metric}, {Path(data).name}" for data in asked.data] + ["front"]
    cells = []
    for row in rows:
        size = [f"{row.table_bytes:,}", f"{whole / row.table_bytes:.1f}x", f"{row.model_bytes:,}"]
        figures = [f"{value:.2f}" for value in row.figures]
        name = row.name if row.trained or row.kind == "original" else f"{row.name}, not trained"
        cells.append([name, row.settings, *size, *figures, "*" if row.front else ""])
    return header, cells


def _print(asked: Comparison, rows: list[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, cells = _cells(asked, rows)
    table = Table(*header, caption="* nothing else is as small and as good; sizes in bytes")
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def page(asked: Comparison, rows: list[Compared]) -> str:
    """Return the comparison as one page that needs no other file."""
    from plmcc.page import NO_PICTURES, document, table
    from plmcc.pictures import Dot, drawable, front

    title = f"{asked.model}: ways to make it smaller"
    dots = [Dot(r.name, r.kind, r.table_bytes, r.figures[0], r.front) for r in rows]
    labels = "bytes of the token table", f"{asked.metric} on {Path(asked.data[0]).name}"
    picture = front("Quality against size", dots, *labels) if drawable() else NO_PICTURES
    return document(title, [picture, table("Compared", *_cells(asked, rows))])
