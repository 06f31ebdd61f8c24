"""`plmcc search`: the values of a recipe that reach a target."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli.options import Format, Output, Overrides, RecipePath, Weights, print_json
from plmcc.cli.recipes import check_recipe
from plmcc.diagnostics import PlmccError, error

if TYPE_CHECKING:
    from plmcc.experiments.study import SearchResult
    from plmcc.recipe.load import Recipe

_DATABASE = "search.db"
_LIMITS = (
    "Limits that must all hold: size<=25MB (or 0.5x), parameters<=10M, latency<=0.8x, "
    "drop<=1 (points of the recipe's first metric below the original), quality>=80."
)
_Target = Annotated[str, typer.Option("--target", metavar="LIMITS", help=_LIMITS)]
_Directory = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the result.")
]
_Trials = Annotated[
    int, typer.Option("--trials", min=1, help="Number of trials, including earlier runs.")
]
_Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0, help="Seconds after which no further trial starts."),
]
_Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, help="Seed; by default the recipe's, or a random one with --storage."
    ),
]
_Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="A database shared by several machines; by default a file in DIR.",
    ),
]


def search(
    recipe: RecipePath,
    model: Weights = None,
    *,
    target: _Target,
    folder: _Directory,
    trials: _Trials = 20,
    timeout: _Timeout = None,
    seed: _Seed = None,
    storage: _Storage = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Search the values in the recipe's `search` section until a target is reached.

    The same command continues a search that was interrupted. Of the trials that reach the target,
    the smallest is chosen if the target limits the quality, otherwise the best.
    """
    from plmcc.experiments.goal import parse_goal
    from plmcc.recipe.metrics import lower_is_better

    checked = check_recipe(recipe, overrides)
    _check_recipe(checked.recipe, model)
    goal = parse_goal(target, lower_is_better(checked.recipe.evaluate[0].metric))
    _check_folder(folder)
    if find_spec("optuna") is None:
        message, hint = "optuna is not installed", "pip install 'plmcc[search]'"
        raise error("PLM502", message, "plmcc search", hint=hint)
    if seed is None:  # several machines should not run the same trials
        seed = checked.recipe.seed if storage is None else secrets.randbelow(2**31)
    checked.check_data(model)
    loaded = checked.load()

    from plmcc.experiments import study as engine
    from plmcc.experiments.trial import SearchRequest, original

    asked = SearchRequest(
        loaded, goal, model, recipe.parent, lambda line: typer.echo(line, err=True)
    )
    source, known = original(asked)
    folder.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{folder / _DATABASE}"
    study = engine.open_study(url, asked, source, alone=storage is None)
    try:
        engine.search(study, asked, source, known, trials, timeout, seed)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues this search", err=True)
        raise
    _report(engine.found_in(study, asked, known), folder, model, output)


def _report(found: SearchResult, folder: Path, model: str | None, output: Format) -> None:
    from plmcc.experiments import view

    view.write(found, folder)
    print_json(view.to_json(found)) if output is Format.json else _print(found)
    if found.chosen is None:
        raise _missed(found)
    named = f" {model}" if model else ""
    typer.echo(f"trial {found.chosen.number} is written to {folder / 'recipe.yaml'}", err=True)
    typer.echo(f"next: plmcc apply {folder / 'recipe.yaml'}{named} -o DIR", err=True)


def _check_recipe(recipe: Recipe, model: str | None) -> None:
    from plmcc.recipe.load import Scratch

    location = f"recipe {recipe.name}"
    if recipe.search is None:
        hint = "add `search: {passes.0.NAME.OPTION: [value, value]}`"
        raise error("PLM502", "the recipe has no `search` section", location, hint=hint)
    if not recipe.evaluate:
        hint = "add `evaluate: [{metric: ..., data: ...}]`; the first metric counts"
        raise error(
            "PLM502",
            "the recipe has no `evaluate` section, which defines the quality",
            location,
            hint=hint,
        )
    if model is None and isinstance(recipe.model, Scratch):
        message = "a search compares with the original, but a new model has no original"
        raise error("PLM502", message, recipe.location(("model",)), hint="pass a trained model")
    if model is not None and Path(model).is_file():
        message = "a search needs a model, but this is a file"
        hint = "pass a model directory; `plmcc compare` accepts files of word vectors"
        raise error("PLM502", message, model, hint=hint)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        message, hint = "the output directory is a file", "choose another directory"
        raise error("PLM501", message, str(folder), hint=hint)
    ours = [folder / name for name in (_DATABASE, "search.json")]
    if folder.is_dir() and any(folder.iterdir()) and not any(file.exists() for file in ours):
        message = "the output directory is not empty and contains no search to continue"
        raise error("PLM501", message, str(folder), hint="choose another directory")


def _print(found: SearchResult) -> None:
    from rich.table import Table
    from rich.text import Text

    from plmcc.experiments.view import cells
    from plmcc.utils.terminal import console

    header, lines = cells(found)
    table = Table(*header)
    for line in lines:
        table.add_row(*map(Text, line))
    console().print(table)


def _missed(found: SearchResult) -> PlmccError:
    from plmcc.experiments.space import written

    message = f"none of {len(found.trials)} trials reaches the target"
    near = found.nearest()
    given = f"the nearest is trial {near.number}: {written(near.values)}" if near else "none ran"
    reasons = list(dict.fromkeys(t.reason for t in found.trials if t.reason))
    hint = "widen the search, train longer, or relax the target" if near else reasons[0]
    return error("PLM505", message, "--target", got=given, allowed=found.asked.goal.text, hint=hint)
