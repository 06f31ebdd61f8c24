"""`plmcc --help` and `--version`: the order of work, panels, versions without imports."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from plmcc.cli.app import app

PANELS = {
    "Start": ["shrink", "advise", "apply"],
    "Look": ["check", "match", "plan", "test"],
    "Prove": ["verify", "reproduce", "diff", "bench", "evaluate"],
    "Choose": ["compare", "search"],
    "Ship": ["export", "push", "translate"],
    "Extend": ["passes", "schema", "new-pass", "check-pass", "explain"],
    "Word vectors": ["vectors"],
}
COMMANDS = [name for names in PANELS.values() for name in names]


def output(*arguments: str) -> str:
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [*arguments], env=environment, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_panels_and_commands_in_the_order_of_work() -> None:
    found: dict[str, list[str]] = {}
    for line in output("--help").splitlines():
        if title := re.match(r"╭─ ([\w ]+?) ─+╮", line):
            names = found.setdefault(title[1], [])
        elif name := re.match(r"│ ([a-z][a-z-]*)  ", line):
            names.append(name[1])
    assert found.pop("Options") == []
    assert list(found.items()) == list(PANELS.items())


def test_the_help_begins_with_a_command_to_try() -> None:
    head = output("--help").partition("╭")[0]
    assert "plmcc apply recipes/demo.yaml " in head


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_argument_has_a_help_text(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for one in getattr(command, "commands", {name: command}).values():
        texts = [one.help or "", *(p.help or "" for p in one.params if p.name != "help")]
        for text in texts:
            assert re.match(r"[A-Z`/]|[a-z0-9]+[:,. ]", text), (name, text)
            assert text.rstrip().endswith((".", "?", "=16", "; repeatable.")), (name, text)
            assert not re.match(r"(Of|Likewise|As)\b", text), (name, text)


def test_versions_without_importing_anything() -> None:
    code = (
        "import sys\nfrom plmcc.cli import main\nsys.argv[1:] = ['--version']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    version = importlib.metadata.version
    assert done.stdout.splitlines() == [
        f"plmcc {version('plmcc')}",
        f"Python {platform.python_version()}",
        f"torch {version('torch')}",
        f"transformers {version('transformers')}",
    ]
