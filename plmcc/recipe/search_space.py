"""The section `search` of a recipe: the values that `plmcc search` may choose from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from plmcc.diagnostics import Diagnostic, PlmccError, did_you_mean, error
from plmcc.recipe.document import Document
from plmcc.recipe.overrides import put
from plmcc.recipe.sections import Node, invalid

_VARIABLE = ("passes", "train", "stages", "lower", "seed")
_NO_SUCH_PATH = ("PLM101", "PLM102", "PLM110", "PLM111", "PLM120", "PLM121", "PLM130", "PLM131")


class Range(Node):
    """Numbers from `low` to `high`, both included: whole ones where the option takes whole ones."""

    low: int | float
    """The smallest."""
    high: int | float
    """The largest."""
    step: PositiveInt | PositiveFloat | None = None
    """The distance of neighbors; by default 1 for whole numbers and none for others."""
    log: bool = False
    """Whether the scale is logarithmic, as for learning rates."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise invalid("PLM107", "`low` is not less than `high`", "low", hint="swap them")
        if self.log and self.low <= 0:
            message = "a logarithmic range needs numbers above 0"
            raise invalid("PLM107", message, "low", hint="increase it, or remove `log`")
        if self.log and self.step is not None:
            message = "`step` cannot be combined with `log: true`"
            raise invalid("PLM108", message, "step", hint="keep one of them")
        if self.step is not None and self.step > self.high - self.low:
            raise invalid("PLM107", "`step` is larger than the range", "step", hint="lower it")
        return self


Choices = Annotated[list[object], Field(min_length=2)]
Search = Annotated[dict[str, Choices | Range], Field(min_length=1)]


def check_search(
    search: Mapping[str, list[object] | Range],
    document: Document,
    build: Callable[[Document], object],
) -> None:
    """Check every path, and each of its values in the recipe.

    Args:
        search: the `search` section of a recipe that is valid otherwise.
        document: the recipe.
        build: validates a changed document.

    Raises:
        PlmccError: paths that lead nowhere, and values that do not fit there; all of them.
    """
    problems: list[Diagnostic] = []
    for path, given in search.items():
        try:
            _check_path(path, document)
            for step, value in _ends(path, given, document):
                _check_value(path, step, value, document, build)
        except PlmccError as problem:
            problems += problem.diagnostics
    if problems:
        raise PlmccError(*problems)


def without_search(document: Document) -> Document:
    """Return a copy of a recipe without this section, for values to be put in."""
    data = {key: value for key, value in document.data.items() if key != "search"}
    return Document(copy.deepcopy(data), dict(document.values), dict(document.keys))


def _check_path(path: str, document: Document) -> None:
    first = path.partition(".")[0]
    if first not in _VARIABLE:
        message = f"`{first}` cannot be searched"
        raise error(
            "PLM131",
            message,
            document.location(("search", path), key=True),
            allowed=", ".join(_VARIABLE),
            hint=did_you_mean(first, _VARIABLE),
        )


def _ends(
    path: str, given: list[object] | Range, document: Document
) -> Iterator[tuple[str | int, object]]:
    """Every choice, or the ends of a range, with its step below the path."""
    if isinstance(given, Range):
        yield from (("low", given.low), ("high", given.high))
        if given.step is not None:
            yield "step", given.low + given.step
        return
    known: list[str] = []
    for index, value in enumerate(given):
        text = json.dumps(value, sort_keys=True)
        if text in known:
            location = document.location(("search", path, index))
            raise error("PLM107", "this choice appears twice", location, got=text, hint="keep one")
        known.append(text)
        yield index, value


def _check_value(
    path: str,
    step: str | int,
    value: object,
    document: Document,
    build: Callable[[Document], object],
) -> None:
    location = document.location(("search", path, step))
    changed = without_search(document)
    try:
        put(changed, path, value, location)
        build(changed)
    except PlmccError as problem:
        found = problem.diagnostics
        if any(d.code in _NO_SUCH_PATH for d in found):
            location = document.location(("search", path), key=True)
        raise PlmccError(*(replace(d, location=location) for d in found)) from None
