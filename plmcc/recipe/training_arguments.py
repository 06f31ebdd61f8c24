"""The names and types of `transformers.TrainingArguments`, read from its source text.

Importing transformers takes seconds; `plmcc check` has to answer at once. The dataclass is
annotated plainly, so parsing the installed file says the same.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from plmcc.utils.types import Values

_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""What transformers calls it, and has called it."""
SET_BY_PLMCC: dict[str, str] = {
    "output_dir": "pass the output directory with `plmcc apply --output`",
    "seed": "write `seed:` at the top of the recipe; it seeds everything",
    "data_seed": "write `seed:` at the top of the recipe; it seeds everything",
    "resume_from_checkpoint": "use `plmcc apply --resume`",
    "ignore_data_skip": "resuming must give the same result as an uninterrupted run",
    "remove_unused_columns": "plmcc selects the columns itself, see `train.data.text` and `label`",
    "label_names": "plmcc selects the columns itself, see `train.data.label`",
    "load_best_model_at_end": "a checkpoint holds the trainable form, which plmcc reloads itself",
    "do_train": "a stage with `train:` trains",
    "do_eval": "use `train.data.eval` and `evaluate:`",
    "do_predict": "plmcc does not predict; use the compressed model",
    "push_to_hub": "plmcc uploads nothing; push the finished folder yourself",
    "hub_token": "plmcc uploads nothing; push the finished folder yourself",
    "hub_private_repo": "plmcc uploads nothing; push the finished folder yourself",
    "hub_model_id": "plmcc uploads nothing; push the finished folder yourself",
    "hub_strategy": "plmcc uploads nothing; push the finished folder yourself",
    "hub_always_push": "plmcc uploads nothing; push the finished folder yourself",
    "hub_revision": "plmcc uploads nothing; push the finished folder yourself",
    "local_rank": "the launcher (torchrun, accelerate) sets it",
}
"""Arguments a recipe may not give, and what to do instead."""

_PLAIN: Values = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "dict": dict,
    "list": list,
    "None": None,
    "Any": object,
}


@cache
def typed() -> object:
    """Return a TypedDict of the arguments a recipe may give, for the installed transformers.

    Without transformers (a bare check of a recipe) every argument is accepted.
    """
    fields = dict(_fields())
    if not fields:
        return Values
    allowed = {name: kind for name, kind in fields.items() if name not in SET_BY_PLMCC}
    make: Any = TypedDict  # the names are known only here, which a type checker cannot follow
    kind = make("TrainingArguments", allowed, total=False)
    kind.__doc__ = "Arguments of transformers.TrainingArguments."
    return with_config(ConfigDict(extra="forbid", strict=True))(kind)


def _fields() -> Iterator[tuple[str, object]]:
    source = _source("training_args.py")
    if source is None:
        return
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    enums = _choices(source) | _choices(_source("trainer_utils.py"))
    for node in classes["TrainingArguments"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = _kind(node.annotation, enums)
            yield node.target.id, Annotated[kind, Field(description=_help(node))]


def _help(node: ast.AnnAssign) -> str | None:
    """The text that transformers shows for an argument on its own command lines."""
    settings = node.value.keywords if isinstance(node.value, ast.Call) else []
    for item in (inner for setting in settings for inner in ast.walk(setting.value)):
        if isinstance(item, ast.Dict) and isinstance(item.values[0], ast.Constant):
            return str(item.values[0].value)
    return None


def _source(name: str) -> ast.Module | None:
    # The top-level spec is found without importing the package.
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    return ast.parse(Path(spec.origin).with_name(name).read_text(encoding="utf-8"))


def _choices(source: ast.Module | None) -> Values:
    """The values of every enum of a module, as a Literal."""
    found: Values = {}
    for node in source.body if source else []:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(b) for b in node.bases):
            values = [
                item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
            ]
            found[node.name] = Literal[tuple(values)]
    return found


def _kind(node: ast.expr, enums: Values) -> object:
    names = [ast.unparse(part) for part in _alternatives(node)]
    chosen = [enums[name] for name in names if name in enums]
    if chosen:  # `SchedulerType | str` means the text of a member
        return chosen[0]
    kinds = [_plain(name) for name in names]
    known = tuple(kind for kind, name in zip(kinds, names, strict=True) if name in _PLAIN or kind)
    return Union[known] if known else object  # noqa: UP007


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _plain(name: str) -> object:
    """The type of one alternative; None for a class that YAML cannot express."""
    if name == "list[str]":
        return list[str]
    head = name.partition("[")[0]
    return Literal[False] if name == "Literal[False]" else _PLAIN.get(head)


def checkpoints_activations(arguments: Values) -> str | None:
    """Return the name of the argument by which a stage computes activations again, or None."""
    return next((name for name in _CHECKPOINTING if arguments.get(name)), None)
