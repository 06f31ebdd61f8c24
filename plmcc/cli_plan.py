"""Commands that look at a recipe and a model without changing anything: `plmcc plan`, `plmcc
match`, `plmcc test`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plmcc.diagnostics import PlmccError, error

if TYPE_CHECKING:
    from plmcc.recipe import Recipe


class Format(StrEnum):
    """How a command prints its result."""

    text = "text"
    json = "json"


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a value of the recipe: passes.0.compositional_codes.codebooks=16",
    ),
]
Output = Annotated[Format, typer.Option("--format", help="Print text, or JSON for programs.")]
Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A directory (config.json is enough) or hub id."),
]


def plan(
    recipe: RecipePath,
    model: Model = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Show what a recipe will do to a model, without reading its weights."""
    from plmcc.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # mistakes show at once, before torch is imported

    from plmcc.plan import plan as make
    from plmcc.plan_view import print_plan
    from plmcc.terminal import calm, console

    calm()
    try:
        made = make(load_recipe(recipe, overrides or (), real=True), model, recipe.parent)
    except PlmccError as problem:
        if output is Format.text:
            raise
        print_json({"ok": False, "diagnostics": problem.to_json()})
        raise typer.Exit(1) from None
    if output is Format.json:
        print_json(made.to_json())
        raise typer.Exit(1 if made.problems else 0)
    print_plan(made, console())
    if made.problems:
        raise PlmccError(*made.problems)


def match(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory (config.json is enough) or hub id.")
    ],
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]", help="As `targets`: an alias, a glob, re:<regex>, class:<Name>."
        ),
    ] = None,
    output: Output = Format.text,
) -> None:
    """Show what a pattern hits in a model, or, without one, which patterns there are."""
    from plmcc.matching import find, print_found
    from plmcc.source import load_source
    from plmcc.terminal import calm, console

    calm()
    found = find(load_source(model, meta=True).model, pattern)
    missed = pattern is not None and not any(not hit.reason for hit in found.hits)
    if output is Format.json:
        print_json({"ok": not missed} | found.to_json())
        raise typer.Exit(1 if missed else 0)
    print_found(found, console())
    if missed:
        message = f"`{pattern}` hits nothing that a pass can rewrite"
        raise error("PLM201", message, model, given=str(pattern), cure="take one of the patterns")


def try_out(
    recipe: RecipePath,
    model: Model = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Run a recipe on a small random twin of a model, and check all that `apply` promises."""
    from plmcc.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # mistakes show at once, before torch is imported

    from plmcc.terminal import calm, console
    from plmcc.trial import print_trial
    from plmcc.trial import try_out as run

    calm()
    trial = run(load_recipe(recipe, overrides or (), real=True), model, recipe.parent)
    print_json(trial.to_json()) if output is Format.json else print_trial(trial, console())
    if not trial.ok:
        raise typer.Exit(1)


def short(recipe: Recipe, model: str | None, base: Path) -> list[str]:
    """Return the plan in a few lines, for `apply`; nothing where there is no simple one.

    What is wrong is left to `apply`, which looks at the weights too.
    """
    from plmcc.plan import plan as make
    from plmcc.plan_view import short_lines
    from plmcc.preparing import prepares
    from plmcc.recipe import Scratch
    from plmcc.source import is_vectors

    name = model or recipe.model
    twice = any(prepares(p) for stage in recipe.steps() for p in stage.passes)
    if name is None or isinstance(name, Scratch) or is_vectors(Path(name)) or twice:
        return []  # to plan it, all text or all vectors would have to be read
    try:
        made = make(recipe, name, base, brief=True)
    except PlmccError:
        return []
    return ["plan", *short_lines(made)] if not made.problems else []


def print_json(value: Any) -> None:
    """Print plain values for programs."""
    typer.echo(json.dumps(value, indent=2))
