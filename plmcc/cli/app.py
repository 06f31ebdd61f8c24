"""The command line. A command imports what it needs when it runs: help and checks are fast."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from plmcc.cli import vectors
from plmcc.cli.apply import apply
from plmcc.cli.compare import compare
from plmcc.cli.export import export, translate
from plmcc.cli.extend import check_pass, explain, new_pass, passes, schema
from plmcc.cli.measure import bench, evaluate
from plmcc.cli.plan import check, dry_run, match, plan
from plmcc.cli.proof import diff, push, reproduce, verify
from plmcc.cli.search import search
from plmcc.cli.shrink import advise, shrink
from plmcc.diagnostics import PlmccError, error, out_of_memory

_INTERRUPTED = 130  # what typer exits with after Ctrl-C
_TERMINATED = 128 + signal.SIGTERM
_HELP = """Compress a pretrained language model, by a recipe of yours or by one that is chosen.

Try it in a checkout, without any data:

plmcc apply recipes/demo.yaml sentence-transformers/all-MiniLM-L6-v2 -o small

With text of yours:

plmcc shrink MODEL --text mine.txt --target "size<=30MB,drop<=1" -o small"""

PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {"shrink": shrink, "advise": advise, "apply": apply},
    "Look": {"check": check, "match": match, "plan": plan, "test": dry_run},
    "Prove": {
        "verify": verify,
        "reproduce": reproduce,
        "diff": diff,
        "bench": bench,
        "evaluate": evaluate,
    },
    "Choose": {"compare": compare, "search": search},
    "Ship": {"export": export, "push": push, "translate": translate},
    "Extend": {
        "passes": passes,
        "schema": schema,
        "new-pass": new_pass,
        "check-pass": check_pass,
        "explain": explain,
    },
}
"""The commands by name, in the order of work; the help shows them in these panels."""

app = typer.Typer(
    name="plmcc",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(vectors.app, name="vectors", rich_help_panel="Word vectors")


def _print_versions(wanted: bool) -> None:
    if wanted:
        python = f"Python {platform.python_version()}"
        libraries = [f"{name} {_version(name)}" for name in ("plmcc", "torch", "transformers")]
        typer.echo("\n".join([libraries[0], python, *libraries[1:]]))
        raise typer.Exit


def _version(name: str) -> str:
    """The version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


_DEBUG = "PLMCC_DEBUG"


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of plmcc, Python, torch and transformers.",
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, too.")
    ] = False,
) -> None:
    if debug:
        os.environ[_DEBUG] = "1"


def main() -> None:
    """Run the command line: a user error ends as text on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    ended: list[int] = []

    def terminate(number: int, _: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt  # as Ctrl-C: what is done is kept, children are ended

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except PlmccError as problem:
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        _fail(problem.render())
    except BrokenPipeError:
        # The reader has left (`plmcc schema | head`); the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as problem:
        if out_of_memory(problem):
            hint = "use a smaller batch or bfloat16; `plmcc apply --resume` continues the run"
            _fail(error("PLM504", "out of memory", "plmcc", hint=hint).render())
        if not isinstance(problem, OSError):
            raise
        _fail(f"{problem.filename or 'plmcc'}: error PLM501: {problem.strerror or problem}")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("terminated" if ended else "stopped", err=True)
        if ended:
            sys.exit(_TERMINATED)
        raise


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
