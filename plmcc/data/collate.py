"""Encoded rows as batches."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from plmcc.data.tasks import WINDOWED
from plmcc.utils.types import Values

Collate = Callable[[list[Values]], dict[str, Tensor]]
"""Makes a batch of encoded rows."""


_DRAWS = 100


def collator(
    task: str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig | None = None,
    seed: int = 0,
) -> Collate:
    """Return the function that pads examples into a batch; the seed is of what it masks."""
    if task == "translation":
        assert config is not None
        pad = tokenizer.pad_token_id if tokenizer is not None else config.pad_token_id
        return PadPairs(int(pad or 0), int(config.decoder_start_token_id))
    if tokenizer is None:
        return _stack
    tokenizer = padding(tokenizer)
    if task in WINDOWED:  # positions count from the left
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
        return transformers.DataCollatorForTokenClassification(tokenizer)
    if task == "fill-mask":
        return Masking(tokenizer, seed)
    if task == "text-generation":
        return Continuing(tokenizer)
    bare = tokenizer.pad_token is None  # words of vectors have no special tokens
    pad = _pad_bare if bare else transformers.DataCollatorWithPadding(tokenizer)
    return lambda rows: _pad_pairs(rows, pad)


class Continuing:
    """Pads texts that are continued. Labels are the ids of all tokens, or those of a column
    `labels` (of conversations, what the assistant says)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.every = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        # It pads labels too, on the tokenizer's side, with -100.
        self.some = transformers.DataCollatorForTokenClassification(tokenizer)

    def __call__(self, rows: list[Values]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (-100: not learned), all (B, L)."""
        batch: dict[str, Tensor] = (self.some if "labels" in rows[0] else self.every)(rows)
        return batch


class Masking:
    """Pads, and masks tokens at random. What is masked depends on the seed, the epoch and the rows
    of the batch alone: batches are fetched ahead, so that the state of a common generator would not
    say where a training that goes on has been."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.mask = transformers.DataCollatorForLanguageModeling(tokenizer)
        self.seed, self.epoch = seed, 0

    def __call__(self, rows: list[Values]) -> dict[str, Tensor]:
        """Return a batch with labels, -100 where nothing is masked."""
        text = repr([list(row["input_ids"]) for row in rows])
        key = f"{self.seed} {self.epoch} {text}".encode()
        self.mask.generator = torch.Generator().manual_seed(zlib.crc32(key))
        for _ in range(_DRAWS):
            batch: dict[str, Tensor] = self.mask(rows)
            if (batch["labels"] != -100).any():
                break  # else the loss would be a mean over nothing: in short texts that happens
        return batch


def padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad: itself, or a copy that pads with the end token.

    The user's own tokenizer is saved with the result and must not change.
    """
    if tokenizer.pad_token is not None:
        return tokenizer
    copied = copy.deepcopy(tokenizer)
    copied.pad_token = copied.eos_token or copied.unk_token
    return copied


@dataclass(frozen=True)
class PadPairs:
    """Pad sources and targets into a batch.

    The decoder reads the start token and the target without its last token. That is said here, and
    not left to the model: mBART's own shift begins with the last token of the target, a language
    code in its own checkpoints and the end of the sentence in all others.
    """

    pad: int
    start: int

    def __call__(self, rows: list[Values]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, and of targets `labels` (-100 at padding) and
        `decoder_input_ids`, all (B, L)."""
        sources = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": _padded(sources, self.pad),
            "attention_mask": _padded([[1] * len(ids) for ids in sources], 0),
        }
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = _padded(labels, -100)
            shifted = [[self.start, *ids[:-1]] for ids in labels]
            batch["decoder_input_ids"] = _padded(shifted, self.pad)
        return batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _stack(rows: list[Values]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _pad_bare(rows: list[Values]) -> dict[str, Tensor]:
    """Any token pads: the mask says that it does not count."""
    ids = [list(row["input_ids"]) for row in rows]
    masks = [[1] * len(row) for row in ids]
    labels = (
        {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}
    )
    return {"input_ids": _padded(ids, 0), "attention_mask": _padded(masks, 0), **labels}


def _pad_pairs(rows: list[Values], pad: Any) -> dict[str, Tensor]:
    """The second texts of pairs follow the first ones as further rows of the batch."""
    others = [{"input_ids": row["other_ids"]} for row in rows if "other_ids" in row]
    if not others:
        return dict(pad(rows))
    labels = torch.tensor([row["labels"] for row in rows])
    firsts = [{"input_ids": row["input_ids"]} for row in rows]
    return dict(pad(firsts + others)) | {"labels": labels}
