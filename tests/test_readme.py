"""README and the console and recipe blocks of all pages: what they show exists and is valid."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from plmcc.catalog import registry as catalog
from plmcc.cli.app import app
from plmcc.recipe.load import parse_recipe
from support.docs_examples import PAGES, ROOT, example_pass, texts

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
RECIPES = [
    (page, text) for page in PAGES for text in texts(page, "yaml") if text.startswith("plmcc:")
]
CONSOLE = [(page, text) for page in PAGES for text in texts(page, "console")]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_there_are_recipes_to_check() -> None:
    assert len(RECIPES) >= 7
    assert README in {page for page, _ in RECIPES}


@pytest.mark.parametrize(
    ("page", "text"), RECIPES, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(RECIPES)]
)
def test_the_recipes_are_valid(page: Path, text: str) -> None:
    assert all(stage.passes for stage in parse_recipe(text, page.name).steps())


def commands() -> dict[str, Any]:
    """Every command by its words: `apply`, `vectors nearest`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found |= {f"{name} {key}": one for key, one in inner.items()} or {name: command}
    return found


def shown_commands() -> list[tuple[Path, list[str]]]:
    """The words after `plmcc` (or `-m plmcc.cli`) of every command line in a console block."""
    lines = [(page, line) for page, text in CONSOLE for line in text.splitlines()]
    found = []
    for page, line in lines:
        if match := re.match(r"\$ .*?\bplmcc(?:\.cli)? (.+)", line):
            found.append((page, shlex.split(match[1], comments=True)))
    return [(page, words) for page, words in found if words]


def test_the_commands_and_options_exist() -> None:
    known = commands()
    assert len(shown_commands()) > 30
    for page, words in shown_commands():
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), "")
        assert name, (page.name, words)
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, (page.name, words)


def test_every_command_is_in_the_readme() -> None:
    shown = {words[0] for page, words in shown_commands() if page == README}
    assert {name.split()[0] for name in commands()} == shown


def test_every_pass_is_in_the_readme() -> None:
    shown = re.findall(r"\[`(\w+)`\]\(passes/", TEXT)
    shipped = [name for name in catalog.names() if catalog.entry(name).origin == "plmcc"]
    assert sorted(shown) == sorted(shipped)


def test_the_demo_output_is_marked() -> None:
    assert re.search(
        r"<!-- demo output -->\n```console\n.+?```\n<!-- /demo output -->", TEXT, re.DOTALL
    )


def test_loading_in_the_readme_is_that_of_the_tutorial() -> None:
    # tests/test_docs.py runs the tutorial.
    tutorial = "".join(texts(ROOT / "docs/tutorial.md", "python"))
    [block] = [text for text in texts(README, "python") if "class " not in text]
    for line in block.splitlines():
        assert line.replace("import AutoModel", "import AutoModel, AutoTokenizer") in (
            tutorial
        ) or (line in tutorial), line


def test_the_pass_in_the_readme_is_an_excerpt() -> None:
    [block] = [text for text in texts(README, "python") if "class " in text]
    complete = iter(example_pass().splitlines())
    assert [line for line in block.splitlines() if line not in complete] == []  # in this order


USE = """
import sys, torch, plmcc
from support.tiny_models import inputs, tiny
from my_module import Int8Embedding
for name in ("bert", "gpt2", "t5"):
    model, batch = tiny(name), inputs(name)
    before = model(**batch).logits.detach()
    plmcc.Pipeline([Int8Embedding()])(model)
    after = model(**batch).logits.detach()
    assert 0 < (before - after).abs().max() < 0.1 * before.abs().max(), name
    model.save_pretrained(sys.argv[1])
    again = plmcc.load(sys.argv[1], attn_implementation="eager")
    assert torch.allclose(again(**batch).logits, after, atol=1e-5), name
print("done")
"""


def test_the_example_pass_works_as_a_package(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(example_pass(), encoding="utf-8")
    info = tmp_path / "my_pass-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-pass\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[plmcc.passes]\nmy_pass = my_module:Int8Embedding\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", USE, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "plmcc.cli", "passes"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "my_pass" in listed.stdout


def test_no_line_begins_with_the_mark_of_a_value() -> None:
    # Markdown would end the paragraph there.
    for page in PAGES:
        assert not re.search(r"^\s*<!-- /?value", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_tables_match_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
