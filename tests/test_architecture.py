"""`docs/architecture.md` shows the folders and the layers that there are, and imports keep to
them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docs_examples import ROOT, texts

PAGE = ROOT / "docs/architecture.md"
LINKS = {"passes", "recipes"}  # plmcc/passes and plmcc/recipes are links in a checkout


@pytest.fixture(scope="module")
def contracts() -> list[dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, object]] = settings["tool"]["importlinter"]["contracts"]
    return found


def tree() -> dict[str, set[str]]:
    """The entries of the page's tree by their folder, `/` at the end of folders."""
    [block] = [text for text in texts(PAGE, "text") if text.startswith("plmcc/\n")]
    found: dict[str, set[str]] = {"": set()}
    folder = ""
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            found.setdefault(folder, set()).add(name)
        else:
            folder = name
            found[""].add(name)
    return found


def entries(folder: Path) -> set[str]:
    """Modules and packages of a folder, links included."""
    packages = {f"{file.parent.name}/" for file in folder.glob("*/__init__.py")}
    return packages | {file.name for file in folder.glob("*.py") if file.name != "__init__.py"}


def test_the_tree_is_what_is_there() -> None:
    shown = tree()
    assert shown["plmcc/"] == entries(ROOT / "plmcc")
    assert shown["passes/"] == entries(ROOT / "passes")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode == 0:
        folders = {f"{path.split('/')[0]}/" for path in tracked.stdout.splitlines() if "/" in path}
        assert shown[""] == {folder for folder in folders if not folder.startswith(".")}


def test_the_layers_are_those_of_the_contract(contracts: list[dict[str, object]]) -> None:
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    blocks = [text.splitlines() for text in texts(PAGE, "text")]
    assert layers in blocks


def test_every_pass_is_in_the_contract_of_independence(
    contracts: list[dict[str, object]],
) -> None:
    [modules] = [
        contract["modules"] for contract in contracts if contract["type"] == "independence"
    ]
    names = {name.removesuffix(".py").rstrip("/") for name in tree()["passes/"]} - {"_shared"}
    assert modules == [f"plmcc.passes.{name}" for name in sorted(names)]


def test_imports_keep_to_the_layers() -> None:
    pytest.importorskip("importlinter", reason="the extra `dev` is not installed")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


def mirrored() -> Iterator[tuple[Path, Path]]:
    """Every folder of tests with the folder of the code that it mirrors."""
    for folder in {file.parent for file in (ROOT / "tests").rglob("test_*.py")}:
        inner = folder.relative_to(ROOT / "tests")
        if inner.parts:
            outside = inner.parts[0] in ("passes", "benchmarks")
            yield folder, ROOT / inner if outside else ROOT / "plmcc" / inner


def test_tests_mirror_the_code() -> None:
    assert [folder for folder, code in mirrored() if not code.is_dir()] == []


def test_the_page_has_a_place_for_measurements() -> None:
    assert re.search(r"<!-- house -->\n.*<!-- /house -->", PAGE.read_text(), re.DOTALL)


def test_the_limits_of_the_house_are_kept() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/house.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| ") > 10
