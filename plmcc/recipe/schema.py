"""The JSON Schema of recipes, for editors: the same models that check them, every pass included."""

from __future__ import annotations

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.recipe.models import Recipe
from plmcc.utils.types import Values

_REFERENCE = "#/definitions/{model}"


def recipe_schema() -> Values:
    """Return the schema of a recipe, draft-07 as the YAML language server reads it.

    Passes that are broken are left out; `plmcc passes` shows them.
    """
    schema = Recipe.model_json_schema(ref_template=_REFERENCE)
    definitions = schema.pop("$defs")
    forms, owned = _pass_forms()
    definitions |= owned | {"Pass": {"description": "A pass and its options.", "oneOf": forms}}
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    description = "How a pretrained language model is to be compressed."
    schema |= {"title": "plmcc recipe", "description": description, "required": ["plmcc"]}
    schema |= {"definitions": definitions}
    adapted = _draft_07(schema)
    assert isinstance(adapted, dict)
    return adapted


def _pass_forms() -> tuple[list[Values], Values]:
    """The ways to write a pass, and the definitions of its options, named after the pass."""
    forms: list[Values] = []
    definitions: Values = {}
    for name in catalog.names():
        try:
            options = catalog.options(name)
        except PlmccError:
            continue
        schema = options.model_json_schema(ref_template=f"#/definitions/{name}.{{model}}")
        inner = schema.pop("$defs", {})
        definitions |= {f"{name}.{key}": value for key, value in inner.items()} | {name: schema}
        forms += _forms(name, schema)
    return forms, definitions


def _forms(name: str, schema: Values) -> list[Values]:
    reference: Values = {"$ref": _REFERENCE.format(model=name)}
    mapping = {"type": "object", "required": [name], "additionalProperties": False}
    if schema.get("required"):
        return [mapping | {"properties": {name: reference}}]
    doc = schema.get("description", "").partition("\n\n")[0]
    defaults = {"anyOf": [reference, {"type": "null"}]}
    return [{"const": name, "description": doc}, mapping | {"properties": {name: defaults}}]


def _draft_07(node: object) -> object:
    """Rename what differs in draft-07; pydantic writes a later draft."""
    if isinstance(node, list):
        return [_draft_07(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _draft_07(value) for key, value in node.items()}
    if isinstance(node.get("prefixItems"), list):
        node["items"] = node.pop("prefixItems")
    if "$ref" in node and len(node) > 1:  # draft-07 ignores the siblings of a reference
        node = {"allOf": [{"$ref": node.pop("$ref")}], **node}
    return node
