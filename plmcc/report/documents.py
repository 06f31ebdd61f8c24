"""What was done, for people and for programs: the closing table, report.json, report.html, the lock
file, the model card."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from plmcc.artifact import lock as seal
from plmcc.artifact.environment import hardware
from plmcc.artifact.size import file_bytes
from plmcc.export.targets import TARGETS
from plmcc.models.source import Source
from plmcc.recipe.load import Recipe
from plmcc.report.card import model_card, needs_plmcc, usage
from plmcc.report.html import page
from plmcc.report.provenance import lock
from plmcc.report.summary import Summary
from plmcc.report.words import megabytes, milliseconds, number, times
from plmcc.utils.files import write_json

if TYPE_CHECKING:
    from plmcc.report.result import Result


def report(recipe: Recipe, source: Source, result: Result) -> dict[str, object]:
    """Return the whole report as plain values."""
    asked = recipe.lower.to if recipe.lower is not None else ()
    name, size = source.first or (source.name, sum(result.bytes_before.values()))
    return {
        "recipe": recipe.name,
        "model": source.name,
        "original": {"name": name, "bytes": size},
        "task": source.task,
        "loads_with": ["plmcc", "transformers"] if needs_plmcc(source) else ["transformers"],
        "exports": [to for to in asked if to in TARGETS],
        **measurements(result),
        "notes": list(dict.fromkeys(source.notes)),
        "misses": result.misses,
        "training": result.training,
        "seconds": result.seconds,
        "reload_difference": result.reload_difference,
        "hardware": hardware(),
    }


def measurements(result: Result) -> dict[str, object]:
    """Return what the closing table and the card of the page are made from."""
    return {
        "sites": result.sites,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "metrics": result.metrics,
        "latency": [item.to_json() for item in result.latency],
    }


def write_documents(recipe: Recipe, source: Source, result: Result, folder: Path) -> None:
    """Write recipe.yaml, report.json, report.html, plmcc.lock.json and the model card."""
    values = report(recipe, source, result)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / "report.json", values | {"file_bytes": file_bytes(folder)})
    (folder / "report.html").write_text(page(values, result.charts), encoding="utf-8")
    card = model_card(recipe, source, result, Summary.of(values))
    (folder / "README.md").write_text(card, encoding="utf-8")
    seal.write(folder, lock(recipe, source, result.read, result.digests, result.metrics))


def print_summary(result: Result, console: Console) -> None:
    """Print the table at the end: sizes by component, metrics, latency, what they mean in one
    sentence, and what to try next."""
    summary = Summary.of(measurements(result))
    console.print(closing_table(summary))
    lines = [summary.verdict()]
    if result.folder is not None:
        lines += _next(result.source, result.folder)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def closing_table(summary: Summary) -> Table:
    """Return the rows of a summary; long names are folded, never cut off."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", overflow="fold")
    for part in summary.components:
        table.add_row(part.label, *_sizes(part.before, part.after))
    table.add_row("all tensors", *_sizes(summary.before, summary.after), style="bold")
    table.add_section()
    for one in summary.metrics:
        table.add_row(one.label, number(one.before), number(one.after), one.change)
    table.add_section()
    for row in summary.speed:
        both = milliseconds(row.original), milliseconds(row.compressed)
        table.add_row(f"latency, {row.setting}", *both, row.change)
    return table


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return megabytes(before), megabytes(after), times(before, after)


def _next(source: Source, folder: Path) -> list[str]:
    """The lines to try next."""
    code = [f"    {line}".rstrip() for line in usage(source, str(folder))]
    return [
        f"written to {folder}; a fresh process reloaded it with the same outputs",
        "",
        "next: load it in Python,",
        *code,
        f"look at {folder / 'report.html'}, or check the files again:",
        f"    plmcc verify {shlex.quote(str(folder))}",
    ]
