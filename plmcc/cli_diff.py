"""`plmcc diff`: what two models differ in."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """How the difference is written."""

    text = "text"
    json = "json"
    html = "html"


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, artifact or hub id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    kind: Annotated[Kind, typer.Option("--format", help="text, json or html.")] = Kind.text,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.")
    ] = None,
) -> None:
    """Show which modules two models do not have in common, and what that costs."""
    from plmcc.diff import cells
    from plmcc.diff import diff as compare
    from plmcc.page import document, table
    from plmcc.terminal import calm

    calm()
    found = compare(first, second)
    tables = cells(found)
    if kind is Kind.html:
        text = document(f"{first} and {second}", [table(*one) for one in tables])
    elif kind is Kind.json:
        text = json.dumps(found.to_json(), indent=2, ensure_ascii=False)
    else:
        text = _plain(tables)
    typer.echo(text) if file is None else file.write_text(text + "\n", encoding="utf-8")


def _plain(tables: list[tuple[str, list[str], list[list[str]]]]) -> str:
    from rich.table import Table

    from plmcc.terminal import console

    shown = console()
    with shown.capture() as captured:
        for title, header, rows in tables:
            one = Table(*header, title=title)
            for row in rows:
                one.add_row(*row)
            shown.print(one if rows else "The modules are the same.")
    return captured.get().rstrip("\n")
