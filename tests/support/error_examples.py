"""The examples of `plmcc explain`: commands that fail, with what they print.

`PYTHONPATH=tests python -m support.error_examples` runs them and writes the output into
`plmcc/diagnostics_help.yaml`; a test compares.
"""

from __future__ import annotations

import shlex
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.diagnostics import HELP_FILE, Explanation, PlmccError, explanations
from plmcc.recipe.load import parse_recipe
from plmcc.testing.tiny import tiny
from support.recipe_mistakes import FILES, MISTAKES, RUNS
from support.tokenizers import words

_INDENT = "    "


def run_examples() -> dict[str, str]:
    """Run a command for each code for which there is one, and return it with its output."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, content in FILES.items():
            Path(name).write_bytes(content)
        tiny("bert").save_pretrained("model")
        words().save_pretrained("model")
        found = dict(_run_command(*run) for run in RUNS)
    return dict(_check_recipes()) | found


def _run_command(code: str, command: str) -> tuple[str, str]:
    problem = CliRunner().invoke(app, shlex.split(command)).exception
    assert isinstance(problem, PlmccError), f"{command}: {problem!r}"
    first = problem.diagnostics[0]
    assert first.code == code, f"{command}: {first.render()}"
    return code, f"$ plmcc {command}\n{first.render()}"


def _check_recipes() -> Iterator[tuple[str, str]]:
    for mistake in reversed(MISTAKES):  # the first one of each code remains
        try:
            parse_recipe(mistake.text.replace("§", ""), "recipe.yaml")
        except PlmccError as problem:
            first = problem.diagnostics[0]
            yield first.code, f"$ plmcc check recipe.yaml\n{first.render()}"


def help_text(all_explanations: dict[str, Explanation]) -> str:
    """The file as it should be written."""
    return "\n".join(_entry(one) for one in all_explanations.values())


def _entry(one: Explanation) -> str:
    parts = [f"{one.code}:", *_folded("why", one.why), *_folded("fix", one.fix)]
    if one.example:
        parts += ["  example: |-", *(_INDENT + line for line in one.example.splitlines())]
    return "\n".join(parts) + "\n"


def _folded(key: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
    return [f"  {key}: >-", *(_INDENT + line for line in lines)]


if __name__ == "__main__":
    ran = run_examples()
    entries = {
        code: replace(one, example=ran.get(code, "")) for code, one in explanations().items()
    }
    HELP_FILE.write_text(help_text(entries), encoding="utf-8")
