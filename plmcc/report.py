"""What was done, for people and for programs: the table at the end, report.json, the lock file, the
model card."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from plmcc import catalog, seal
from plmcc.data import data_files
from plmcc.diagnostics import PlmccError
from plmcc.page import page
from plmcc.recipe import Recipe, Scratch, TrainTokenizer
from plmcc.size import file_bytes
from plmcc.source import Source, folder_digests, is_vectors, write_json
from plmcc.tasks import auto_class

if TYPE_CHECKING:
    from plmcc.compiler import Result

_LIBRARIES = (
    "plmcc",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _LIBRARIES
    }


def hardware() -> dict[str, Any]:
    """Return what the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": device,
            "system": platform.system()}  # fmt: skip


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


def _base_files(source: Source) -> dict[str, str]:
    file = Path(source.name)
    return folder_digests(file if is_vectors(file) else source.folder)


def write_documents(recipe: Recipe, source: Source, result: Result, folder: Path) -> None:
    """Write recipe.yaml, report.json, report.html, plmcc.lock.json and the model card."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(
        folder / "report.json", report(recipe, source, result) | {"file_bytes": file_bytes(folder)}
    )
    found = page(report(recipe, source, result), result.pictures)
    (folder / "report.html").write_text(found, encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, source, result), encoding="utf-8")
    seal.write(folder, lock(recipe, source, result.base))


def lock(recipe: Recipe, source: Source, base: Path | None = None) -> dict[str, Any]:
    """Return what would have to be equal to get the same artifact again."""
    named = [
        s
        for stage in recipe.steps()
        if stage.train
        for data in (stage.train.data,)
        for s in (data.train, data.target, data.eval, data.eval_target)
        if s
    ]
    named += [s for stage in recipe.steps() for chosen in stage.passes for s in chosen.reads()]
    named += [s for asked in recipe.evaluate for s in (asked.data, asked.target) if s]
    if isinstance(recipe.model, Scratch) and isinstance(recipe.model.tokenizer, TrainTokenizer):
        named.append(recipe.model.tokenizer.train)
    files = {str(file): seal.digest(file) for name in named for file in _existing(name, base)}
    passes = {catalog.name_of(type(p)) for stage in recipe.steps() for p in stage.passes}
    return {
        "recipe": recipe.digest(),
        "seed": recipe.seed,
        "base_model": {"name": source.name, "files": _base_files(source)},
        "data": files,
        "passes": {name: catalog.entry(name).origin for name in sorted(passes)},
        "versions": versions(),
        "hardware": hardware(),
    }


def _existing(name: str | list[str], base: Path | None) -> list[Path]:
    try:
        return data_files(name, base)
    except PlmccError:  # a data set of the hub
        return []


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
    if slower:
        return "Somewhat slower than the original: this model is smaller, not faster."
    if not faster:
        return "No speed-up: this model is smaller, not faster."
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
    return (
        f"{before / after:.2f}x smaller"
        if after and before > after
        else "same"
        if before == after
        else "larger"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
