"""Turns the errors of pydantic into diagnostics: location in the recipe, message and hint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from plmcc.diagnostics import Diagnostic, did_you_mean, listing
from plmcc.recipe.document import Document, Steps
from plmcc.recipe.training_arguments import SET_BY_PLMCC
from plmcc.utils.types import Values

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
_RANGES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
}
_UNKNOWN = ("extra_forbidden", "invalid_key")


@dataclass(frozen=True)
class _Found:
    path: Steps
    key: bool  # the key is at fault, not the value
    branch: bool  # one alternative of a union said so
    details: ErrorDetails


def explain(
    problem: ValidationError, model: type[BaseModel], document: Document, base: Steps = ()
) -> list[Diagnostic]:
    """Return what is wrong with the value at `base`, which was validated as a `model`."""
    data = value_at(document.data, base)
    found = [_locate(details, data) for details in problem.errors(include_url=False)]
    deep = [f for f in found if not _is_shadowed(f, found)]
    groups: dict[tuple[Steps, bool], list[_Found]] = {}
    for item in deep:
        groups.setdefault((item.path, item.key), []).append(item)
    return [_diagnostic(group, model, document, base, data) for group in groups.values()]


def value_at(data: Any, path: Steps) -> object:
    """Return the value at `path`, or None where there is none."""
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def shown(value: object) -> str:
    """Return a value as a user would recognize it, short and with its type where that matters."""
    if isinstance(value, dict):
        return f"a mapping with the keys {listing([str(k) for k in value], 5)}" if value else "{}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "[]"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _locate(details: ErrorDetails, data: Any) -> _Found:
    """Follow pydantic's location through the data; what does not lead on names a union branch."""
    path: list[str | int] = []
    branch = key = False
    for step in details["loc"]:
        inside = _inside(data, step)
        if inside is not None:
            path.append(inside)
            data = data[inside]
        elif step == "[key]":
            key = True
        elif details["type"] == "missing" and step == details["loc"][-1]:
            path.append(step)
        else:
            branch = True
    if details["type"] == "plmcc":
        path += details["ctx"]["at"]
    elif details["type"] == "value_error" and isinstance(data, dict):
        path += [key for key in data if _is_about(details["msg"], key)]
    return _Found(tuple(path), key or details["type"] in _UNKNOWN, branch, details)


def _is_about(message: str, key: object) -> bool:
    """Whether the message of a validator of a whole mapping begins with a key, in backticks."""
    return _words(message).startswith((f"`{key}`", f"`{key}: "))


def _words(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _inside(data: object, step: str | int) -> str | int | None:
    if isinstance(data, list):
        return step if isinstance(step, int) and 0 <= step < len(data) else None
    if not isinstance(data, dict):
        return None
    # JSON has text for keys where YAML had numbers.
    return next((key for key in data if key == step or str(key) == step), None)


def _is_shadowed(item: _Found, found: list[_Found]) -> bool:
    """Whether another branch of the same union came further into the value."""
    length = len(item.path)
    return item.branch and any(
        len(other.path) > length and other.path[:length] == item.path for other in found
    )


def _diagnostic(
    group: list[_Found], model: object, document: Document, base: Steps, data: object
) -> Diagnostic:
    first, kind = group[0], group[0].details["type"]
    whole = bool(base) and not first.path  # a pass: its name says more than its first option
    location = document.location((*base, *first.path), key=first.key or whole)
    if kind in _UNKNOWN:
        code, message, allowed, hint = _unknown_key(first.path, model, base)
        return Diagnostic(code, message, location, "", allowed, hint)
    if kind == "missing":
        parent = _parent(base + first.path)
        message = f"{parent} needs the key `{first.path[-1]}`"
        location = document.location((*base, *first.path[:-1]), key=True)
        return Diagnostic("PLM102", message, location, hint=f"add `{first.path[-1]}: ...`")
    code, message, allowed, hint = _bad_value(group, base + first.path)
    given = "" if kind == "plmcc" else shown(_input(first, data))
    return Diagnostic(code, message, location, given, allowed, hint)


def _input(found: _Found, data: object) -> object:
    return found.path[-1] if found.key else value_at(data, found.path)


def _parent(path: Steps) -> str:
    names = [str(step) for step in path[:-1] if isinstance(step, str)]
    return f"`{names[-1]}`" if names else "a recipe"


def _unknown_key(path: Steps, model: object, base: Steps) -> tuple[str, str, str, str]:
    name, known = path[-1], _keys_at(model, path[:-1])
    if path[:-1][-1:] == ("arguments",) and not base:
        if name in SET_BY_PLMCC:
            return "PLM121", f"`{name}` is set by plmcc", "", SET_BY_PLMCC[str(name)]
        message = f"transformers.TrainingArguments has no `{name}`"
        return "PLM120", message, "", did_you_mean(name, known)
    owner = _parent(base + path)
    message = f"unknown key `{name}` in {owner}"
    return "PLM101", message, listing(known), did_you_mean(name, known)


def _keys_at(kind: object, path: Steps) -> list[str]:
    """The keys of the model at `path` below a model."""
    for step in path:
        kinds = [_below(part, step) for part in _flat(kind)]
        kind = next((below for below in kinds if below is not None), None)
    return [key for part in _flat(kind) for key in _fields(part)]


def _flat(kind: object) -> Iterator[object]:
    """The alternatives of an annotation."""
    if isinstance(kind, type) or is_typeddict(kind) or get_origin(kind) in (list, dict, tuple):
        yield kind
    else:
        for part in get_args(kind):
            yield from _flat(part)


def _below(kind: object, step: str | int) -> object:
    if isinstance(step, int) or get_origin(kind) is dict:
        return next(iter(get_args(kind)[-1:]), None)
    return _fields(kind).get(step)


def _fields(kind: object) -> Values:
    if is_typeddict(kind):
        return dict(kind.__annotations__)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    return {}


def _bad_value(group: Sequence[_Found], path: Steps) -> tuple[str, str, str, str]:
    # Of the branches of a union, the one whose type fits says what is really wrong.
    every = group
    group = [found for found in group if found.details["type"] not in _WANTED] or group
    details = group[0].details
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    name = f"`{path[-1]}`" if path and isinstance(path[-1], str) else "this item"
    if kind == "plmcc":
        return context["code"], context["text"], "", context["hint"]
    if kind == "literal_error":  # a word, or the mapping that may stand in its place
        group = [*group, *(f for f in every if _wanted(f.details) == "a mapping")]
    wanted = list(dict.fromkeys(_wanted(found.details) for found in group))
    if all(wanted):
        code, problem = _mismatch(kind)
        return code, f"{name} {problem}", " or ".join(wanted), _hint(wanted, value)
    if kind in _RANGES:
        return "PLM104", f"{name} is out of range", _RANGES[kind].format(**context), ""
    if kind == "string_pattern_mismatch":
        hint = "begin with a letter or digit; then letters, digits, `.`, `_` and `-`"
        hint = hint if path[-1] == "name" else ""
        return "PLM107", f"{name} has characters that are not allowed", context["pattern"], hint
    words = _words(details["msg"])
    about = bool(path) and _is_about(words, path[-1])
    return "PLM107", words if about else f"{name} is not valid: {words}", "", ""


def _mismatch(kind: str) -> tuple[str, str]:
    wrong_type = kind in _WANTED
    return ("PLM103", "has the wrong type") if wrong_type else ("PLM105", "is not an allowed value")


def _wanted(details: ErrorDetails) -> str:
    if details["type"] in ("literal_error", "enum"):
        return str(details["ctx"]["expected"])
    return _WANTED.get(details["type"], "")


def _hint(wanted: list[str], value: object) -> str:
    words = " or ".join(wanted)
    if isinstance(value, str):
        return _hint_for_text(words, value)
    if "a whole number" in words and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if "text" in words and isinstance(value, (int, float)):
        return f"quote it: {json.dumps(json.dumps(value))}"
    if "a list" in words and value is not None:
        return "begin each item with `- `" if isinstance(value, dict) else f"write [{value}]"
    if value is None:
        return "write a value, or remove the key"
    return ""


def _hint_for_text(words: str, value: str) -> str:
    choices = re.findall(r"'([^']*)'", words)
    if choices:
        return did_you_mean(value, choices)
    if "true or false" in words and value.lower() in ("yes", "on", "no", "off", "true", "false"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
    if "number" in words and re.fullmatch(r"[-+]?[\d._]+(e[-+]?\d+)?", value.lower()):
        return f"write it without quotes or underscores: {value.replace('_', '')}"
    return f"write [{value}]" if "a list" in words else ""
