"""The pages that come from the code: one for each pass, the commands, and the codes of errors.

MkDocs runs this as a hook (`mkdocs.yml`); nothing is written into the checkout.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from plmcc.catalog import registry as catalog
from plmcc.catalog import view as catalog_view
from plmcc.diagnostics import Explanation, explanations

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
_BLOCKS = {
    0: "Files and YAML",
    1: "Recipes",
    2: "Matching",
    3: "Data and training",
    4: "Models and artifacts",
    5: "Command line and files",
}
_GUIDES = (
    "shrink",
    "your-data",
    "embedding-tables",
    "translation",
    "language-models",
    "pruning",
    "word-vectors",
    "search-and-compare",
    "exports",
    "long-runs",
)
_WHOLE_TABLES = {
    "compressed_attention": ("translation", "joint_attention"),
    "drop_layers": ("translation",),
    "movement_pruning": ("pruning",),
    "structured_pruning": ("llm",),
}
"""Tables whose lines call a pass by other names, as the paper does."""
_ERROR = re.compile(r"<!-- error: (PLM\d{3}) -->")
"""In a page: the example of that error."""
_ALSO = {"compositional_codes": ("product_codes",)}


@cache
def pages() -> dict[str, str]:
    """Return the text of every generated page by its path below `docs`."""
    names = [name for name in catalog.names() if catalog.entry(name).origin == "plmcc"]
    found = {f"passes/{name}.md": pass_page(name) for name in names}
    others = {"passes/index.md": passes_page(names), "errors.md": errors_page()}
    return found | others | {"commands.md": commands_page()}


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
    return _prose(ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "")


def _prose(text: str) -> str:
    """Escape what Markdown and HTML would interpret, outside code."""
    parts = text.split("`")  # every other one is code
    parts[::2] = [re.sub(r"([*_<>\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _options(options: list[dict[str, Any]]) -> str:
    lines = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for option in options:
        kind = ", ".join(part for part in (option["type"], option["range"]) if part)
        default = "required" if option["required"] else f"`{json.dumps(option['default'])}`"
        description = _cell(_prose(" ".join(option["description"].split())))
        lines.append(f"| `{option['name']}` | {_cell(kind)} | {_cell(default)} | {description} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _measured(name: str) -> list[str]:
    """The lines about a pass of the tables in `results.md`."""
    tables = _module(ROOT / "benchmarks/tables.py")
    found = []
    for table, render in tables.TABLES.items():
        result = tables.results(table)
        text = render(result["rows"])
        if table not in _WHOLE_TABLES.get(name, ()):
            text = _lines_about(text, (name, *_ALSO.get(name, ())))
        if text:
            found.append(f"{text}\n`{tables.command(result)}`")
    return found


def _lines_about(table: str, names: tuple[str, ...]) -> str:
    """The head of a table, the original, and the lines that name one of the names."""
    head, rule, *lines = table.split("\n\n")[0].splitlines()
    own = [line for line in lines if any(name in line for name in names)]
    first = [line for line in lines[:1] if "original" in line or "dense" in line]
    return "\n".join([head, rule, *first, *own, ""]) if own else ""


# --- commands


def commands_page() -> str:
    """Return every command with its help, arguments and options."""
    import typer

    from plmcc.cli.app import app

    parts = [
        "# Commands",
        "In the order of work. `plmcc COMMAND --help` prints the same, `plmcc --version` the "
        "versions. An option that takes a list may be repeated.",
    ]
    panel = ""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            parts.append(f"## {panel}")
        parts += _command(command, f"plmcc {name}")
    return "\n\n".join(parts) + "\n"


def _command(command: Any, name: str) -> list[str]:
    if inner := getattr(command, "commands", None):
        return [part for key, one in inner.items() for part in _command(one, f"{name} {key}")]
    parts = [f"### {name}", inspect.cleandoc(command.help or "")]
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    lines = [_parameter(one) for one in shown]
    return [*parts, "\n".join(["| | | |", "| --- | --- | --- |", *lines])] if lines else parts


def _parameter(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    name = (
        ", ".join([*parameter.opts, *parameter.secondary_opts])
        if option
        else str(parameter.metavar or parameter.name).upper()
    )
    default = parameter.default
    given = default not in (None, False, True, (), []) and isinstance(default, str | int | float)
    kind = "required" if parameter.required else f"default `{default}`" if given else ""
    return f"| `{_cell(name)}` | {_cell(kind)} | {_cell(_prose(parameter.help or ''))} |"


# --- errors


def errors_page() -> str:
    """Return what `plmcc explain` prints of every code."""
    parts = [
        "# Errors",
        "A user error is one paragraph: the location, the problem, the line with a caret, what was "
        "given, what is allowed, and a hint. Its code is the same in every version. "
        "`plmcc explain CODE` prints what is here, `--format json` prints an error for programs. "
        "The exit status is 1.",
    ]
    for block, title in _BLOCKS.items():
        parts.append(f"## {title}")
        for code, one in explanations().items():
            if int(code[3]) == block:
                parts.append(f"### {code}\n\n{one.meaning[0].upper()}{one.meaning[1:]}.")
                parts += [_prose(one.why), _prose(one.fix)]
                parts += [_example(one)] if one.example else []
    return "\n\n".join(parts) + "\n"


def _example(one: Explanation) -> str:
    return f"```text\n{one.example}\n```"


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
    """Set the navigation."""
    names = sorted(path for path in pages() if path.startswith("passes/") and "index" not in path)
    passes = ["passes/index.md", *names]
    guides = [f"guides/{name}.md" for name in _GUIDES]
    config.nav = [
        "index.md",
        "tutorial.md",
        "choosing-a-pass.md",
        {"Guides": guides},
        {"Passes": passes},
        {"Reference": ["commands.md", "artifact.md", "security.md", "errors.md"]},
        "results.md",
        {"Extending plmcc": ["writing-a-pass.md", "hooks.md", "architecture.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put examples of errors in the place of their marks."""
    return _ERROR.sub(lambda mark: _example(explanations()[mark[1]]), markdown)
