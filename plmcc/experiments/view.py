"""What `plmcc search` writes and shows: a table, a page with the Pareto front, and the recipe."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from plmcc.experiments.space import short_names, shown
from plmcc.experiments.study import SearchResult, TrialResult
from plmcc.experiments.trial import SearchRequest
from plmcc.recipe.load import parse_recipe, varied
from plmcc.report.charts import Dot, front
from plmcc.report.html import document, table
from plmcc.report.provenance import named_data
from plmcc.utils.types import Values

RECIPE = "recipe.yaml"
_WITH_DATA = ("passes", "train", "stages", "evaluate")


def write(found: SearchResult, folder: Path) -> None:
    """Write search.json, search.html and, where a trial reaches the goal, recipe.yaml."""
    text = json.dumps(to_json(found), indent=2, ensure_ascii=False) + "\n"
    (folder / "search.json").write_text(text, encoding="utf-8")
    (folder / "search.html").write_text(page(found), encoding="utf-8")
    if found.chosen is None:
        (folder / RECIPE).unlink(missing_ok=True)
    else:
        (folder / RECIPE).write_text(recipe_text(found, found.chosen, folder), encoding="utf-8")


def to_json(found: SearchResult) -> Values:
    """Return all that was found, as plain values."""
    asked, chosen = found.asked, found.chosen
    return {
        "ok": chosen is not None,
        "recipe": asked.recipe.name,
        "model": asked.model or str(asked.recipe.model),
        "target": asked.goal.text,
        "metric": asked.metric,
        "data": asked.recipe.evaluate[0].data,
        "original": found.original,
        "trials": [asdict(trial) for trial in found.trials],
        "chosen": None if chosen is None else chosen.number,
    }


def recipe_text(found: SearchResult, chosen: TrialResult, folder: Path) -> str:
    """Return the recipe with the values of a trial; its data is named from `folder`."""
    recipe = varied(found.asked.recipe, chosen.values)
    moved = _moves(found.asked, folder)
    plain = recipe.effective()
    plain |= {key: _moved(plain[key], moved) for key in _WITH_DATA if key in plain}
    recipe = parse_recipe(json.dumps(plain))
    metrics = zip(_columns(found), _metrics(found, chosen.metrics), strict=True)
    about = ", ".join(f"{name} {value}" for name, value in metrics)
    head = f"# plmcc search for {found.asked.goal.text}: trial {chosen.number}, {about}\n"
    return head + recipe.to_yaml()


def _moves(asked: SearchRequest, folder: Path) -> dict[str, str]:
    """The names of data files, or globs, as they are from another folder."""
    moves = {}
    for name in named_data(asked.recipe):
        if not name.startswith("hub:") and not Path(name).is_absolute():
            # Data is looked for here first, and then beside the recipe.
            root = Path() if glob.glob(name) else asked.base or Path()
            moves[name] = Path(os.path.relpath(root / name, folder)).as_posix()
    return moves


def _moved(value: object, moves: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _moved(inside, moves) for key, inside in value.items()}
    if isinstance(value, list):
        return [_moved(inside, moves) for inside in value]
    return moves.get(value, value) if isinstance(value, str) else value


def cells(found: SearchResult) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of the table: the original, then the trials in order."""
    paths = list(found.asked.recipe.search or ())
    header = ["trial", *short_names(paths), *_columns(found), ""]
    lines = [["original", *("" for _ in paths), *_metrics(found, found.original), ""]]
    for trial in found.trials:
        values = [shown(trial.values[path]) for path in paths]
        lines.append(
            [str(trial.number), *values, *_metrics(found, trial.metrics), _said(found, trial)]
        )
    return header, lines


def _columns(found: SearchResult) -> list[str]:
    goal = found.asked.goal
    optional = [name for name in ("parameters", "latency") if goal.asks(name)]
    return ["size", found.asked.metric, "drop", *optional]


def _metrics(found: SearchResult, metrics: Mapping[str, float]) -> list[str]:
    """The figures of a trial in the order of the columns."""
    words = {
        "size": "{:,.0f} bytes",
        "quality": "{:.2f}",
        "drop": "{:.2f}",
        "parameters": "{:,.0f}",
    }
    cells = {name: words[name].format(metrics[name]) for name in words if name in metrics}
    if "latency" in metrics:
        times = metrics["latency"] / metrics["original_latency"]
        cells["latency"] = f"{1e3 * metrics['latency']:.2f} ms, {times:.2f}x"
    cells[found.asked.metric] = cells.get("quality", "")
    return [cells.get(name, "") for name in _columns(found)]


def _said(found: SearchResult, trial: TrialResult) -> str:
    if trial.reason:
        return trial.reason
    marks = ["on the front"] if trial.front else []
    marks += ["reaches the target"] if trial.met else []
    marks += ["chosen"] if trial == found.chosen else []
    return ", ".join(marks)


def page(found: SearchResult) -> str:
    """Return the search as one page that needs no other file."""
    asked, original = found.asked, found.original
    dots = [
        Dot(
            "original", "original", int(original["size"]), original["quality"], found.original_front
        )
    ]
    for trial in (trial for trial in found.trials if not trial.reason):
        kind = "reaches the target" if trial.met else "does not"
        location = int(trial.metrics["size"]), trial.metrics["quality"]
        dots.append(Dot(f"trial {trial.number}", kind, *location, trial.front))
    title = f"{asked.recipe.name} for {asked.goal.text}"
    labels = "bytes of the model", f"{asked.metric} on {Path(asked.recipe.evaluate[0].data).name}"
    drawn = front("Quality against size", dots, *labels)
    return document(title, [drawn, table("Trials", *cells(found))])
