"""Labels of words (named entities, parts of speech): rows in columns or lists, labels on the first
piece of each word, and back, F1 of entities."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from plmcc.data.rows import Rows, data_files, existing, read_table, read_text
from plmcc.data.windows import Inputs, Window, need_offsets, windows
from plmcc.diagnostics import Location, PlmccError, did_you_mean, error, listing
from plmcc.utils.extras import library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = "token-classification"
IGNORED = -100
"""The label of tokens that have none: special ones, and all pieces of a word but the first."""
_WORDS, _LABELS = ("tokens", "words"), ("labels", "tags", "ner_tags")
_COLUMNS = (".txt", ".tsv", ".conll", ".bio", ".iob", ".iob2")
_BIO = re.compile(r"O|[BI]-.+")

Words = NDArray[np.int64]
"""The word that each token of a window begins, or -1."""


def load_sentences(
    source: str | Sequence[str],
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    limit: int | None = None,
    base: Path | None = None,
) -> Rows:
    """Read sentences as lists of words and labels: columns as CoNLL's, or a table of lists.

    Of CoNLL's columns the first is the word and the last its label; an empty line ends a sentence.

    Args:
        source: as for `load_rows`; .txt, .tsv, .conll, .bio and .iob are columns.
        text: the column of a table that holds the words; by default `tokens` or `words`.
        label: the column that holds their labels; by default `labels`, `tags` or `ner_tags`.
        limit: keep only the first sentences.
        base: as for `load_rows`.

    Raises:
        PlmccError: a file cannot be read, or a column or a label is not there.
    """
    name = source if isinstance(source, str) else ", ".join(source)
    table = _conll(source, base) or read_table(source, base)
    words = _words_column(table, text, name)
    keep = [row for row, found in enumerate(table[words]) if found]
    if not keep:
        raise error("PLM301", f"every row is empty in {words}", name)
    kept = table.select(keep[:limit])
    return Rows(kept, (words,), _column(table, label, _LABELS, name), name, len(table) - len(keep))


def _words_column(table: Dataset, text: str | Sequence[str] | None, name: str) -> str:
    """Return the column that holds the words."""
    if text is not None and not isinstance(text, str):
        raise error(
            "PLM301",
            f"{TASK} needs one column of words",
            name,
            got=", ".join(text),
            hint="write `text: tokens`",
        )
    words = _column(table, text, _WORDS, name)
    if words is None:
        raise error(
            "PLM301",
            "the column of words is unknown",
            name,
            got=listing(table.column_names),
            allowed="`tokens`, or the column that `text:` names",
        )
    kind = str(getattr(getattr(table.features[words], "feature", None), "dtype", "no list"))
    if kind not in ("string", "large_string", "null"):
        raise error(
            "PLM301",
            f"the column `{words}` does not contain lists of words",
            name,
            got=kind,
            hint="choose another one with `text:`",
        )
    return words


def _column(table: Dataset, given: str | None, usual: Sequence[str], name: str) -> str | None:
    if given is not None:
        return existing(given, table.column_names, name)
    return next((column for column in usual if column in table.column_names), None)


def _conll(source: str | Sequence[str], base: Path | None) -> Dataset | None:
    """Return the sentences of files in columns; None for tables."""
    files = data_files(source, base)
    kinds = {Path(file.name.removesuffix(".gz")).suffix.lower() for file in files}
    if not files or not kinds <= set(_COLUMNS):
        return None
    sentences = [sentence for file in files for sentence in _sentences(file)]
    if not sentences:
        raise error("PLM301", "there are no rows", ", ".join(map(str, files)))
    words, labels = ([list(column) for column in part] for part in zip(*sentences, strict=True))
    return Dataset.from_dict({"tokens": words, "labels": labels})


def _sentences(file: Path) -> list[tuple[list[str], list[str]]]:
    found: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(read_text(file).split("\n"), 1):
        fields = line.strip().split("\t" if "\t" in line else None)
        if not line.strip() or fields[0] == "-DOCSTART-":
            found.append(([], []))
        elif len(fields) < 2:
            location = Location(str(file), number, 1, len(line), line)
            raise error(
                "PLM302",
                "a word has no label",
                location,
                allowed="a word and a label, empty lines between sentences",
            )
        else:
            found[-1][0].append(fields[0])
            found[-1][1].append(fields[-1])
    return [sentence for sentence in found if sentence[0]]


def named_labels(rows: Rows) -> list[list[str]]:
    """Return the labels of each sentence as text; of numbers, the data set's own names where it has
    them.

    Raises:
        PlmccError: there are none, or not one for each word.
    """
    given = rows.labels()
    names = getattr(getattr(rows.table.features[rows.label], "feature", None), "names", None)
    for row, (words, labels) in enumerate(zip(rows.texts(), given, strict=True)):
        if not isinstance(labels, list) or len(words) != len(labels):
            count = len(labels) if isinstance(labels, list) else 1
            raise error(
                "PLM302",
                f"{rows.place(row)} does not have one label for each word",
                f"{rows.source}: {rows.label}",
                got=f"{len(words)} words, {count} labels",
            )
    return [[names[v] if names else str(v) for v in labels] for labels in given]


def label_ids(rows: Rows, names: Mapping[str, int]) -> list[list[int]]:
    """Return the labels of each sentence as the model numbers them; `names` are its own.

    Raises:
        PlmccError: a label that the model does not know.
    """
    known = {**{str(index): index for index in names.values()}, **names}
    found = []
    for row, labels in enumerate(named_labels(rows)):
        for label in labels:
            if label not in known:
                raise _unknown(rows, row, label, list(names))
        found.append([known[label] for label in labels])
    return found


def _unknown(rows: Rows, row: int, label: str, names: list[str]) -> PlmccError:
    otherwise = "name the labels in `id2label` and `label2id` of the model's config.json"
    return error(
        "PLM302",
        f"{rows.place(row)} has a label that the model does not know",
        f"{rows.source}: {rows.label}",
        got=repr(label),
        allowed=listing(names),
        hint=did_you_mean(label, names, otherwise),
    )


def encode_sentences(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Mapping[str, int]
) -> Dataset:
    """Return the model's inputs, with `labels` where there are any: -100 but on the first piece of
    each word. A sentence that is too long becomes several rows.

    Raises:
        PlmccError: a label is not known, or the tokenizer is a slow one.
    """
    inputs, made, begun = sentence_windows(rows, tokenizer, max_length)
    if rows.label is None:
        return Dataset.from_dict(inputs)
    given = [np.array([*labels, IGNORED]) for labels in label_ids(rows, names)]  # -1 is the last
    labels = [given[window.row][words] for window, words in zip(made, begun, strict=True)]
    keep = [index for index, found in enumerate(labels) if (found != IGNORED).any()]
    columns = {**inputs, "labels": [found.tolist() for found in labels]}
    return Dataset.from_dict({name: [c[i] for i in keep] for name, c in columns.items()})


def sentence_windows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Inputs, list[Window], list[Words]]:
    """Return windows of the sentences, and the words that their tokens begin.

    Words are joined by spaces, so that the tokenizer sees what a pipeline would give it.
    """
    need_offsets(tokenizer, TASK)
    sentences = rows.texts()
    inputs, made = windows(tokenizer, [" ".join(words) for words in sentences], max_length)
    lengths = [np.array([len(word) + 1 for word in words]) for words in sentences]
    starts = [np.cumsum(length) - length for length in lengths]
    begun, row, last = [], -1, -1
    for window, ids in zip(made, inputs["input_ids"], strict=True):
        row, last = window.row, (last if window.row == row else -1)
        # A token may hold the space before its word: its last character says where it is.
        inside = np.searchsorted(starts[row], window.spans_N2[:, 1] - 1, side="right") - 1
        first = np.diff(inside, prepend=last) > 0
        words = np.full(len(ids), -1)
        words[window.begin : window.begin + len(inside)] = np.where(first, inside, -1)
        last = int(inside[-1]) if len(inside) else last
        begun.append(words)
    return inputs, made, begun


def best_labels(
    rows: Rows,
    made: Sequence[Window],
    begun: Sequence[Words],
    outputs: Iterable[tuple[list[int], Any]],
) -> list[list[int]]:
    """Return the label of each word; -1 of words that the tokenizer leaves out.

    `outputs` are, batch by batch, the places of windows in `made` and what the model returns, with
    padding on the right.
    """
    found = [np.full(len(words), -1) for words in rows.texts()]
    for order, output in outputs:
        for index, labels in zip(order, output["logits"].argmax(-1).cpu().numpy(), strict=True):
            words = begun[index]
            first = words >= 0
            found[made[index].row][words[first]] = labels[: len(words)][first]
    return [labels.tolist() for labels in found]


def entity_f1(
    truths: Sequence[Sequence[int]], found: Sequence[Sequence[int]], names: Mapping[str, int]
) -> float:
    """Return F1 of whole entities by seqeval, in 0..1.

    Raises:
        PlmccError: labels are not in the form of BIO, or seqeval is not installed.
    """
    other = next((name for name in names if not _BIO.fullmatch(name)), None)
    if other is not None:
        message = "F1 of entities needs BIO labels"
        hint = "use `accuracy`, or correct the labels in the model's config.json"
        raise error(
            "PLM303", message, "evaluate", got=other, allowed="O, B-<type>, I-<type>", hint=hint
        )
    # seqeval knows no missing label; a word that the tokenizer leaves out is in no entity.
    text = {index: name for name, index in names.items()} | {-1: "O"}
    lists = [[[text[label] for label in labels] for labels in part] for part in (truths, found)]
    return float(
        library("seqeval.metrics", "eval", "this metric", "evaluate").f1_score(
            *lists, zero_division=0
        )
    )
