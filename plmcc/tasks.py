"""What a model is for: the Auto class that loads it, its batches, its own loss, and its pooled
output."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from plmcc import question_answering, token_classification
from plmcc.data import Rows, check_class_labels
from plmcc.diagnostics import error

_AUTO = {
    "sentence-similarity": "AutoModel",
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
    question_answering.TASK: "AutoModelForQuestionAnswering",
    token_classification.TASK: "AutoModelForTokenClassification",
}
_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "translation",
    "MTModel": "translation",
}
# Endings would name models that read pictures too.
_CLASSES = dict.fromkeys(
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(), question_answering.TASK
) | dict.fromkeys(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(), token_classification.TASK)
WINDOWED = (question_answering.TASK, token_classification.TASK)
"""Tasks whose labels are places in a text, and whose texts are read in windows."""
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
"""Makes a batch of encoded rows."""
LABELS = ("labels", "start_positions", "end_positions")
_DRAWS = 100
"""What a batch holds for the task's own loss."""


def task_of(architecture: str, folder: Path | None = None) -> str:
    """Return the task that a checkpoint was made for, by its architecture; a sentence encoder has a
    modules.json."""
    if architecture in _CLASSES:
        return _CLASSES[architecture]
    for ending, task in _HEADS.items():
        if architecture.endswith(ending):
            return task
    if folder is not None and (folder / "modules.json").exists():
        return "sentence-similarity"
    return "feature-extraction"


def auto_class(task: str, config: PreTrainedConfig) -> Any:
    """Return the class to load with: the task's Auto class, or for plain features the checkpoint's
    own class."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if task in ("feature-extraction", "translation") and architecture is not None:
        return architecture
    return getattr(transformers, _AUTO[task])


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector: "mean", "cls" or "max" over the real tokens, as in the
    model's own files."""

    mode: str = "mean"

    @classmethod
    def of(cls, folder: Path | None) -> Pooling:
        """Read a sentence-transformers folder; mean pooling where it says nothing.

        Raises:
            PlmccError: the folder names a pooling that plmcc does not know.
        """
        file = folder / "1_Pooling" / "config.json" if folder else None
        if file is None or not file.exists():
            return cls()
        values = json.loads(file.read_text(encoding="utf-8"))
        named = values.get("pooling_mode")
        modes = [named] if isinstance(named, str) else [
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for key, chosen in values.items() if key.startswith("pooling_mode_") and chosen
        ]  # fmt: skip
        if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
            raise error(
                "PLM303",
                "this pooling is not known",
                str(file),
                given=", ".join(modes),
                allowed="mean, cls, max",
            )
        return cls(modes[0])

    def __call__(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return one vector a row (B, D), of length 1."""
        mask_BL1 = mask_BL[..., None].to(states_BLD.dtype)
        if self.mode == "cls":
            first_B = mask_BL.argmax(-1)
            pooled = states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), first_B]
        elif self.mode == "max":
            pooled = states_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(1)
        else:
            pooled = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)
        return F.normalize(pooled.float(), dim=-1)


def encode(
    rows: Rows,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    classes: int,
    names: Mapping[str, Any] | None = None,
    stride: int | None = None,
) -> Dataset:
    """Turn rows into model inputs, with `labels` (or the positions of answers) where the task has
    its own loss.

    A labelled pair of a similarity task becomes `input_ids` and `other_ids` with a label in 0..1
    (scaled by the largest and smallest label); without labels, the two texts of a pair are separate
    rows.
    """
    tokenize = _Tokenize(tokenizer, max_length)
    if task == question_answering.TASK:
        return question_answering.encode_questions(rows, tokenizer, max_length, stride)
    if task == token_classification.TASK:
        return token_classification.encode_sentences(rows, tokenizer, max_length, names or {})
    if task == "translation":
        return _translations(rows, tokenize)
    if task == "text-classification":
        columns = [rows.texts(column) for column in range(len(rows.text))]
        inputs = tokenize(*columns)
        if rows.label is not None:
            inputs["labels"] = check_class_labels(rows, classes, names)
        return Dataset.from_dict(inputs)
    if task == "sentence-similarity" and len(rows.text) == 2 and rows.label is not None:
        return _labelled_pairs(rows, tokenize)
    return Dataset.from_dict(
        tokenize([text for c in range(len(rows.text)) for text in rows.texts(c)])
    )


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

    def __call__(self, *texts: list[str]) -> dict[str, Any]:
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.length))


def _labelled_pairs(rows: Rows, tokenize: _Tokenize) -> Dataset:
    scores = rows.numbers()
    low, high = min(scores), max(scores)
    inputs = tokenize(rows.texts(0))
    inputs["other_ids"] = tokenize(rows.texts(1))["input_ids"]
    inputs["labels"] = [(score - low) / max(high - low, 1e-9) for score in scores]
    return Dataset.from_dict(inputs)


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
        return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    pad = transformers.DataCollatorWithPadding(tokenizer)
    return lambda rows: _pad_pairs(rows, pad)


class Masking:
    """Pads, and masks tokens at random. What is masked depends on the seed, the epoch and the rows
    of the batch alone: batches are fetched ahead, so that the state of a common generator would not
    say where a training that goes on has been."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.mask = transformers.DataCollatorForLanguageModeling(tokenizer)
        self.seed, self.epoch = seed, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
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

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
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


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _pad_pairs(rows: list[dict[str, Any]], pad: Any) -> dict[str, Tensor]:
    """The second texts of pairs follow the first ones as further rows of the batch."""
    others = [{"input_ids": row["other_ids"]} for row in rows if "other_ids" in row]
    if not others:
        return dict(pad(rows))
    labels = torch.tensor([row["labels"] for row in rows])
    firsts = [{"input_ids": row["input_ids"]} for row in rows]
    return dict(pad(firsts + others)) | {"labels": labels}


def similarity_loss(pooled_BD: Tensor, labels_N: Tensor) -> Tensor:
    """Mean squared difference of cosine and label; rows N to 2N-1 are the second texts."""
    first_ND, second_ND = pooled_BD.chunk(2)
    return F.mse_loss((first_ND * second_ND).sum(-1), labels_N.float())


def last_states(output: Any) -> Tensor:
    """Return the last hidden states (B, L, D) of any model's output."""
    states = output.get("last_hidden_state")
    if states is None:
        states = output["hidden_states"][-1]
    assert isinstance(states, Tensor)
    return states


def classes_of(model: PreTrainedModel) -> int:
    """Return the number of classes of the head."""
    return int(model.config.num_labels or 0)
