"""Reads recipes: YAML text becomes a frozen `Recipe`, or an error with every mistake in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plmcc.catalog import registry as catalog
from plmcc.catalog.origin import Origin
from plmcc.diagnostics import Diagnostic, Location, PlmccError, error
from plmcc.pass_base import Pass
from plmcc.recipe.document import Document, Steps, compose, read_text
from plmcc.recipe.explain import explain, shown
from plmcc.recipe.models import Recipe, Stage
from plmcc.recipe.overrides import override, put
from plmcc.recipe.search_space import Range, check_search, without_search
from plmcc.recipe.sections import (
    Calibrate,
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
from plmcc.utils.files import read_json
from plmcc.utils.types import Values

__all__ = [
    "Calibrate",
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


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, load_torch: bool = False
) -> Recipe:
    """Return the recipe in a file.

    Args:
        path: a YAML file.
        overrides: `--set` arguments such as `passes.0.compositional_codes.codebooks=16`.
        load_torch: import the classes of the passes, and torch with them; without it, passes have
            options but cannot be applied.

    Raises:
        PlmccError: everything that is wrong with the file.
    """
    return parse_recipe(read_text(Path(path)), str(path), overrides, load_torch=load_torch)


def parse_recipe(
    text: str, file: str = "<recipe>", overrides: Sequence[str] = (), *, load_torch: bool = False
) -> Recipe:
    """Return the recipe in a text; `file` names it in errors. Otherwise as `load_recipe`."""
    document = compose(text, file)
    override(document, overrides)
    recipe = _built(document, file, load_torch)
    if recipe.search:
        check_search(recipe.search, document, lambda changed: _built(changed, file, False))
    return recipe


def varied(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """Return a recipe with other values at dotted paths, without its `search`, and with passes
    that can be applied.

    Raises:
        PlmccError: the values do not go together.
    """
    document = recipe._document or compose(recipe.to_yaml(), recipe.name)
    document = without_search(document)
    for path, value in values.items():
        put(document, path, value, f"{path}={json.dumps(value)}")
    return _built(document, recipe.name, True)


def _built(document: Document, file: str, load_torch: bool) -> Recipe:
    """The recipe in a document; `file` names it where it has no name."""
    _check_version(document)
    problems: list[Diagnostic] = []
    data = {"name": _default_name(file)} | document.data
    data = _with_passes(data, document, problems, load_torch)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as problem:
        problems += explain(problem, Recipe, document)
    if problems:
        raise PlmccError(*sorted(problems, key=_order))
    recipe._document = document
    recipe._pass_class = catalog.load if load_torch else catalog.options
    return recipe


def _order(diagnostic: Diagnostic) -> tuple[int, int]:
    location = diagnostic.location
    return (location.line, location.column) if isinstance(location, Location) else (1 << 30, 0)


def _default_name(file: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip("-._")[:100] or "recipe"


def _check_version(document: Document) -> None:
    # Alone, because another version has other keys.
    start = document.location(())
    if not isinstance(document.data, dict):
        given = shown(document.data)
        message = "a recipe is a mapping of keys to values"
        raise error("PLM103", message, start, got=given, hint="begin with `plmcc: 1`")
    version = document.data.get("plmcc")
    if "plmcc" not in document.data:
        message = "a recipe needs the key `plmcc`, the version of the format"
        raise error("PLM102", message, start, allowed="1", hint="add the line `plmcc: 1`")
    if type(version) is not int or version != 1:
        message = "this version of plmcc does not read this recipe format"
        hint = "write `plmcc: 1`, or install the plmcc that reads this version"
        location = document.location(("plmcc",))
        raise error("PLM106", message, location, got=shown(version), allowed="1", hint=hint)


def _with_passes(
    data: Values, document: Document, problems: list[Diagnostic], load_torch: bool
) -> Values:
    """The data with pass objects in place of the entries of `passes`."""

    def build(holder: object, path: Steps) -> Any:
        if not isinstance(holder, dict) or not isinstance(holder.get("passes"), list):
            return holder
        entries = enumerate(holder["passes"])
        passes = [
            _pass(entry, document, (*path, "passes", index), problems, load_torch)
            for index, entry in entries
        ]
        return holder | {"passes": passes}

    data = build(data, ())
    if isinstance(data.get("stages"), list):
        stages = enumerate(data["stages"])
        data |= {"stages": [build(stage, ("stages", index)) for index, stage in stages]}
    return data


def _pass(
    entry: object, document: Document, path: Steps, problems: list[Diagnostic], load_torch: bool
) -> Pass:
    try:
        name, options = _entry(entry, document, path)
        return _validated(name, options, document, (*path, name), load_torch)
    except PlmccError as problem:
        problems += problem.diagnostics
        return Pass()  # a stand-in, so that the rest of the recipe is checked too


def _entry(entry: object, document: Document, path: Steps) -> tuple[str, Values]:
    entry = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry:
        allowed = "`- name` or `- name: {option: value}`"
        location = document.location(path)
        raise error(
            "PLM111", "this entry is not a pass", location, got=shown(entry), allowed=allowed
        )
    name, *others = entry
    if others:
        hint = "begin every pass with `- `"
        if entry[name] is None:
            hint = f"indent the options deeper than `{name}:`"
        location = document.location((*path, others[0]), key=True)
        message = f"`{others[0]}` is a second key beside `{name}`; an entry is a single pass"
        raise error("PLM111", message, location, hint=hint)
    options = {} if entry[name] is None else entry[name]
    if not isinstance(options, dict) and str(name) in catalog.entries():
        location = document.location((*path, name))
        message = f"the options of `{name}` have the wrong type"
        raise error("PLM103", message, location, got=shown(options), allowed="a mapping")
    if not isinstance(options, dict):
        options = {}  # the name is the mistake: no such pass
    # `initialisation` is `initialization`: recipes are written on both sides. Not a validator of
    # passes, since after one that runs before them lists are no tuples any longer.
    return str(name), {str(key).replace("isation", "ization"): v for key, v in options.items()}


def _of_package(problem: Diagnostic, name: str, file: str) -> Diagnostic:
    """Say which package an unknown pass is in, where the lock of an artifact beside the recipe
    knows it."""
    lock = Path(file).parent / "plmcc.lock.json"
    if problem.code != "PLM110" or not lock.is_file():
        return problem
    try:
        made = Origin.from_json(read_json(lock)["passes"][name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return problem
    if not made.distribution:
        return problem
    message = f"the recipe needs the pass `{name}` of {made}, which is not installed"
    hint = f"pip install {made.distribution}=={made.version}"
    return replace(problem, code="PLM402", message=message, allowed="", hint=hint)


def _validated(
    name: str, options: Values, document: Document, path: Steps, load_torch: bool
) -> Pass:
    try:
        kind = catalog.load(name) if load_torch else catalog.options(name)
    except PlmccError as problem:
        location = document.location(path, key=True)
        found = [_of_package(d, name, str(location).rsplit(":", 2)[0]) for d in problem.diagnostics]
        raise PlmccError(*(replace(d, location=location) for d in found)) from None
    try:
        # JSON rules: exact types, but a list may become a tuple and text an enum.
        return kind.model_validate_json(json.dumps(options), strict=True)
    except ValidationError as problem:
        raise PlmccError(*explain(problem, kind, document, path)) from None
