"""Rows of text as token ids, for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from plmcc.data import question_answering, token_classification
from plmcc.data.classification import targets_of
from plmcc.data.rows import Rows
from plmcc.data.tasks import GENERATION
from plmcc.diagnostics import error
from plmcc.utils.types import Values


def encode(
    rows: Rows,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    config: PreTrainedConfig | None = None,
    stride: int | None = None,
) -> Dataset:
    """Turn rows into model inputs, with `labels` (or the positions of answers) where the task has
    its own loss. `config` is the model's: its head says what labels are.

    A labeled pair of a similarity task becomes `input_ids` and `other_ids` with a label in 0..1
    (scaled by the largest and smallest label); without labels, the two texts of a pair are separate
    rows.
    """
    tokenize = _Tokenize(tokenizer, max_length, not rows.verbatim)
    if task == question_answering.TASK:
        return question_answering.encode_questions(rows, tokenizer, max_length, stride)
    if task == token_classification.TASK:
        names: dict[str, Any] = dict(config.label2id or {}) if config is not None else {}
        return token_classification.encode_sentences(rows, tokenizer, max_length, names)
    if task == "translation":
        return _translations(rows, tokenize)
    if task == "text-classification":
        columns = [rows.texts(column) for column in range(len(rows.text))]
        inputs = tokenize(*columns)
        if rows.label is not None and config is not None:
            inputs["labels"] = targets_of(rows, config)
        return Dataset.from_dict(inputs)
    if task == "sentence-similarity" and len(rows.text) == 2 and rows.label is not None:
        return _labeled_pairs(rows, tokenize)
    if rows.learned and task == GENERATION and tokenizer.is_fast:
        return Dataset.from_dict(_conversations(rows, tokenizer, max_length))
    return Dataset.from_dict(
        tokenize([text for c in range(len(rows.text)) for text in rows.texts(c)])
    )


def _conversations(rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int | None) -> Values:
    """Return conversations with `labels` for the tokens that the assistant says (-100 elsewhere);
    one that is cut before the assistant says anything is left out."""
    options: Values = {"add_special_tokens": False, "return_offsets_mapping": True}
    options |= {"truncation": length is not None, "max_length": length, "verbose": False}
    encoded = tokenizer(rows.texts(), **options)
    columns: Values = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, spans, said in zip(
        encoded["input_ids"], encoded["offset_mapping"], rows.learned, strict=True
    ):
        labels = [
            token if any(begin <= first < end for begin, end in said) else -100
            for token, (first, _) in zip(ids, spans, strict=True)
        ]
        if any(label != -100 for label in labels):
            columns["input_ids"].append(ids)
            columns["attention_mask"].append([1] * len(ids))
            columns["labels"].append(labels)
    if not columns["input_ids"]:
        message = "no conversation has an answer within the length that is read"
        hint = "raise `max_length`"
        raise error("PLM301", message, rows.source, got=f"{length} tokens", hint=hint)
    return columns


def packed(rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Join texts, an end token after each, and cut them into windows of as many tokens each.

    Raises:
        PlmccError: there are fewer tokens than a window has.
    """
    texts = [text for column in range(len(rows.text)) for text in rows.texts(column)]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if rows.learned and tokenizer.is_fast:  # a template writes the ends
        columns = _conversations(rows, tokenizer, None)
        encoded, learned, ends = columns["input_ids"], columns["labels"], []
    else:
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        learned = []
    ids = [i for text in encoded for i in (*text, *ends)]
    labels = [i for text in learned for i in text]
    starts = range(0, len(ids) - length + 1, length)
    windows = [ids[start : start + length] for start in starts]
    if not windows:
        message = "the text is shorter than one window"
        allowed = f"at least {length} tokens"
        raise error("PLM301", message, rows.source, got=f"{len(ids)} tokens", allowed=allowed)
    made: Values = {"input_ids": windows, "attention_mask": [[1] * length] * len(windows)}
    if labels:
        made["labels"] = [labels[start : start + length] for start in starts]
    found = Dataset.from_dict(made)
    return found.filter(lambda row: any(i != -100 for i in row["labels"])) if labels else found


def _translations(rows: Rows, tokenize: _Tokenize) -> Dataset:
    inputs = tokenize(rows.texts(0))
    columns = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if len(rows.text) == 2:
        columns["labels"] = targets(rows.texts(1), tokenize.tokenizer, tokenize.length)
    return Dataset.from_dict(columns)


def targets(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Return the token ids of translations, each with its end, at most `max_length` of them.

    Tokenizers that do not mark the end of a text get it marked here.
    """
    end = tokenizer.eos_token_id
    limits = {"truncation": True, "max_length": max_length}
    found: list[list[int]] = tokenizer(text_target=texts, **limits)["input_ids"]
    return [ids if end in ids[-2:] else [*ids[: max_length - 1], end] for ids in found]


@dataclass(frozen=True)
class _Tokenize:
    tokenizer: PreTrainedTokenizerBase
    length: int
    special: bool = True

    def __call__(self, *texts: list[str]) -> Values:
        options = {"truncation": True, "max_length": self.length}
        return dict(self.tokenizer(*texts, **options, add_special_tokens=self.special))


def _labeled_pairs(rows: Rows, tokenize: _Tokenize) -> Dataset:
    scores = rows.numbers()
    low, high = min(scores), max(scores)
    inputs = tokenize(rows.texts(0))
    inputs["other_ids"] = tokenize(rows.texts(1))["input_ids"]
    inputs["labels"] = [(score - low) / max(high - low, 1e-9) for score in scores]
    return Dataset.from_dict(inputs)
