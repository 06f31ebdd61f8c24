"""`plmcc search`: the values of a recipe that reach a target."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli_plan import Format, Output, Overrides, RecipePath, print_json
from plmcc.diagnostics import PlmccError, error

if TYPE_CHECKING:
    from plmcc.recipe import Recipe
    from plmcc.tune import Found

_DATABASE = "search.db"
_TARGET = "Limits, all to be kept: size<=25MB (or 0.5x), parameters<=10M, latency<=0.8x, drop<=1 (points of the first figure of `evaluate` below the original), quality>=80."  # noqa: E501


def search(
    recipe: RecipePath,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model directory or hub id.")
    ] = None,
    target: Annotated[str, typer.Option("--target", metavar="LIMITS", help=_TARGET)] = ...,  # type: ignore[assignment]
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.")
    ] = ...,  # type: ignore[assignment]
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="How many, those of earlier runs included.")
    ] = 20,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds; then no trial begins.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="By default the recipe's; with --storage a random one."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", metavar="URL", help="A database for several machines; by default DIR."
        ),
    ] = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Search values for what the recipe's `search` section names, until a target is reached.

    The same command goes on with a search that was stopped. Of the trials that reach the target,
    the smallest is chosen where the target says how good it must be, and else the best.
    """
    from plmcc.goal import lower_is_better, parse_goal
    from plmcc.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())  # mistakes show before torch is imported
    _check_recipe(loaded, model)
    goal = parse_goal(target, lower_is_better(loaded.evaluate[0].metric))
    _check_folder(folder)
    if find_spec("optuna") is None:
        message = "a search needs optuna, which is not installed"
        raise error("PLM502", message, cure="pip install 'plmcc[search]'")
    if seed is None:  # several machines are not to try the same
        seed = loaded.seed if storage is None else secrets.randbelow(2**31)

    from plmcc import tune, tune_view
    from plmcc.terminal import calm
    from plmcc.tune_trial import Asked, original

    calm()
    asked = Asked(
        load_recipe(recipe, overrides or (), real=True), goal, model, recipe.parent,
        lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    source, known = original(asked)
    folder.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{folder / _DATABASE}"
    study = tune.open_study(url, asked, source, alone=storage is None)
    try:
        tune.search(study, asked, source, known, trials, timeout, seed)
    except KeyboardInterrupt:
        typer.echo("the same command goes on with this search", err=True)
        raise
    found = tune.found_in(study, asked, known)
    tune_view.write(found, folder)
    print_json(tune_view.to_json(found)) if output is Format.json else _print(found)
    if found.chosen is None:
        raise _missed(found)
    words = f"written to {folder}: trial {found.chosen.number} as recipe.yaml; then"
    named = f" {model}" if model else ""
    typer.echo(f"{words} plmcc apply {folder / 'recipe.yaml'}{named} -o NEW", err=True)


def _check_recipe(recipe: Recipe, model: str | None) -> None:
    from plmcc.recipe import Scratch

    place = f"recipe {recipe.name}"
    if recipe.search is None:
        cure = "add `search: {passes.0.NAME.OPTION: [value, value]}`"
        raise error("PLM502", "the recipe does not say what may vary", place, cure=cure)
    if not recipe.evaluate:
        cure = "add `evaluate: [{metric: ..., data: ...}]`; the first figure counts"
        raise error("PLM502", "the recipe does not say what quality is", place, cure=cure)
    if model is None and isinstance(recipe.model, Scratch):
        message = "a search compares with the original, and a new model has none"
        raise error("PLM502", message, recipe.place(("model",)), cure="name a trained model")
    if model is not None and Path(model).is_file():
        message = "a search judges by `evaluate`, and a file is not judged so"
        cure = "name a model directory; `plmcc compare` takes files of word vectors"
        raise error("PLM502", message, model, cure=cure)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise error("PLM501", "this exists and is no directory", str(folder), cure="choose another")
    ours = [folder / name for name in (_DATABASE, "search.json")]
    if folder.is_dir() and any(folder.iterdir()) and not any(file.exists() for file in ours):
        message = "the output directory exists, and holds no search to go on with"
        raise error("PLM501", message, str(folder), cure="choose another output")


def _print(found: Found) -> None:
    from rich.table import Table
    from rich.text import Text

    from plmcc.terminal import console
    from plmcc.tune_view import cells

    header, lines = cells(found)
    table = Table(*header)
    for line in lines:
        table.add_row(*map(Text, line))
    console().print(table)


def _missed(found: Found) -> PlmccError:
    """What to say where nothing reaches the target: how far the nearest trial is from it."""
    message = f"none of {len(found.trials)} trials reaches the target"
    from plmcc.tune_space import written

    near = found.nearest()
    given = f"nearest is trial {near.number}: {written(near.values)}" if near else "none ran"
    reasons = list(dict.fromkeys(t.reason for t in found.trials if t.reason))
    cure = "search wider, train longer, or ask for less" if near else reasons[0]
    return error(
        "PLM505", message, "--target", given=given, allowed=found.asked.goal.text, cure=cure
    )
