"""`plmcc passes`, `schema` and `explain`: what recipes may contain, and what errors mean."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

from plmcc.cli.options import Format, Output, print_json
from plmcc.diagnostics import Explanation, did_you_mean, error, explanations


def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this pass and its options.")
    ] = None,
    output: Output = Format.text,
) -> None:
    """List the passes, or show one with its options."""
    from plmcc.catalog import view

    if name is None:
        rows = view.overview()
        print_json(rows) if output is Format.json else view.print_overview(rows)
    else:
        details = view.details(name)
        print_json(details) if output is Format.json else view.print_details(details)


def schema(
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file.")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, for completion and checks in an editor."""
    from plmcc.recipe.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if file is None:
        typer.echo(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")


def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="An error code such as PLM303.")
    ] = None,
    output: Output = Format.text,
) -> None:
    """Explain an error code, with an example, or list all codes."""
    rows = explanations()
    if code is None:
        listed = [{"code": one.code, "meaning": one.meaning} for one in rows.values()]
        print_json(listed) if output is Format.json else _print_codes(listed)
        return
    if code.upper() not in rows:
        hint = did_you_mean(code.upper(), rows, "`plmcc explain` lists the codes")
        raise error("PLM502", f"unknown error code `{code}`", "plmcc explain", hint=hint)
    one = rows[code.upper()]
    print_json(one.to_json()) if output is Format.json else _print_explanation(one)


def _print_codes(listed: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("code", "meaning", box=None, pad_edge=False)
    for row in listed:
        table.add_row(Text(row["code"], style="bold"), Text(row["meaning"]))
    Console().print(table)


def _print_explanation(one: Explanation) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"{one.code}: {one.meaning}", style="bold"))
    for title, text in (("Why it happens", one.why), ("What to do", one.fix)):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
    if one.example:
        console.print(Text("\nExample", style="bold"))
        console.print(Text(indent(one.example, "  ")), soft_wrap=True)
