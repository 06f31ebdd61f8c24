"""The pages that come from the code: one for each pass, and the codes of errors.

MkDocs runs this as a hook (`mkdocs.yml`); nothing is written into the checkout.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
import tempfile
from contextlib import chdir
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from plmcc import catalog, catalog_view
from plmcc.diagnostics import CODES, Diagnostic, PlmccError
from plmcc.recipe import parse_recipe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
_BLOCKS = {0: "Files and YAML", 1: "Recipes", 2: "Matching", 3: "Data and training",
           4: "Models and artifacts", 5: "Command line and files"}  # fmt: skip
_WHOLE_TABLES = {
    "compressed_attention": ("translation", "joint_attention"),
    "drop_layers": ("translation",),
    "movement_pruning": ("pruning",),
}
"""Tables whose lines call a pass by other names, as the paper does."""
_ALSO = {"compositional_codes": ("product_codes",)}


@cache
def pages() -> dict[str, str]:
    """Return the text of every generated page by its path below `docs`."""
    names = [name for name in catalog.names() if catalog.entry(name).origin == "plmcc"]
    found = {f"passes/{name}.md": pass_page(name) for name in names}
    return found | {"passes/index.md": passes_page(names), "errors.md": errors_page()}


# --- passes


def passes_page(names: list[str]) -> str:
    """Return the list of passes."""
    rows = {row["name"]: row["doc"] for row in catalog_view.overview()}
    lines = [f"| [`{name}`]({name}.md) | {_cell(rows[name])} |" for name in names]
    head = "# Passes\n\nA pass is a technique; its name is the key in a recipe.\n"
    return "\n".join([head, "| pass | |", "| --- | --- |", *lines, ""])


def pass_page(name: str) -> str:
    """Return the page of a pass: what its file and its options say, and what was measured."""
    about = catalog_view.details(name)
    promise = {"exact": "the outputs", "lossy": "what training recovers"}
    keeps = promise.get(
        about["preserves"], f"the outputs within {about['tolerance']:g} of their scale"
    )
    parts = [f"# {name}", about["doc"], f"Paper: {about['paper']}. It preserves {keeps}."]
    if about["hazards"]:
        parts += [
            "## Before you choose it",
            "\n".join(f"- {hazard}" for hazard in about["hazards"]),
        ]
    parts += ["## In detail", _file_docstring(name), "## Options", _options(about["options"])]
    tables = _measured(name)
    if tables:
        parts += ["## Measured", *tables]
    return "\n\n".join(parts) + "\n"


def _file_docstring(name: str) -> str:
    spec = find_spec(catalog.entry(name).module)
    assert spec is not None
    assert spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    parts = doc.split("`")  # every other one is code
    parts[::2] = [re.sub(r"([*_<>\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _options(options: list[dict[str, Any]]) -> str:
    lines = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for option in options:
        kind = ", ".join(part for part in (option["type"], option["range"]) if part)
        default = "required" if option["required"] else f"`{json.dumps(option['default'])}`"
        description = _cell(" ".join(option["description"].split()))
        lines.append(f"| `{option['name']}` | {_cell(kind)} | {_cell(default)} | {description} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _measured(name: str) -> list[str]:
    """The lines about a pass of the tables that the README has whole."""
    tables = _module(ROOT / "benchmarks/tables.py")
    found = []
    for table, render in tables.TABLES.items():
        result = json.loads((ROOT / f"benchmarks/results/{table}.json").read_text("utf-8"))
        text = render(result["rows"])
        if table not in _WHOLE_TABLES.get(name, ()):
            text = _lines_about(text, (name, *_ALSO.get(name, ())))
        if text:
            found.append(f"{text}\n`{result['command']}`")
    return found


def _lines_about(table: str, names: tuple[str, ...]) -> str:
    """The head of a table, the original, and the lines that name one of the names."""
    head, rule, *lines = table.split("\n\n")[0].splitlines()
    own = [line for line in lines if any(name in line for name in names)]
    first = [line for line in lines[:1] if "original" in line or "dense" in line]
    return "\n".join([head, rule, *first, *own, ""]) if own else ""


# --- errors


def errors_page() -> str:
    """Return every code with its meaning, and an example where the tests' table has one."""
    parts = [
        "# Errors",
        "A user error is a paragraph: where, what, the line with a caret, what was given, what is "
        "allowed, and what to do. Its code stays the same from version to version. `--format json` "
        "prints the same for programs. The exit status is 1.",
    ]
    examples = _examples()
    for block, title in _BLOCKS.items():
        parts.append(f"## {title}")
        for code, meaning in CODES.items():
            if int(code[3]) == block:
                parts.append(f"### {code}\n\n{meaning[0].upper()}{meaning[1:]}.")
                parts += [f"```text\n{examples[code]}\n```"] if code in examples else []
    return "\n\n".join(parts) + "\n"


def _examples() -> dict[str, str]:
    """What plmcc says of the first mistake of each code in the tests' tables."""
    mistakes = _module(ROOT / "tests/mistakes.py")
    found = _runs(mistakes.FILES, mistakes.RUNS)
    for mistake in mistakes.MISTAKES:
        try:
            parse_recipe(mistake.text.replace("§", ""), "recipe.yaml")
        except PlmccError as problem:
            said: Diagnostic = problem.diagnostics[0]
            found.setdefault(said.code, said.render())
    return found


def _runs(files: dict[str, bytes], runs: list[tuple[str, str]]) -> dict[str, str]:
    """Commands that fail, and what they say, in a folder with files and a tiny model."""
    # With torch and transformers, which nothing else here needs.
    from typer.testing import CliRunner

    from plmcc.cli import app
    from plmcc.terminal import calm
    from plmcc.tiny import tiny

    calm()
    found = {}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, content in files.items():
            Path(name).write_bytes(content)
        tiny("bert").save_pretrained("model")
        _module(ROOT / "tests/words.py").words().save_pretrained("model")
        for code, command in runs:
            problem = CliRunner().invoke(app, shlex.split(command)).exception
            assert isinstance(problem, PlmccError), f"{command}: {problem!r}"
            said = problem.diagnostics[0]
            assert said.code == code, f"{command}: {said.render()}"
            found[code] = f"$ plmcc {command}\n{said.render()}"
    return found


def _module(file: Path) -> ModuleType:
    """A module of the checkout that is in no package."""
    name = f"plmcc_docs_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


# --- hooks of MkDocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation: hand-written pages, the passes, the errors."""
    names = sorted(path for path in pages() if path.startswith("passes/") and "index" not in path)
    passes = ["passes/index.md", *names]
    config.nav = ["index.md", "tutorial.md", {"Passes": passes}, "artifact.md", "errors.md"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
