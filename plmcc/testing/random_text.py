"""Random text in the form that a task reads, where a recipe's own data is not there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from plmcc.data import question_answering, token_classification
from plmcc.data.classification import TASK, kind_of
from plmcc.data.rows import data_files
from plmcc.diagnostics import PlmccError
from plmcc.models.source import Source
from plmcc.recipe.load import Data
from plmcc.utils.types import Values

_ROWS, _WORDS = 16, 12


def exists(*names: str | list[str] | None, base: Path | None = None) -> bool:
    """Say whether all data that is named is in files here; the hub is not asked."""
    given = [n for name in names if name for n in ([name] if isinstance(name, str) else name)]
    if any(name.startswith("hub:") for name in given):
        return False
    try:
        return all(data_files(name, base) for name in given)
    except PlmccError:
        return False


def write(data: Data, source: Source, folder: Path) -> Data:
    """Write random rows for a task and return data that names them.

    Raises:
        PlmccError: the model comes without a tokenizer.
    """
    words = _vocabulary(source)
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(words, k=_WORDS))

    special = {
        question_answering.TASK: _questions,
        token_classification.TASK: _tagged,
        "translation": _translations,
    }
    make: Callable[..., Values] = special.get(source.task, _plain)
    update = make(data, source, folder, sentence, draw)
    return data.model_copy(update={"eval": None, "eval_target": None, **update})


def _vocabulary(source: Source) -> list[str]:
    tokenizer = source.need_tokenizer("random text")
    ids = random.Random(0).sample(range(len(tokenizer)), min(300, len(tokenizer)))
    known = {str(tokenizer.decode([i])).strip() for i in ids if i not in tokenizer.all_special_ids}
    return sorted(word for word in known if word.isalnum()) or ["a", "b", "c"]


def _rows(folder: Path, rows: list[Values]) -> str:
    file = folder / "random.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return str(file)


def _plain(
    data: Data, source: Source, folder: Path, sentence: Callable[[], str], draw: random.Random
) -> Values:
    """Texts, in as many columns as the recipe names, and labels if it names them."""
    names = [data.text] if isinstance(data.text, str) else data.text or ["text"]
    labeled = source.task == TASK or data.label is not None
    label = data.label if isinstance(data.label, str) else "label"
    rows: list[Values] = [{name: sentence() for name in names} for _ in range(_ROWS)]
    config = source.model.config
    kind = kind_of(config) if source.task == TASK else "number"
    for index, row in enumerate(rows if labeled else []):
        one = index % (config.num_labels or 1)
        row[label] = {"classes": one, "labels": [one], "number": draw.random()}[kind]
    return {"train": _rows(folder, rows), "text": names, "label": label if labeled else None}


def _translations(
    data: Data, source: Source, folder: Path, sentence: Callable[[], str], draw: random.Random
) -> Values:
    files = [folder / "random.source.txt", folder / "random.target.txt"]
    for file in files:
        lines = "".join(sentence() + "\n" for _ in range(_ROWS))
        file.write_text(lines, encoding="utf-8")
    return {"train": str(files[0]), "target": str(files[1]), "text": None}


def _questions(
    data: Data, source: Source, folder: Path, sentence: Callable[[], str], draw: random.Random
) -> Values:
    rows = []
    for _ in range(_ROWS):
        context = sentence()
        answers = {"text": [context.split()[0]], "answer_start": [0]}
        rows.append({"question": sentence(), "context": context, "answers": answers})
    return {"train": _rows(folder, rows), "text": None, "label": None}


def _tagged(
    data: Data, source: Source, folder: Path, sentence: Callable[[], str], draw: random.Random
) -> Values:
    names = list((source.model.config.id2label or {}).values())
    rows = []
    for _ in range(_ROWS):
        tokens = sentence().split()
        rows.append({"tokens": tokens, "labels": [draw.choice(names) for _ in tokens]})
    return {"train": _rows(folder, rows), "text": None, "label": None}
