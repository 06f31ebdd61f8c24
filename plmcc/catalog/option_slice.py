"""The options of a pass without its module: the part of the file that describes them, run alone.

A pass file imports torch, which takes a second; its options need only pydantic. So the class is cut
down to its fields, their docstrings and validators, and of the rest of the file only what these
name is kept. Where that would need torch after all, the caller imports the file instead.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field

from plmcc.pass_base import Pass
from plmcc.utils.types import Values

_LIGHT = sys.stdlib_module_names | {
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
}
_OURS = ("Pass", "refuse_unused")
_DESCRIPTIONS = {"model_config", "preserves", "tolerance", "paper", "hazards"}
_HOOKS = {
    "field_validator",
    "model_validator",
    "field_serializer",
    "model_serializer",
    "computed_field",
}


class CannotSlice(Exception):
    """The options of this file need more than can be run without importing it."""


def options_class(source: str, module: str, name: str | None = None) -> type[Pass]:
    """Return the pass class of a source text with its options only: no methods, no torch.

    Args:
        source: the text of a pass file, of plmcc or of an installed distribution.
        module: the name the file has when imported.
        name: the name of the class, where it is known.

    Raises:
        CannotSlice: the text has no single pass class, or its options need something heavy.
    """
    tree = ast.parse(source)
    owner = _pass_class(tree, name)
    owner.body = _kept_members(owner)
    top = _bindings(tree.body)
    kept = _closure(_names([owner]), top)
    _no_surprises(tree, kept - {owner})
    body = [_light_import(node) if _is_import(node) else node for node in tree.body if node in kept]
    body = [*_future(tree), *(node for node in body if node is not owner), owner]
    _describe(owner)
    return _run(body, module, owner.name)


def _future(tree: ast.Module) -> list[ast.stmt]:
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [node for node in nodes if node.module == "__future__"]


def _pass_class(tree: ast.Module, name: str | None) -> ast.ClassDef:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [node for node in classes if _is_pass(node) and name in (None, node.name)]
    if len(found) != 1 or found[0].decorator_list:
        raise CannotSlice("not a single plain pass class")
    if any(found[0].name in _names(node.bases) for node in classes):
        raise CannotSlice("a pass class with subclasses")
    return found[0]


def _is_pass(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Pass" for base in node.bases)


def _no_surprises(tree: ast.Module, kept: set[ast.stmt]) -> None:
    """Refuse a file whose other statements (branches, loops, calls) touch what the slice keeps."""
    bound = {name for node in kept for name in _bound(node)} - {"TYPE_CHECKING"}
    for node in tree.body:
        if not any(_bound(node)) and not _is_text(node) and bound & _names([node]):
            raise CannotSlice(f"line {node.lineno} may change what the options need")


def _kept_members(owner: ast.ClassDef) -> list[ast.stmt]:
    """Fields with their docstrings, descriptions, pydantic's hooks, and what these name."""
    members = _bindings(owner.body)
    wanted = [node for node in owner.body if _is_wanted(node)]
    kept = set(_closure(_names(wanted), members)) | set(wanted)
    body: list[ast.stmt] = []
    for before, node in zip([None, *owner.body], owner.body, strict=False):
        if node in kept or (_is_text(node) and (before is None or before in kept)):
            body.append(node)
    return body or [ast.Pass()]


_NEEDS = ("needs_training", "needs_data", "calibrates_on", "reads")
"""Methods that say what a recipe lacks, and which files it reads: by the options alone."""


def _is_wanted(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in _NEEDS or any(name in _HOOKS for name in _names(node.decorator_list))
    if isinstance(node, ast.AnnAssign) and "ClassVar" not in _names([node.annotation]):
        return True
    return bool(_DESCRIPTIONS & set(_bound(node)))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bindings(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        for name in _bound(node):
            found.setdefault(name, []).append(node)
    return found


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names bound by an import, a definition or a plain assignment."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((item.asname or item.name).partition(".")[0] for item in node.names)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _closure(names: set[str], bindings: dict[str, list[ast.stmt]]) -> set[ast.stmt]:
    kept: set[ast.stmt] = set()
    todo = list(names)
    while todo:
        for node in bindings.get(todo.pop(), []):
            if node not in kept:
                kept.add(node)
                todo += _names([node])
    return kept


def _names(nodes: list[Any]) -> set[str]:
    """Every name and attribute below the nodes."""
    found: set[str] = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _light_import(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.Import):
        heavy = [item.name for item in node.names if item.name.partition(".")[0] not in _LIGHT]
        if heavy:
            raise CannotSlice(f"the options need {heavy[0]}")
        return node
    assert isinstance(node, ast.ImportFrom)
    if node.module in ("plmcc", "plmcc.api", "plmcc.pass_base") and not node.level:
        # Other names stay unbound; using one ends in a NameError, and that in CannotSlice.
        return ast.ImportFrom("plmcc.pass_base", [n for n in node.names if n.name in _OURS], 0)
    if node.level or str(node.module).partition(".")[0] not in _LIGHT:
        raise CannotSlice(f"the options need {node.module}")
    return node


def _describe(owner: ast.ClassDef) -> None:
    """Move the docstring below each field into its annotation.

    pydantic finds these docstrings through the source file of the running module, which a slice has
    not.
    """
    for node, after in zip(owner.body, owner.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and _is_text(after):
            text = inspect.cleandoc(str(cast(ast.Constant, after.value).value))
            if "ClassVar" not in _names([node.annotation]):
                new = ast.parse(f"_Annotated[None, _Field(description={text!r})]", mode="eval").body
                assert isinstance(new, ast.Subscript)
                assert isinstance(new.slice, ast.Tuple)
                new.slice.elts[0] = node.annotation
                node.annotation = new


def _run(body: list[ast.stmt], module: str, name: str) -> type[Pass]:
    tree = ast.fix_missing_locations(ast.Module(body, []))
    space: Values = {"__name__": module, "__builtins__": builtins}
    space |= {"_Annotated": Annotated, "_Field": Field}
    try:
        exec(compile(tree, f"<options of {module}>", "exec", dont_inherit=True), space)
        for made in list(space.values()):  # in the order of the file, the pass last
            if isinstance(made, type(Pass)) and made.__module__ == module:
                cast(type[BaseModel], made).model_rebuild(force=True, _types_namespace=space)
        found = space[name]
    except Exception as problem:  # whatever the slice lacks, the whole module may have
        raise CannotSlice(str(problem)) from problem
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise CannotSlice(f"{name} is not a pass")
    return found


def pass_classes(module: ModuleType) -> list[type[Pass]]:
    """Return the pass classes that a module defines itself."""
    members = vars(module).values()
    found = [m for m in members if isinstance(m, type) and issubclass(m, Pass) and m is not Pass]
    return [kind for kind in dict.fromkeys(found) if kind.__module__ == module.__name__]
