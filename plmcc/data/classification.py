"""Labels of whole texts, or of pairs of texts: one of several classes, several labels at once, or a
number. Which of these a head predicts is said by its config, as transformers reads it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from plmcc.data.rows import Rows
from plmcc.diagnostics import PlmccError, error, listing, nearest
from plmcc.recipe.metrics import DEFAULT_METRICS
from plmcc.utils.types import Values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TASK = "text-classification"
RERANKING = "reranking"
"""A head with one number for a query and a text."""
Kind = Literal["classes", "labels", "number"]
"""What a head predicts: one class, any number of labels, a number (regression)."""
Names = Mapping[str, Any]
"""Ids of labels by their names: `label2id` of a config."""
HEADS: dict[Kind, str] = {
    "classes": "a head for classes",
    "labels": "a head for several labels at once",
    "number": "a head that predicts a number",
}
_MULTI_LABEL, _REGRESSION = "multi_label_classification", "regression"
_SEPARATORS = "|;,"


def head_task(task: str) -> str:
    """Return the task whose heads a task has: those of rerankers are heads of classifiers."""
    return TASK if task == RERANKING else task


def default_metric(task: str, config: Any) -> str:
    """Return what a model is judged by unless something else is asked for: by its task, and for a
    classifier by what its head predicts."""
    if task != TASK:
        return DEFAULT_METRICS.get(task, "spearman")
    of = {"labels": "f1", "number": "spearman"}
    return of.get(kind_of(config), DEFAULT_METRICS[task])


def kind_of(config: PreTrainedConfig) -> Kind:
    """Return what the head of a config predicts."""
    problem = config.problem_type
    if problem == _MULTI_LABEL:
        return "labels"
    if problem == _REGRESSION or (problem is None and config.num_labels == 1):
        return "number"
    return "classes"


def targets_of(rows: Rows, config: PreTrainedConfig) -> list[Any]:
    """Return what a head learns: ids of classes, lists of 0.0 and 1.0 (one for each label), or
    numbers.

    Raises:
        PlmccError: the rows have no labels, or labels that the head does not have.
    """
    kind = kind_of(config)
    if kind == "labels":
        return [[float(value) for value in row] for row in label_sets(rows, config)]
    if kind == "number":
        if config.num_labels != 1:
            message = "the model's head predicts several numbers for a text"
            given = f"num_labels: {config.num_labels}"
            hint = "use a head with one number"
            raise error("PLM303", message, rows.source, got=given, hint=hint)
        return rows.numbers()
    return class_labels(rows, int(config.num_labels or 0), config.label2id)


def class_labels(rows: Rows, classes: int, names: Names | None = None) -> list[int]:
    """Return integer labels within 0..classes-1; `names` are the model's own names of classes.

    Raises:
        PlmccError: a label that is no whole number or outside the head's range.
    """
    values = rows.labels()
    if any(isinstance(value, list) for value in values):
        message = "the rows have lists of labels, and the model's head predicts one class"
        hint = f"set `problem_type: {_MULTI_LABEL}` in the model's config.json"
        raise error("PLM302", message, f"{rows.source}: {rows.label}", hint=hint)
    return [_class_of(rows, row, value, classes, names or {}) for row, value in enumerate(values)]


def label_sets(rows: Rows, config: PreTrainedConfig) -> list[list[int]]:
    """Return for each row a list with 1 for each label that it has, in the order of their ids.

    A row's labels are a list of names or ids, a list of 0 and 1 for all labels, or one text with
    names between `|`, `;` or commas. A row may have none.

    Raises:
        PlmccError: there is no label column, or the head has no such label.
    """
    names: Names = config.label2id or {}
    count = len(names)
    given = [_listed(value, names) for value in rows.labels(none=[])]
    if _are_indicators(given, count):
        return [[int(value) for value in row] for row in given]
    found = []
    for row, values in enumerate(given):
        ids = {_class_of(rows, row, value, count, names) for value in values}
        found.append([int(index in ids) for index in range(count)])
    return found


def _are_indicators(given: Sequence[Sequence[Any]], count: int) -> bool:
    """Whether lists say 0 or 1 of each label."""
    return all(
        len(row) == count and all(not isinstance(x, str) and x in (0, 1) for x in row)
        for row in given
    )


def _listed(value: Any, names: Names) -> list[Any]:
    """The labels of a row."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    text = value.strip()
    if text in names:
        return [text]
    if text.startswith("["):  # a list that went through a CSV file
        try:
            return list(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError):
            text = text.strip("[]")
    separator = next((mark for mark in _SEPARATORS if mark in text), None)
    parts = [text] if separator is None else text.split(separator)
    return [part.strip() for part in parts if part.strip()]


def _class_of(rows: Rows, row: int, value: Any, classes: int, names: Names) -> int:
    """The id of a class that is given by its name or its id."""
    value = names.get(str(value), value)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise _no_such_label(rows, row, value, classes, names) from None
    if number != float(value) or not 0 <= number < classes:
        raise _no_such_label(rows, row, value, classes, names)
    return number


def _no_such_label(rows: Rows, row: int, value: object, classes: int, names: Names) -> PlmccError:
    ordered = sorted(names, key=lambda name: int(names[name]))
    known = [name for name in ordered if name != f"LABEL_{names[name]}"]
    also = f", or {listing(known)}" if known else ""
    near = nearest(str(value), known) or next(
        (name for name in known if name.casefold() == str(value).casefold()), ""
    )
    return error(
        "PLM302",
        f"the model's head has no label like that of {rows.place(row)}",
        f"{rows.source}: {rows.label}",
        got=repr(value),
        allowed=f"whole numbers 0 to {classes - 1}{also}",
        hint=f"did you mean `{near}`?" if near else "",
    )


def new_head(rows: Rows, columns: Sequence[str] | None, number: bool) -> Values:
    """Return values of a config for a head that predicts the labels of rows.

    Args:
        rows: with labels: lists of them make a head for several labels, fractions one for a number,
            anything else one for classes.
        columns: the labels, where they are columns of the rows.
        number: it is to predict a number, whatever the labels are.
    """
    if rows.label is None:
        return {"num_labels": 2}
    if columns is not None:
        return _named(list(columns)) | {"problem_type": _MULTI_LABEL}
    values = rows.labels(none=[])
    if any(isinstance(value, list) for value in values):
        lists = [_listed(value, {}) for value in values]
        if _are_indicators(lists, len(lists[0])):
            return {"num_labels": len(lists[0]), "problem_type": _MULTI_LABEL}
        found = head_of({str(value) for row in lists for value in row})
        return found | {"problem_type": _MULTI_LABEL}
    rows.labels()  # none may be missing here
    if number or any(isinstance(value, float) and not value.is_integer() for value in values):
        return {"num_labels": 1, "problem_type": _REGRESSION}
    return head_of({str(int(v) if isinstance(v, float) else v) for v in values})


def head_of(labels: set[str]) -> Values:
    """Return values of a config for a head with these labels: ids, or names in order."""
    if all(label.isdigit() for label in labels):
        return {"num_labels": max((int(label) for label in labels), default=1) + 1}
    return _named(sorted(labels, key=lambda label: (label != "O", label)))


def _named(names: list[str]) -> Values:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
