"""Texts that are longer than what a model reads, in windows, with the characters behind each
token: what tasks need whose labels are places in a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plmcc.diagnostics import error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # rows that the tokenizer gets at once: character spans take memory

Inputs = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Window:
    """A part of a text. `spans_N2` are the first and the last + 1 character, in the whole text, of
    its N tokens, which stand from `begin` on in the model's input."""

    row: int
    begin: int
    spans_N2: NDArray[np.int64]
    whole: int = 0
    """Where the token is that stands for the whole input: the answer to a question without one."""


def need_offsets(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Check that a tokenizer says which characters its tokens come from.

    Raises:
        PlmccError: it does not.
    """
    if not tokenizer.is_fast:
        message = f"{task} needs a tokenizer with character offsets"
        raise error(
            "PLM303",
            message,
            "tokenizer",
            got=f"{type(tokenizer).__name__}, a slow one",
            allowed="a fast tokenizer",
            hint="use a model that comes with a tokenizer.json",
        )


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    stride: int = 0,
    questions: Sequence[str] | None = None,
) -> tuple[Inputs, list[Window]]:
    """Return the model's inputs for texts, a column a name, and the window behind each of them.

    Args:
        tokenizer: a fast one.
        texts: what is cut into windows.
        max_length: tokens of a window, question and special tokens included.
        stride: tokens that neighboring windows of a text have in common.
        questions: what stands, whole, before each window of the text of the same place.
    """
    inputs: Inputs = {}
    made: list[Window] = []
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        pairs = [list(texts[part])] if questions is None else [questions[part], list(texts[part])]
        encoded: Any = tokenizer(
            *pairs,
            truncation="only_first" if questions is None else "only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        spans, rows = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
        wanted = 0 if questions is None else 1
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            inside = [i for i, text in enumerate(encoded.sequence_ids(index)) if text == wanted]
            begin = inside[0] if inside else 0
            kept = np.array(span[begin : begin + len(inside)], dtype=np.int64).reshape(-1, 2)
            whole = _place(tokenizer.cls_token_id, encoded["input_ids"][index])
            made.append(Window(start + row, begin, kept, whole))
        for name, column in encoded.items():
            inputs.setdefault(name, []).extend(column)
    return inputs, made


def _place(token: int | None, ids: list[int]) -> int:
    return ids.index(token) if token in ids else 0


def by_length(lengths: Sequence[int], size: int, tokens: float = math.inf) -> Iterator[list[int]]:
    """Yield the places of texts of similar length, at most `size` at a time and, of more than one,
    at most so many tokens with padding."""
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) == size or (len(part) + 1) * lengths[place] > tokens):
            yield part
            part = []
        part.append(place)
    if part:
        yield part
