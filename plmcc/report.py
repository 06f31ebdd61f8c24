"""What was done, for people and for programs: the table at the end, report.json, the lock file, the
model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from plmcc import seal
from plmcc.page import page
from plmcc.provenance import hardware, lock
from plmcc.recipe import Recipe
from plmcc.size import file_bytes
from plmcc.source import Source, write_json
from plmcc.tasks import auto_class

if TYPE_CHECKING:
    from plmcc.result import Result


def report(recipe: Recipe, source: Source, result: Result) -> dict[str, Any]:
    """Return the whole report as plain values."""
    return {
        "recipe": recipe.name,
        "model": source.name,
        "task": source.task,
        "sites": result.sites,
        "misses": result.misses,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "metrics": result.metrics,
        "latency": [item.to_json() for item in result.latency],
        "training": result.training,
        "seconds": result.seconds,
        "reload_difference": result.reload_difference,
        "hardware": hardware(),
    }


def write_documents(recipe: Recipe, source: Source, result: Result, folder: Path) -> None:
    """Write recipe.yaml, report.json, report.html, plmcc.lock.json and the model card."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(
        folder / "report.json", report(recipe, source, result) | {"file_bytes": file_bytes(folder)}
    )
    found = page(report(recipe, source, result), result.pictures)
    (folder / "report.html").write_text(found, encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, source, result), encoding="utf-8")
    seal.write(folder, lock(recipe, source, result))


def model_card(recipe: Recipe, source: Source, result: Result) -> str:
    """Return the text of README.md in the artifact."""
    before, after = sum(result.bytes_before.values()), sum(result.bytes_after.values())
    auto = auto_class(source.task, source.model.config).__name__
    base, done = [f"base_model: {source.name}"], "compressed"
    if not result.records:
        done = "trained"
    if source.scratch:
        base = []
    needs = ["import plmcc  # registers the format with transformers"]
    plain = getattr(source.model.config, "quantization_config", None) is None
    lines = [
        "---",
        "library_name: transformers",
        *base,
        "tags: [plmcc, compression]" if result.records else "tags: [plmcc]",
        "---",
        f"# {recipe.name}",
        "",
        f"{source.name}, {done} by plmcc: {_mib(before)} to {_mib(after)} MiB of tensors.",
        "",
        "```python",
        *([] if plain else needs),
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("this directory")',
        "```",
        "",
        "| component (bytes) | before | after |",
        "|---|---|---|",
        *(f"| {name} | {b} | {a} |" for name, b, a in _component_rows(result)),
        "",
    ]
    if result.metrics:
        lines += ["| metric | data | before | after |", "|---|---|---|---|"]
        lines += [
            f"| {m['metric']} | {Path(m['data']).name} | {_figure(m['before'])} "
            f"| {_figure(m['after'])} |"
            for m in result.metrics
        ]
        lines += [""]
    lines += [
        "The recipe is in `recipe.yaml`; everything measured is in `report.json`, and in "
        "`report.html` to look at."
    ]
    return "\n".join(lines) + "\n"


def print_summary(result: Result, console: Console) -> None:
    """Print the table at the end: bytes by component, metrics, latency, and what they mean in plain
    words."""
    table = Table(title="what changed")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, before, after in _component_rows(result):
        table.add_row(f"{name} (bytes)", f"{before:,}", f"{after:,}", _factor(before, after))
    before, after = sum(result.bytes_before.values()), sum(result.bytes_after.values())
    table.add_row(
        "all tensors (bytes)", f"{before:,}", f"{after:,}", _factor(before, after), style="bold"
    )
    for item in result.metrics:
        known = item["before"] is not None
        table.add_row(
            f"{item['metric']} on {Path(item['data']).name}",
            _figure(item["before"]),
            _figure(item["after"]),
            f"{item['after'] - item['before']:+.2f}" if known else "",
        )
    for row in result.latency:
        times = [f"{seconds * 1e3:.2f}" for seconds in (row.original, row.compressed)]
        name = f"latency, {row.mode}, batch {row.batch} x {row.length} (ms)"
        table.add_row(name, *times, f"x{row.ratio:.2f} ± {row.spread:.2f}")
    console.print(table)
    console.print(_speed_words(result))


def _figure(value: float | None) -> str:
    """A figure; there is none of the random weights that a new model begins with."""
    return "-" if value is None else f"{value:.2f}"


def _speed_words(result: Result) -> str:
    """Claim nothing that the spread does not allow."""
    if not result.latency:
        return "Latency was not measured (add `evaluate` or `lower` to the recipe)."
    faster = [row for row in result.latency if row.ratio + row.spread < 0.97]
    slower = [row for row in result.latency if row.ratio - row.spread > 1.03]
    smaller = sum(result.bytes_after.values()) < sum(result.bytes_before.values())
    instead = ": this model is smaller, not faster." if smaller else "."
    if slower:
        return f"Somewhat slower than the original{instead}"
    if not faster:
        return f"No speed-up{instead}"
    best = min(faster, key=lambda row: row.ratio)
    return f"Up to {1 / best.ratio:.2f} times as fast (batch {best.batch}, {best.mode})."


def _component_rows(result: Result) -> list[tuple[str, int, int]]:
    names = list(result.bytes_before) + [
        n for n in result.bytes_after if n not in result.bytes_before
    ]
    return [
        (name, result.bytes_before.get(name, 0), result.bytes_after.get(name, 0)) for name in names
    ]


def _factor(before: int, after: int) -> str:
    if before == after:
        return "same"
    if after and before > after:
        return f"{before / after:.2f}x smaller"
    return f"{after / before:.2f}x larger" if before else "new"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
