"""The package that `plmcc new-pass` writes, and the options that its author uses next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.testing.new_pass import write_package


@pytest.mark.exhaustive  # tests/test_readme.py does so with the example of the README
def test_the_package_satisfies_the_contract_as_it_is(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new-pass", "first_try", "-o", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    for name in ("pyproject.toml", "README.md", "first_try/__init__.py", "tests/test_first_try.py"):
        assert (tmp_path / "new" / name).is_file()
        assert name in done.output
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "new",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "new"), *sys.path[1:]])},
    )
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Pass", "this cannot be the name of a pass"),
        ("class", "this cannot be the name of a pass"),
        ("low_rank", "there is a pass `low_rank` already"),
        ("torch", "would hide another module or class"),
        ("site", "would hide another module or class"),
    ],
)
def test_names_that_cannot_be_taken(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PlmccError, match=said):
        write_package(name, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(PlmccError, match="the directory exists"):
        write_package("mine", tmp_path)


def test_one_check_can_be_repeated_alone() -> None:
    given = ["check-pass", "low_rank", "--architecture", "bert", "--only"]
    for check in ("layouts_are_json", "options_are_fixed", "resaving_is_exact"):
        done = CliRunner().invoke(app, [*given, check])
        lines = done.stdout.splitlines()
        assert done.exit_code == 0, done.stdout
        assert [line.split()[1] for line in lines[:-1]] == [check]
        assert lines[-1] == "low_rank: 1 passed, 0 failed, 0 skipped"
    with pytest.raises(PlmccError, match="there is no check `layouts_are_jason`") as caught:
        CliRunner().invoke(app, [*given, "layouts_are_jason"], catch_exceptions=False)
    assert "layouts_are_json" in str(caught.value)


def test_a_traceback_is_shown_only_when_asked(tmp_path: Path) -> None:
    for options in ([], ["--debug"]):
        command = [sys.executable, "-m", "plmcc.cli", *options, "check", str(tmp_path / "no.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(options)
        assert "error PLM" in done.stderr
