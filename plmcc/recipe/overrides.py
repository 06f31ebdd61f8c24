"""Change a value of a recipe before it is checked: `--set path=value`, and what a search varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plmcc.diagnostics import Diagnostic, Location, PlmccError, did_you_mean, error, listing
from plmcc.recipe.document import Document, Steps, compose


def override(document: Document, arguments: Sequence[str]) -> None:
    """Change a document in place; errors in a changed value point at its argument.

    A key that the recipe does not have is added; whether it is a legal key is checked with the
    rest.

    Raises:
        PlmccError: an argument that is not `path=value`, or a path that leads nowhere; all of them.
    """
    problems: list[Diagnostic] = []
    for argument in arguments:
        try:
            _set(document, argument)
        except PlmccError as problem:
            problems += problem.diagnostics
    if problems:
        raise PlmccError(*problems)


def _set(document: Document, argument: str) -> None:
    location = f"--set {argument}"
    dotted, equals, text = argument.partition("=")
    if not equals:
        raise _no_path(location)
    put(document, dotted, _parsed(text, location), location)


def _no_path(location: Location | str) -> PlmccError:
    example = "passes.0.compositional_codes.codebooks=16"
    return error("PLM130", "this is not `path=value`", location, allowed=example)


def put(document: Document, dotted: str, value: object, location: Location | str) -> Steps:
    """Set the value at a dotted path of a document in place, and return the path; errors in the
    value will point at `location`.

    Raises:
        PlmccError: the path leads nowhere.
    """
    if not all(dotted.split(".")):
        raise _no_path(location)
    path: Steps = ()
    holder: Any = {"": document.data}  # so that the root can be normalized like any other value
    last: str | int = ""
    for part in dotted.split("."):
        holder[last] = _open(holder[last], part)
        holder = holder[last]
        last = _step(holder, part, path, location)
        path = (*path, last)
        if isinstance(holder, dict) and last not in holder:
            holder[last] = None
            document.values[path] = document.keys[path] = location
    holder[last] = value
    _move_marks(document, path, location)
    return path


def _open(value: object, part: str) -> object:
    """A value that can be entered: nothing becomes an empty mapping, `name` becomes `name: {}`."""
    if value is None:
        return {}
    return {value: {}} if value == part else value


def _step(holder: object, part: str, path: Steps, location: Location | str) -> str | int:
    """The key or index that `part` means in `holder`, which need not be there yet."""
    where = f"`{'.'.join(map(str, path))}`" if path else "the recipe"
    if isinstance(holder, str) and path[-2:-1] == ("passes",):
        holder = {holder: None}  # a pass without options
    if isinstance(holder, list):
        return _index(holder, part, where, location)
    if not isinstance(holder, dict):
        raise error("PLM131", f"{where} is a single value; nothing is below it", location)
    for key in holder:
        if isinstance(key, (str, int)) and str(key) == part:
            return key
    if path[-2:-1] == ("passes",):
        names = [str(key) for key in holder]
        message = f"{where} is not the pass `{part}`"
        hint = did_you_mean(part, names)
        raise error("PLM131", message, location, allowed=listing(names), hint=hint)
    return part


def _index(holder: list[object], part: str, where: str, location: Location | str) -> int:
    if part.isascii() and part.isdigit() and int(part[:9]) < len(holder):
        return int(part)
    allowed = f"0 to {len(holder) - 1}" if holder else "nothing: the list is empty"
    message = f"{where} is a list, and `{part}` is not an index of it"
    raise error("PLM131", message, location, got=part, allowed=allowed)


def _parsed(text: str, location: str) -> object:
    if not text.strip():
        return None
    try:
        return compose(text, location).data
    except PlmccError as problem:
        raise PlmccError(*(replace(d, location=location) for d in problem.diagnostics)) from None


def _move_marks(document: Document, path: Steps, location: Location | str) -> None:
    for marks in (document.values, document.keys):
        for old in [known for known in marks if known[: len(path)] == path]:
            del marks[old]
        marks[path] = location
