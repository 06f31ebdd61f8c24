"""`plmcc passes`, `schema`, `explain`, `new-pass` and `check-pass`: what recipes may contain, what
errors mean, and a technique of your own."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli.options import Format, Output, print_json
from plmcc.diagnostics import Explanation, did_you_mean, error, explanations

if TYPE_CHECKING:
    from plmcc.testing.check_pass import Line

_WORDS = {"pass": "passed", "fail": "failed", "skip": "skipped"}
_Given = Annotated[
    str,
    typer.Argument(metavar="PASS", help="A name, module:Class or path/to/file.py:Class."),
]
_Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the pass; repeatable."),
]
_Only = Annotated[str | None, typer.Option("--only", metavar="CHECK", help="Run only this check.")]
_Architectures = Annotated[
    list[str] | None,
    typer.Option("--architecture", metavar="NAME", help="Check only this one; repeatable."),
]


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


def check_pass(
    given: _Given,
    options: _Options = None,
    architecture: _Architectures = None,
    only: _Only = None,
    output: Output = Format.text,
) -> None:
    """Check a pass against the contract of passes, on tiny models of many architectures.

    This imports the module that you name and runs its code.
    """
    import torch

    from plmcc.catalog.uninstalled import temporarily_registered
    from plmcc.testing.check_pass import CHECK_NAMES, with_options
    from plmcc.testing.check_pass import check_pass as run
    from plmcc.testing.variants import VARIANTS
    from plmcc.utils.terminal import calm

    calm()
    torch.set_num_threads(1)  # tiny models are not faster with more
    if only is not None and only not in CHECK_NAMES:
        allowed, hint = ", ".join(CHECK_NAMES), did_you_mean(only, CHECK_NAMES)
        message = f"there is no check `{only}`"
        raise error("PLM502", message, "--only", allowed=allowed, hint=hint)
    for name in architecture or ():
        _check_architecture(name, tuple(VARIANTS))
    lines: list[Line] = []
    with temporarily_registered(given) as name:
        for line in run(with_options(name, options or ()), architecture or list(VARIANTS), only):
            lines.append(line)
            if output is Format.text:
                _print(line)
    failed = [line for line in lines if line.verdict == "fail"]
    if output is Format.json:
        print_json({"ok": not failed, "pass": given, "checks": [one.to_json() for one in lines]})
    else:
        _summarize(given, lines)
    if failed:
        raise typer.Exit(1)


def new_pass(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the pass in recipes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; default: plmcc-NAME.")
    ] = None,
) -> None:
    """Write a package with a new pass, its entry point and its test, to start from."""
    from plmcc.testing.new_pass import write_package

    target = output or Path(f"plmcc-{name.replace('_', '-')}")
    files = write_package(name, target)
    for file in files:
        typer.echo(f"  {target / file}")
    typer.echo(f"next: pip install -e {target}")
    typer.echo(f"      plmcc check-pass {name}")


def _check_architecture(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise error(
            "PLM502",
            "there is no tiny model of this architecture",
            "--architecture",
            got=name,
            allowed=", ".join(known),
            hint=did_you_mean(name, known),
        )


def _print(line: Line) -> None:
    color = {"fail": typer.colors.RED, "skip": typer.colors.BRIGHT_BLACK}.get(line.verdict)
    why = f": {line.reason}" if line.reason else ""
    text = f"{line.architecture:<13} {line.check:<32} {_WORDS[line.verdict]}{why}"
    typer.secho(text, fg=color)


def _summarize(given: str, lines: list[Line]) -> None:
    counts = {word: sum(line.verdict == kind for line in lines) for kind, word in _WORDS.items()}
    typer.echo(f"{given}: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    failures: dict[str, list[str]] = {}
    for line in lines:
        if line.verdict == "fail":
            failures.setdefault(f"{line.check}: {line.about}", []).append(line.architecture)
    for what, where in failures.items():
        typer.echo(f"  failed on {', '.join(where)}: {what}")
