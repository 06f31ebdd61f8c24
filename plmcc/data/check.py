"""The data of a recipe, looked at without a model: files, columns, labels, and metrics that fit.

Nothing here imports torch: what is wrong is said in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plmcc.data import classification, question_answering, token_classification
from plmcc.data.chat import are_chats, messages_of
from plmcc.data.rows import SYNTHETIC, Rows, data_files, load_rows
from plmcc.diagnostics import Diagnostic, Location, PlmccError, error, listing
from plmcc.recipe.load import Data, Evaluate, Recipe
from plmcc.recipe.metrics import (
    METRICS_OF_HEADS,
    METRICS_OF_TASKS,
    RANKING,
    RELATIVE,
    is_of,
    library_of,
)
from plmcc.utils.files import matching_files, read_json
from plmcc.utils.text import first_line

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
_LARGE = 100_000_000
"""Bytes of files that are not read twice."""


@dataclass(frozen=True)
class Head:
    """What the config.json of a model says of its head, by transformers' names."""

    task: str
    has_own: bool = False
    problem_type: str | None = None
    num_labels: int = 2
    label2id: dict[str, int] | None = None
    folder: Path | None = None


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
        PlmccError: everything that cannot be read, or that does not fit the task or the head.
    """
    name = model or (recipe.model if isinstance(recipe.model, str) else None)
    head = head_of(str(recipe.task), name)
    if large and not head.task:
        message = "what the data are for is unknown"
        hint = "name the model on the command line, or set `task:` in the recipe"
        raise error("PLM502", message, recipe.name, got="task: auto, and no model", hint=hint)
    found: list[Diagnostic] = []
    count = 0
    for index, asked in enumerate(recipe.evaluate):
        with _collected(found):
            check_metric_of(asked.metric, head, recipe.location(("evaluate", index, "metric")))
    for section, files, target in _sections(recipe) if head.task else ():
        with _collected(found):
            rows = _rows(head, section, files, base, target, large)
            count += 0 if rows is None else len(rows)
    for number, stage in enumerate(recipe.steps()):
        for index, one in enumerate(stage.passes):
            with _collected(found):
                _check_files(one.reads(), base, recipe.pass_location(number, index))
    if found:
        raise PlmccError(*dict.fromkeys(found))
    return count


def _check_files(names: Sequence[str], base: Path | None, where: Location | str) -> None:
    """Check that the files which a pass reads are there.

    Raises:
        PlmccError: one is not, at the place of the pass in the recipe.
    """
    for name in names:
        try:
            matching_files(name, base)
        except PlmccError as problem:
            raise PlmccError(
                *(replace(d, location=where, got=d.got or name) for d in problem.diagnostics)
            ) from None


def check_evaluation(asked: Sequence[Evaluate], model: str, task: str = "auto") -> None:
    """Check the data and the metrics of `plmcc evaluate`, as `check_data` does.

    Raises:
        PlmccError: they cannot be read, or do not fit the task or the head.
    """
    head = head_of(task, model)
    for one in asked if head.task else ():
        check_metric_of(one.metric, head, "--metric")
        if one.data:
            _rows(head, one, one.data, None, one.target, False)


@contextmanager
def _collected(found: list[Diagnostic]) -> Iterator[None]:
    try:
        yield
    except PlmccError as problem:
        found.extend(problem.diagnostics)


def _rows(
    head: Head,
    section: Data | Evaluate,
    files: str | list[str],
    base: Path | None,
    target: str | list[str] | None,
    large: bool,
) -> Rows | None:
    """Read and check rows; None where they are not read here."""
    if files == SYNTHETIC or _is_elsewhere(files):
        return None
    size = sum(file.stat().st_size for file in data_files(files, base))
    if size > _LARGE and not large:
        return None
    rows = rows_of(head.task, section, files, base, target)
    metric = section.metric if isinstance(section, Evaluate) else None
    _check_labels(rows, head, metric)
    return rows


def _sections(
    recipe: Recipe,
) -> Iterator[tuple[Data | Evaluate, str | list[str], str | list[str] | None]]:
    for stage in recipe.steps():
        if stage.train is not None:
            data = stage.train.data
            yield data, data.train, data.target
            if data.eval:
                yield data, data.eval, data.eval_target
    measured = recipe.calibration()
    if measured is not None:
        asked = measured.as_data()
        yield asked, asked.train, asked.target
    for metric in recipe.evaluate:
        if metric.data:
            yield metric, metric.data, metric.target


def _is_elsewhere(files: str | list[str]) -> bool:
    names = [files] if isinstance(files, str) else files
    return any(name.startswith("hub:") for name in names)


def head_of(asked: str, name: str | None) -> Head:
    """Return the task, and what is known of the head.

    Args:
        asked: the task, or "auto".
        name: the model; of one that is no directory nothing is known.

    Raises:
        PlmccError: the directory of the model has a config.json that is no JSON.
    """
    task = "" if asked == "auto" else classification.head_task(asked)
    file = Path(name or "") / "config.json"
    if name is None or not file.is_file():
        return Head(task)
    try:
        values: dict[str, Any] = read_json(file)
        architecture = str((values.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as problem:
        message = f"config.json cannot be read: {first_line(problem)}"
        raise error("PLM401", message, str(name)) from None
    own = next((t for ending, t in _HEADS.items() if architecture.endswith(ending)), "")
    if not own and not task:
        similar = (file.parent / "modules.json").exists()
        return Head("sentence-similarity" if similar else "feature-extraction")
    names = values.get("id2label")
    label2id = (
        {str(label): int(index) for index, label in names.items()}
        if isinstance(names, dict) and all(str(index).isdigit() for index in names)
        else {f"LABEL_{index}": index for index in range(_count(values))}
    )
    problem_type, folder = values.get("problem_type"), file.parent
    has_own = own == (task or own)
    return Head(task or own, has_own, problem_type, len(label2id), label2id, folder)


def _count(values: dict[str, Any]) -> int:
    """The labels of a config without names; transformers takes two where it does not say."""
    count = values.get("num_labels", 2)
    return count if isinstance(count, int) else 2


def _check_labels(rows: Rows, head: Head, metric: str | None) -> None:
    """Compare labels with the head that the model has, and look at messages."""
    if are_chats(rows):
        messages_of(rows)
        _check_template(rows, head)
    judged = metric in METRICS_OF_TASKS[head.task]
    judged &= metric not in (*RELATIVE, "perplexity", "bleu", "chrf")
    if judged and head.task == "sentence-similarity" and len(rows.text) != 2:
        message = f"{metric} of similarities needs two columns of text"
        hint = "name the columns with `text:`"
        raise error("PLM301", message, rows.source, got=listing(list(rows.text)), hint=hint)
    if metric in RANKING and len(rows.text) != 2:
        message = f"{metric} needs two columns of text: a query and a text"
        hint = "name the columns with `text:`"
        raise error("PLM301", message, rows.source, got=listing(list(rows.text)), hint=hint)
    if metric in ("bleu", "chrf") and len(rows.text) != 2:
        hint = "add `target:` with the translations"
        raise error("PLM301", f"{metric} needs reference translations", rows.source, hint=hint)
    if rows.label is None:
        if judged:
            rows.labels()  # says that there are none
        return
    if head.task == classification.TASK and head.has_own:
        classification.targets_of(rows, head)  # type: ignore[arg-type]
    elif head.task == token_classification.TASK:
        if head.has_own:
            token_classification.label_ids(rows, head.label2id or {})
        else:
            token_classification.named_labels(rows)
    elif head.task == question_answering.TASK:
        answers = question_answering.answers_of
        (answers if judged else question_answering.checked_answers)(rows)
    elif head.task == "sentence-similarity" and len(rows.text) == 2:
        rows.numbers()


def _check_template(rows: Rows, head: Head) -> None:
    """Say that a local tokenizer has no chat template."""
    if head.folder is None or not (file := head.folder / "tokenizer_config.json").is_file():
        return
    kept = "chat_template" in file.read_text(encoding="utf-8")
    if not kept and not [*head.folder.glob("*chat_template*")]:
        message = "the rows are conversations, and the tokenizer has no chat template"
        hint = "use a model that was trained on chats, or rows with a column `text`"
        raise error("PLM303", message, rows.source, hint=hint)


def check_metric_of(metric: str, head: Head, place: Location | str) -> None:
    """Compare a metric with the task, with what the head predicts, and with what is installed.

    Raises:
        PlmccError: it is none of the task or the head, or needs a library.
    """
    allowed, of = METRICS_OF_TASKS.get(head.task, (metric,)), head.task
    if head.task == classification.TASK and head.has_own:
        kind = classification.kind_of(head)  # type: ignore[arg-type]
        allowed, of = METRICS_OF_HEADS[kind], classification.HEADS[kind]
    if head.task and library_of(metric) and is_of(metric, head.task):
        return
    if metric not in allowed:
        message = f"{metric} is not a metric of {of}"
        raise error("PLM303", message, place, got=metric, allowed=", ".join(allowed))
    library = "sacrebleu" if metric in ("bleu", "chrf") else ""
    if metric == "f1" and head.task == token_classification.TASK:
        library = "seqeval"
    if library and find_spec(library) is None:
        hint = f"pip install {library}, or plmcc with the extra `eval`"
        raise error("PLM303", f"{metric} of {of} needs {library}", place, hint=hint)
