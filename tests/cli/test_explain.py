"""`plmcc explain`: every code has an explanation of its own, and the examples are real."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.diagnostics import CODES, HELP_FILE, PlmccError, explanations
from support.error_examples import help_text, run_examples

NOT_REPRODUCED = {"PLM003", "PLM503", "PLM504", "PLM505"}
"""A file that nobody may read, a killed run, too little memory, a whole search."""


def explain(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["explain", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_every_code_has_an_explanation_of_its_own() -> None:
    found = explanations()
    assert list(found) == list(CODES)
    for one in found.values():
        for text in (one.why, one.fix):
            assert text.endswith(".")
            assert text[0].isupper() or text[0] == "`"
            assert len(text) > 20
    for name in ("why", "fix"):
        assert len({getattr(one, name) for one in found.values()}) == len(CODES)


def test_the_examples_are_what_the_commands_print() -> None:
    ran = run_examples()
    assert set(CODES) - set(ran) == NOT_REPRODUCED
    for code, one in explanations().items():
        assert one.example == ran.get(code, ""), "PYTHONPATH=tests python -m support.error_examples"
    assert HELP_FILE.read_text(encoding="utf-8") == help_text(explanations())


@pytest.mark.parametrize("code", ["PLM303", "plm303"])
def test_one_code(code: str) -> None:
    text = explain(code)
    assert text.startswith("PLM303: settings that do not fit the model or the data\n")
    assert "\nWhat to do\n  Do what the hint says: change the setting that is named" in text
    assert "\n  $ plmcc apply metric.yaml model -o small\n  metric.yaml:4:21: error" in text
    assert json.loads(explain(code, "--format", "json")) == explanations()["PLM303"].to_json()


def test_all_codes() -> None:
    lines = explain().splitlines()[1:]
    assert [line.split()[0] for line in lines if line.startswith("PLM")] == list(CODES)
    listed = json.loads(explain("--format", "json"))
    assert {one["code"]: one["meaning"] for one in listed} == CODES


@pytest.mark.parametrize(
    ("code", "hint"), [("PLM10", "did you mean `PLM1"), ("zzz", "`plmcc explain` lists the codes")]
)
def test_an_unknown_code(code: str, hint: str) -> None:
    problem = CliRunner().invoke(app, ["explain", code]).exception
    assert isinstance(problem, PlmccError)
    assert f"unknown error code `{code}`" in problem.render()
    assert hint in problem.render()
