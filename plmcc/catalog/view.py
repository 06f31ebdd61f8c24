"""What `plmcc passes` shows: the list of passes, and the options of one."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.utils.types import Values


def overview() -> list[Values]:
    """Return name, first sentence and origin of every pass; a broken one has `error` instead."""
    return [_row(name) for name in catalog.names()]


def _row(name: str) -> Values:
    origins = " and ".join(owner.origin for owner in catalog.entries()[name])
    try:
        doc = inspect.getdoc(catalog.options(name)) or ""
    except PlmccError as problem:
        return {"name": name, "origin": origins, "error": problem.diagnostics[0].message}
    return {"name": name, "origin": origins, "doc": _flowing(doc).split("\n")[0]}


def details(name: str) -> Values:
    """Return everything a user should know of a pass.

    Raises:
        PlmccError: there is no such pass, or it is broken.
    """
    kind = catalog.options(name)
    schema = kind.model_json_schema()
    return {
        "name": name,
        "origin": catalog.entry(name).origin,
        "doc": _flowing(inspect.getdoc(kind) or ""),
        "paper": kind.paper,
        "preserves": kind.preserves,
        "tolerance": kind.tolerance,
        "hazards": list(kind.hazards),
        "options": [
            _option(option, settings, option in schema.get("required", []), schema.get("$defs", {}))
            for option, settings in schema["properties"].items()
        ],
    }


def _option(name: str, schema: Values, required: bool, definitions: Values) -> Values:
    found = {"name": name, "type": _type(schema, definitions), "required": required}
    found |= {} if required else {"default": schema.get("default")}
    return found | {"range": _range(schema), "description": _flowing(schema.get("description", ""))}


def _type(schema: Values, definitions: Values) -> str:
    if "anyOf" in schema:
        return " | ".join(_type(part, definitions) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    if "$ref" in schema:
        return _type(definitions[str(schema["$ref"]).rpartition("/")[2]], definitions)
    if "properties" in schema:
        keys = {key: _type(part, definitions) for key, part in schema["properties"].items()}
        given = (f"{key}: {kind.removesuffix(' | null')}" for key, kind in keys.items())
        return f"{{{', '.join(given)}}}"
    return str(schema.get("const", schema.get("type", "any")))


def _range(schema: Values) -> str:
    parts = [schema, *schema.get("anyOf", [])]
    words = {
        "minimum": ">= {}",
        "exclusiveMinimum": "> {}",
        "maximum": "<= {}",
        "exclusiveMaximum": "< {}",
        "multipleOf": "multiple of {}",
        "minLength": "at least {} characters",
        "minItems": "at least {} items",
        "pattern": "{}",
    }
    found = [text.format(part[key]) for part in parts for key, text in words.items() if key in part]
    return ", ".join(found)


def print_overview(rows: list[Values]) -> None:
    """Print the list of passes."""
    table = Table("pass", "what it does", "origin", box=None, pad_edge=False)
    for row in rows:
        what = Text(row["doc"]) if "doc" in row else Text(row["error"], style="red")
        table.add_row(Text(row["name"], style="bold"), what, Text(row["origin"]))
    Console().print(table if rows else "no passes are installed")


def print_details(found: Values) -> None:
    """Print one pass: its documentation, then its options."""
    console = Console(highlight=False)
    console.print(Text(f"{found['name']} ({found['origin']})", style="bold"))
    console.print(Text(found["doc"]))
    for title in ("paper", "preserves"):
        if found[title]:
            console.print(Text(f"{title}: {found[title]}"))
    for hazard in found["hazards"]:
        console.print(Text(f"hazard: {hazard}"))
    for option in found["options"]:
        default = "required" if option["required"] else f"default {_scalar(option['default'])}"
        facts = "; ".join(filter(None, (option["type"], option["range"], default)))
        console.print(Text.assemble("\n", (option["name"], "bold"), f": {facts}"))
        console.print(Padding(Text(option["description"]), (0, 0, 0, 4)))


def _scalar(value: object) -> str:
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _flowing(text: str) -> str:
    """Join the lines of each paragraph: the terminal wraps them to its own width."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
