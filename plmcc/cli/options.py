"""Arguments that several commands share, and the formats of what they print."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How a command prints its result."""

    text = "text"
    json = "json"


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a value of the recipe, such as "
        "passes.0.compositional_codes.codebooks=16; repeatable.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result in that directory.")
]
Output = Annotated[Format, typer.Option("--format", help="Print text, or JSON for programs.")]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model directory (config.json is enough) or a hub id; by default the recipe's.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A model directory or a hub id; by default the recipe's."),
]
Artifact = Annotated[
    Path, typer.Argument(metavar="DIR", help="A directory that plmcc apply has written.")
]


def print_json(value: object) -> None:
    """Print plain values for programs."""
    typer.echo(json.dumps(value, indent=2))
