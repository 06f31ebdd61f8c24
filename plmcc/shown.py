"""What passes are shown of the data that a stage trains on: some batches, and the counts of
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmcc.train import Lesson

_BATCHES, _ROWS = 30, 16


@dataclass(frozen=True)
class Shown:
    """Inputs of the model that passes may fit to, and how often each token id occurs."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None
    """(V,) int64, V the largest id that occurs and 1; None without data."""

    @classmethod
    def of(cls, lesson: Lesson) -> Shown:
        """Look at the training rows."""
        return cls(_batches(lesson), _counts(lesson))


def _batches(lesson: Lesson) -> list[dict[str, Any]]:
    rows = lesson.train.select(range(min(len(lesson.train), _BATCHES * _ROWS)))
    starts = range(0, len(rows), _ROWS)
    if lesson.task == "sentence-similarity":  # labels of pairs are nothing the model knows
        rows = rows.remove_columns([n for n in ("labels", "other_ids") if n in rows.column_names])
    picked = [rows.select(range(i, min(i + _ROWS, len(rows)))) for i in starts]
    return [lesson.collate(list(part)) for part in picked]


def _counts(lesson: Lesson) -> Tensor | None:
    """Count the ids of all texts; the labels of a translation are a text too."""
    names = {"input_ids", "other_ids"} | ({"labels"} if lesson.task == "translation" else set())
    total = np.zeros(1, dtype=np.int64)
    for name in names & set(lesson.train.column_names):
        for row in lesson.train.with_format("numpy").iter(1000):
            ids = np.concatenate([np.asarray(one).ravel() for one in row[name]])
            found = np.bincount(ids[ids >= 0].astype(np.int64), minlength=len(total))
            found[: len(total)] += total
            total = found
    return torch.from_numpy(total) if total.any() else None
