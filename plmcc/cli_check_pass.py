"""`plmcc check-pass`: the contract of passes, for somebody else's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plmcc.cli_plan import Format, Output, print_json
from plmcc.diagnostics import did_you_mean, error

if TYPE_CHECKING:
    from plmcc.pass_check import Line

_WORDS = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def check_pass(
    given: Annotated[
        str,
        typer.Argument(metavar="PASS", help="A name, module:Class or path/to/file.py:Class."),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option of the pass; repeatable."),
    ] = None,
    architecture: Annotated[
        list[str] | None,
        typer.Option("--architecture", metavar="NAME", help="Only this; repeatable."),
    ] = None,
    output: Output = Format.text,
) -> None:
    """Check a pass against the contract, on tiny models of many architectures.

    This imports the module that you name, and runs its code.
    """
    import torch

    from plmcc.guest import known
    from plmcc.pass_check import check_pass as run
    from plmcc.pass_check import with_options
    from plmcc.terminal import calm
    from plmcc.tiny import NAMES

    calm()
    torch.set_num_threads(1)  # more would only wait for each other
    for name in architecture or ():
        if name not in NAMES:
            raise error("PLM502", "there is no tiny model of it", "--architecture", given=name,
                        allowed=", ".join(NAMES), cure=did_you_mean(name, NAMES))  # fmt: skip
    lines: list[Line] = []
    with known(given) as name:
        for line in run(with_options(name, options or ()), architecture or NAMES):
            lines.append(line)
            if output is Format.text:
                _print(line)
    failed = [line for line in lines if line.verdict == "fail"]
    if output is Format.json:
        print_json({"ok": not failed, "pass": given, "checks": [one.to_json() for one in lines]})
    else:
        _summarise(given, lines)
    if failed:
        raise typer.Exit(1)


def _print(line: Line) -> None:
    color = {"fail": typer.colors.RED, "skip": typer.colors.BRIGHT_BLACK}.get(line.verdict)
    why = f": {line.reason}" if line.reason else ""
    text = f"{line.architecture:<10} {line.check:<32} {_WORDS[line.verdict]}{why}"
    typer.secho(text, fg=color)


def _summarise(given: str, lines: list[Line]) -> None:
    counts = {word: sum(line.verdict == kind for line in lines) for kind, word in _WORDS.items()}
    typer.echo(f"{given}: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    places: dict[str, list[str]] = {}
    for line in lines:
        if line.verdict == "fail":
            places.setdefault(f"{line.check}: {line.about}", []).append(line.architecture)
    for what, where in places.items():
        typer.echo(f"  failed on {', '.join(where)}: {what}")
