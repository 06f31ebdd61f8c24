"""Recipes: YAML text to a frozen `Recipe`, or every mistake in it with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plmcc import catalog
from plmcc.diagnostics import Diagnostic, Place, PlmccError, error
from plmcc.options import Pass
from plmcc.recipe_errors import explain, shown
from plmcc.recipe_models import Recipe, Stage
from plmcc.recipe_parts import (
    Data,
    Distill,
    Evaluate,
    Lower,
    Scratch,
    Sequences,
    Synthetic,
    Train,
    TrainTokenizer,
)
from plmcc.recipe_search import Range, check_search, without_search
from plmcc.recipe_set import override, put
from plmcc.recipe_text import Document, Steps, compose, read_text

__all__ = [
    "Data",
    "Distill",
    "Evaluate",
    "Lower",
    "Range",
    "Recipe",
    "Scratch",
    "Sequences",
    "Stage",
    "Synthetic",
    "Train",
    "TrainTokenizer",
    "load_recipe",
    "parse_recipe",
    "varied",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, real: bool = False) -> Recipe:
    """Return the recipe in a file.

    Args:
        path: a YAML file.
        overrides: `--set` arguments such as `passes.0.compositional_codes.codebooks=16`.
        real: whether passes are objects of their real classes, which imports torch, or only of
            their options.

    Raises:
        PlmccError: everything that is wrong with the file.
    """
    return parse_recipe(read_text(Path(path)), str(path), overrides, real=real)


def parse_recipe(
    text: str, file: str = "<recipe>", overrides: Sequence[str] = (), *, real: bool = False
) -> Recipe:
    """Return the recipe in a text; `file` names it in errors. Otherwise as `load_recipe`."""
    document = compose(text, file)
    override(document, overrides)
    recipe = _built(document, file, real)
    if recipe.search:
        check_search(recipe.search, document, lambda changed: _built(changed, file, False))
    return recipe


def varied(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values at dotted paths, without its `search`; its passes are of
    their real classes.

    Raises:
        PlmccError: the values do not go together.
    """
    document = recipe._document or compose(recipe.to_yaml(), recipe.name)
    document = without_search(document)
    for path, value in values.items():
        put(document, path, value, f"{path}={json.dumps(value)}")
    return _built(document, recipe.name, True)


def _built(document: Document, file: str, real: bool) -> Recipe:
    """The recipe in a document; `file` names it where it has no name."""
    _check_version(document)
    problems: list[Diagnostic] = []
    data = {"name": _default_name(file)} | document.data
    data = _with_passes(data, document, problems, real)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as problem:
        problems += explain(problem, Recipe, document)
    if problems:
        raise PlmccError(*sorted(problems, key=_order))
    recipe._document = document
    return recipe


def _order(diagnostic: Diagnostic) -> tuple[int, int]:
    place = diagnostic.place
    return (place.line, place.column) if isinstance(place, Place) else (1 << 30, 0)


def _default_name(file: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip("-._")[:100] or "recipe"


def _check_version(document: Document) -> None:
    # Alone, because another version has other keys.
    start = document.place(())
    if not isinstance(document.data, dict):
        given = shown(document.data)
        message = "a recipe is a mapping of keys to values"
        raise error("PLM103", message, start, given=given, cure="begin with `plmcc: 1`")
    version = document.data.get("plmcc")
    if "plmcc" not in document.data:
        message = "a recipe needs the key `plmcc`, the version of the format"
        raise error("PLM102", message, start, allowed="1", cure="add the line `plmcc: 1`")
    if type(version) is not int or version != 1:
        message = "this plmcc does not read such a recipe format"
        cure = "write `plmcc: 1`, or install the plmcc that reads this version"
        place = document.place(("plmcc",))
        raise error("PLM106", message, place, given=shown(version), allowed="1", cure=cure)


def _with_passes(
    data: dict[str, Any], document: Document, problems: list[Diagnostic], real: bool
) -> dict[str, Any]:
    """The data with pass objects in place of the entries of `passes`."""

    def build(holder: Any, path: Steps) -> Any:
        if not isinstance(holder, dict) or not isinstance(holder.get("passes"), list):
            return holder
        entries = enumerate(holder["passes"])
        passes = [
            _pass(entry, document, (*path, "passes", index), problems, real)
            for index, entry in entries
        ]
        return holder | {"passes": passes}

    data = build(data, ())
    if isinstance(data.get("stages"), list):
        stages = enumerate(data["stages"])
        data |= {"stages": [build(stage, ("stages", index)) for index, stage in stages]}
    return data


def _pass(
    entry: Any, document: Document, path: Steps, problems: list[Diagnostic], real: bool
) -> Pass:
    try:
        name, options = _entry(entry, document, path)
        return _validated(name, options, document, (*path, name), real)
    except PlmccError as problem:
        problems += problem.diagnostics
        return Pass()  # a stand-in, so that the rest of the recipe is checked too


def _entry(entry: Any, document: Document, path: Steps) -> tuple[str, dict[str, Any]]:
    entry = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry:
        allowed = "`- name` or `- name: {option: value}`"
        place = document.place(path)
        raise error("PLM111", "this is not a pass", place, given=shown(entry), allowed=allowed)
    name, *others = entry
    if others:
        cure = "begin every pass with `- `"
        if entry[name] is None:
            cure = f"indent the options deeper than `{name}:`"
        place = document.place((*path, others[0]), key=True)
        message = f"`{others[0]}` stands beside `{name}`; an entry is a single pass"
        raise error("PLM111", message, place, cure=cure)
    options = {} if entry[name] is None else entry[name]
    if not isinstance(options, dict):
        place = document.place((*path, name))
        message = f"the options of `{name}` have the wrong type"
        raise error("PLM103", message, place, given=shown(options), allowed="a mapping")
    return str(name), options


def _validated(
    name: str, options: dict[str, Any], document: Document, path: Steps, real: bool
) -> Pass:
    try:
        kind = catalog.load(name) if real else catalog.options(name)
    except PlmccError as problem:
        place = document.place(path, key=True)
        raise PlmccError(*(replace(d, place=place) for d in problem.diagnostics)) from None
    try:
        # JSON rules: exact types, but a list may become a tuple and text an enum.
        return kind.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as problem:
        raise PlmccError(*explain(problem, kind, document, path)) from None
