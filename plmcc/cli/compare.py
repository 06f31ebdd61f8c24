"""`plmcc compare`: recipes and baselines of the same size, side by side."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from plmcc.cli.options import Format, Output, print_json
from plmcc.cli.recipes import CheckedRecipe, check_recipe
from plmcc.diagnostics import error

if TYPE_CHECKING:
    from plmcc.experiments.compare import Compared, Comparison

_USAGE = "plmcc compare RECIPE... MODEL"
_Given = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE... MODEL",
        help="One or more recipes, then the model: a directory, a hub id or word vectors.",
    ),
]
_Data = Annotated[
    list[str], typer.Option("--data", help="Labeled data to evaluate on; repeatable.")
]
_MetricName = Annotated[
    str | None, typer.Option("--metric", help="The metric; by default that of the task.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value in all recipes."),
]
_Baselines = Annotated[
    bool, typer.Option(help="Add the baselines int8, int4, SVD, PQ, RQ and a pruned vocabulary.")
]
_Directory = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Write compare.html and compare.json here."),
]


def compare(
    given: _Given,
    data: _Data,
    metric: _MetricName = None,
    overrides: _Overrides = None,
    baselines: _Baselines = True,
    output: _Directory = None,
    printed: Output = Format.text,
) -> None:
    """Compare recipes by size and quality with baselines of the same size."""
    checked, model = _recipes(given, overrides), given[-1]
    if output is not None and output.exists() and not output.is_dir():
        message = "the output directory is a file"
        raise error("PLM501", message, str(output), hint="choose another directory")
    _check_metric(metric)
    recipes = [(one.path.stem, one.load()) for one in checked]

    from plmcc.experiments import compare as engine

    tasks = {recipe.task for _, recipe in recipes}
    if len(tasks) > 1:
        message, hint = "the recipes are for different tasks", "compare one task at a time"
        raise error("PLM502", message, got=", ".join(sorted(tasks)), hint=hint)
    asked = engine.comparison(recipes, model, data, metric, checked[0].path.parent)
    with redirect_stdout(sys.stderr):  # the Trainer prints its log
        rows = engine.compare(asked, baselines, lambda line: typer.echo(line, err=True))
    values = to_json(asked, rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (output / "compare.json").write_text(text, encoding="utf-8")
        (output / "compare.html").write_text(page(asked, rows), encoding="utf-8")
    print_json(values) if printed is Format.json else _print(asked, rows)


def _recipes(given: list[str], overrides: list[str] | None) -> list[CheckedRecipe]:
    if len(given) < 2:
        message = "a comparison needs at least one recipe and a model"
        raise error("PLM502", message, got=given[0], hint=_USAGE)
    *names, model = given
    if model.endswith((".yaml", ".yml")):
        message = "the last argument must be the model, but it is a recipe"
        raise error("PLM502", message, got=model, hint=_USAGE)
    return [check_recipe(Path(name), overrides) for name in names]


def _check_metric(metric: str | None) -> None:
    from plmcc.recipe.metrics import RELATIVE, Metric, check_name

    known = [name for name in get_args(Metric) if name not in RELATIVE]
    if metric in RELATIVE:
        message = f"`{metric}` measures agreement with the original; a comparison needs labels"
        raise error("PLM502", message, "--metric", got=metric, allowed=", ".join(known))
    if metric is not None:
        check_name(metric, "--metric", known)


def to_json(asked: Comparison, rows: list[Compared]) -> dict[str, object]:
    """Return the comparison as plain values."""
    found = [row.to_json() for row in rows]
    return {"model": asked.model, "metric": asked.metric, "data": list(asked.data), "rows": found}


def _cells(asked: Comparison, rows: list[Compared]) -> tuple[list[str], list[list[str]]]:
    whole = rows[0].table_bytes
    header = ["", "settings", "table", "smaller", "model"]
    header += [f"{asked.metric}, {Path(data).name}" for data in asked.data] + ["front"]
    cells = []
    for row in rows:
        size = [f"{row.table_bytes:,}", f"{whole / row.table_bytes:.1f}x", f"{row.model_bytes:,}"]
        metrics = [f"{value:.2f}" for value in row.metrics]
        name = row.name if row.trained or row.kind == "original" else f"{row.name}, not trained"
        cells.append([name, row.settings, *size, *metrics, "*" if row.front else ""])
    return header, cells


def _print(asked: Comparison, rows: list[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    header, cells = _cells(asked, rows)
    table = Table(
        *header, caption="* on the Pareto front: nothing smaller is as good; sizes in bytes"
    )
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def page(asked: Comparison, rows: list[Compared]) -> str:
    """Return the comparison as a self-contained HTML page."""
    from plmcc.report.charts import Dot, front
    from plmcc.report.html import document, table

    title = f"{asked.model}: ways to make it smaller"
    dots = [Dot(r.name, r.kind, r.table_bytes, r.metrics[0], r.front) for r in rows]
    labels = "bytes of the token table", f"{asked.metric} on {Path(asked.data[0]).name}"
    chart = front("Quality against size", dots, *labels)
    return document(title, [chart, table("Compared", *_cells(asked, rows))])
