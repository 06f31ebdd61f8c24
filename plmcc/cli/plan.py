"""`plmcc check`, `match`, `plan` and `test`: look at a recipe and a model, and change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from plmcc.cli.options import Format, Model, Output, Overrides, RecipePath, print_json
from plmcc.cli.recipes import check_model, check_recipe
from plmcc.diagnostics import PlmccError, error

_WithData = Annotated[
    bool,
    typer.Option("--data", help="Read the data too; MODEL's config.json says what labels fit."),
]


def check(
    recipe: RecipePath,
    model: Model = None,
    overrides: Overrides = None,
    data: _WithData = False,
    output: Output = Format.text,
) -> None:
    """Check a recipe, and with --data its files, columns and labels; no weights are read."""
    rows = 0
    try:
        checked = check_recipe(recipe, overrides)
        steps = checked.recipe.steps()
        if data:
            rows = checked.check_data(model, large=True)
    except PlmccError as problem:
        if output is Format.text:
            raise
        print_json({"ok": False, "file": str(recipe), "diagnostics": problem.to_json()})
        raise typer.Exit(1) from None
    stages, passes = len(steps), sum(len(step.passes) for step in steps)
    if output is Format.json:
        counts = {"stages": stages, "passes": passes}
        counts |= {"rows": rows} if data else {}
        print_json({"ok": True, "file": str(recipe), "diagnostics": [], **counts})
    else:
        found = [_count(stages, "stage"), _count(passes, "pass")]
        found += [f"{rows:,} rows of data"] if data else []
        typer.echo(f"{recipe}: ok ({', '.join(found)})")


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


def match(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model directory (config.json is enough) or a hub id."
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="What `targets` accepts: an alias, a glob, re:<regex> or class:<Name>.",
        ),
    ] = None,
    output: Output = Format.text,
) -> None:
    """List the modules that a pattern matches, or, without one, the patterns to choose from."""
    check_model(model)

    from plmcc.models.source import load_source
    from plmcc.planning.match import find, print_found
    from plmcc.utils.terminal import calm, console

    calm()
    found = find(load_source(model, meta=True).model, pattern)
    missed = pattern is not None and not any(not hit.reason for hit in found.hits)
    if output is Format.json:
        print_json({"ok": not missed} | found.to_json())
        raise typer.Exit(1 if missed else 0)
    print_found(found, console())
    if missed:
        message = f"`{pattern}` matches nothing that a pass can rewrite"
        hint = "choose one of the patterns above"
        raise error("PLM201", message, model, got=str(pattern), hint=hint)


def plan(
    recipe: RecipePath,
    model: Model = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Show what a recipe will do to a model and what it will cost, without reading the weights."""
    try:
        checked = check_recipe(recipe, overrides)
        check_model(model or checked.recipe.model)
        loaded = checked.load()

        from plmcc.planning.plan import plan as make
        from plmcc.planning.view import print_plan
        from plmcc.utils.terminal import console

        made = make(loaded, model, recipe.parent)
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


def dry_run(
    recipe: RecipePath,
    model: Model = None,
    overrides: Overrides = None,
    output: Output = Format.text,
) -> None:
    """Run a recipe on a small random copy of a model and check everything that apply promises."""
    checked = check_recipe(recipe, overrides)
    check_model(model or checked.recipe.model)
    loaded = checked.load()

    from plmcc.testing.dry_run import dry_run as run
    from plmcc.testing.dry_run import print_dry_run
    from plmcc.utils.terminal import console

    result = run(loaded, model, recipe.parent)
    print_json(result.to_json()) if output is Format.json else print_dry_run(result, console())
    if not result.ok:
        raise typer.Exit(1)
