"""The data of a recipe, looked at without a model: files, columns, labels, and metrics that fit.

Nothing here imports torch: what is wrong is said in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmcc.data import classification, question_answering, token_classification
from plmcc.data.chat import are_chats, messages_of
from plmcc.data.rows import SYNTHETIC, Rows, data_files, load_rows
from plmcc.diagnostics import error, listing
from plmcc.recipe.load import Data, Evaluate, Recipe
from plmcc.recipe.metrics import METRICS_OF_HEADS, METRICS_OF_TASKS

_HEADS = {
    "ForSequenceClassification": classification.TASK,
    "ForTokenClassification": token_classification.TASK,
    "ForQuestionAnswering": question_answering.TASK,
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "translation",
    "MTModel": "translation",
}
_HEADS_OF_NUMBERS = ("spearman", "pearson", "mse")
_LARGE = 100_000_000
"""Bytes of files that are not read twice."""


@dataclass(frozen=True)
class _Head:
    """What the config.json of a model says of its head, by transformers' names."""

    task: str
    has_own: bool
    problem_type: str | None = None
    num_labels: int = 2
    label2id: dict[str, int] | None = None


def rows_of(
    task: str,
    asked: Data | Evaluate,
    names: str | list[str],
    base: Path | None,
    target: str | list[str] | None = None,
) -> Rows:
    """Read rows as a task needs them; `names` and `target` are the files.

    Raises:
        PlmccError: they cannot be read, or have not what the task needs.
    """
    if isinstance(asked.label, list) and task != classification.TASK:
        message, several = f"{task} has one column of labels", listing(asked.label)
        raise error("PLM303", message, "label", got=several, hint="write `label: COLUMN`")
    if isinstance(asked.label, list):
        return load_rows(names, asked.text, asked.label, asked.limit, base)
    given = (names, asked.text, asked.label, asked.limit, base)
    if task == question_answering.TASK:
        return question_answering.load_questions(*given)
    if task == token_classification.TASK:
        return token_classification.load_sentences(*given)
    rows = load_rows(*given, target)
    if are_chats(rows) and task != "text-generation":
        message = f"conversations are data of text-generation, and the task is {task}"
        raise error("PLM303", message, rows.source, hint="choose a column of text with `text:`")
    return rows


def check_data(recipe: Recipe, model: str | None, base: Path | None, large: bool = False) -> int:
    """Read all data of a recipe and check what needs neither weights nor a tokenizer.

    Args:
        recipe: its sections `train.data`, `calibrate` and `evaluate`.
        model: its config.json, if it is a directory, says the task and the labels of the head.
        base: where relative paths start.
        large: read files above 100 MB too. Data of the hub are never read.

    Returns:
        How many rows there are, over all sections.

    Raises:
        PlmccError: data that cannot be read, or that do not fit the task or the head.
    """
    head = _head(recipe, model)
    if large and not head.task:
        message = "what the data are for is unknown"
        hint = "name the model on the command line, or set `task:` in the recipe"
        raise error("PLM502", message, recipe.name, got="task: auto, and no model", hint=hint)
    count = 0
    for section, files, target in _sections(recipe):
        if files == SYNTHETIC or _is_elsewhere(files) or not head.task:
            continue
        found = data_files(files, base)
        if not large and sum(file.stat().st_size for file in found) > _LARGE:
            continue
        rows = rows_of(head.task, section, files, base, target)
        _check_labels(rows, head)
        count += len(rows)
    for index, asked in enumerate(recipe.evaluate):
        _check_metric(recipe, index, asked, head, base)
    return count


def _sections(
    recipe: Recipe,
) -> Iterator[tuple[Data | Evaluate, str | list[str], str | list[str] | None]]:
    for stage in recipe.steps():
        if stage.train is not None:
            data = stage.train.data
            yield data, data.train, data.target
            if data.eval:
                yield data, data.eval, data.eval_target
    if recipe.calibrate is not None:
        asked = recipe.calibrate.as_data()
        yield asked, asked.train, asked.target
    for metric in recipe.evaluate:
        yield metric, metric.data, metric.target


def _is_elsewhere(files: str | list[str]) -> bool:
    names = [files] if isinstance(files, str) else files
    return any(name.startswith("hub:") for name in names)


def _head(recipe: Recipe, model: str | None) -> _Head:
    """The task, and what is known of the head."""
    name = model or (recipe.model if isinstance(recipe.model, str) else None)
    task = "" if recipe.task == "auto" else str(recipe.task)
    file = Path(name or "") / "config.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        architecture = str((values.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, IndexError, TypeError):
        return _Head(task, False)
    own = next((t for ending, t in _HEADS.items() if architecture.endswith(ending)), "")
    if not own and not task:
        similar = (file.parent / "modules.json").exists()
        return _Head("sentence-similarity" if similar else "feature-extraction", False)
    names = values.get("id2label")
    label2id = (
        {str(label): int(index) for index, label in names.items()}
        if isinstance(names, dict) and all(str(index).isdigit() for index in names)
        else {f"LABEL_{index}": index for index in range(2)}
    )
    fits = own == (task or own)
    return _Head(task or own, fits, values.get("problem_type"), len(label2id), label2id)


def _check_labels(rows: Rows, head: _Head) -> None:
    """Compare labels with the head that the model has, and look at messages."""
    if are_chats(rows):
        messages_of(rows)
    if rows.label is None:
        return
    if head.task == classification.TASK and head.has_own:
        classification.targets_of(rows, head)  # type: ignore[arg-type]
    elif head.task == token_classification.TASK:
        if head.has_own:
            token_classification.label_ids(rows, head.label2id or {})
        else:
            token_classification.named_labels(rows)
    elif head.task == question_answering.TASK:
        question_answering.answers_of(rows)
    elif head.task == "sentence-similarity" and len(rows.text) == 2:
        rows.numbers()


def _check_metric(
    recipe: Recipe, index: int, asked: Evaluate, head: _Head, base: Path | None
) -> None:
    """Compare a metric with the task, and with what the head predicts."""
    allowed, of = METRICS_OF_TASKS.get(head.task, (asked.metric,)), head.task
    if head.task == classification.TASK and head.has_own:
        kind = classification.kind_of(head)  # type: ignore[arg-type]
        allowed, of = METRICS_OF_HEADS[kind], classification.HEADS[kind]
    if asked.metric not in allowed:
        place = recipe.location(("evaluate", index, "metric"))
        message = f"{asked.metric} is not a metric of {of}"
        raise error("PLM303", message, place, got=asked.metric, allowed=", ".join(allowed))
    similarity = head.task == "sentence-similarity" and asked.metric in _HEADS_OF_NUMBERS
    if similarity and not _is_elsewhere(asked.data):
        rows = rows_of(head.task, asked, asked.data, base, asked.target)
        if len(rows.text) != 2:
            message = f"{asked.metric} of similarities needs two columns of text"
            hint = "name the columns with `text:`"
            raise error("PLM301", message, rows.source, got=listing(list(rows.text)), hint=hint)
        rows.numbers()
