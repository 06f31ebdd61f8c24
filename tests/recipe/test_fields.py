"""Every key of a recipe does something: each field of each section is read outside plmcc.recipe."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

import plmcc
from plmcc.recipe import models, search_space, sections
from plmcc.recipe.sections import Node

CORE = Path(plmcc.__file__).parent
VERSION = ("Recipe", "plmcc")  # checked before the recipe is built


def section_classes() -> list[type[Node]]:
    kinds = [
        kind
        for module in (sections, search_space, models)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Node) and kind is not Node
    ]
    return list(dict.fromkeys(kinds))


def core_sources() -> Iterator[str]:
    """The core without plmcc.recipe, and without the passes, which have options of their own."""
    for file in sorted(CORE.rglob("*.py")):
        if file.relative_to(CORE).parts[0] not in ("recipe", "passes"):
            yield file.read_text(encoding="utf-8")


def attributes_read(sources: Iterable[str]) -> set[str]:
    """The names in `x.name`, where `x` is not `self`: no section has its code there."""
    return {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def unread(kinds: Iterable[type[BaseModel]], sources: Iterable[str]) -> list[tuple[str, str]]:
    names = attributes_read(sources)
    fields = [(kind.__name__, field) for kind in kinds for field in kind.model_fields]
    return [(kind, field) for kind, field in fields if field not in names]


def test_every_field_of_every_section_is_read() -> None:
    kinds = section_classes()
    assert {"Recipe", "Stage", "Train", "Data", "Lower", "Range"} <= {k.__name__ for k in kinds}
    assert unread(kinds, core_sources()) == [VERSION]


def test_a_field_that_nothing_reads_is_found() -> None:
    class Lower(BaseModel):
        to: str
        dynamic: bool

    assert unread([Lower], core_sources()) == [("Lower", "dynamic")]
    assert unread([Lower], ["self.to; x.dynamic = 1"]) == [("Lower", "to"), ("Lower", "dynamic")]
