"""Calibration data for passes: some batches of the recipe's data, and counts of all its tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plmcc.ir.calibration import CalibrationData
from plmcc.training.loop import TrainingData
from plmcc.utils.types import Values

ROWS = 480
"""Rows that are drawn where the recipe has no `calibrate`."""
_BATCH = 16


def calibration_data(
    data: TrainingData, tokenizer: object, *, rows: int = ROWS, synthetic: bool = False
) -> CalibrationData:
    """Draw rows by the seed of the data, and count the tokens of all of them."""
    return CalibrationData(_batches(data, rows), _counts(data), tokenizer, synthetic=synthetic)


def _batches(data: TrainingData, count: int) -> list[Values]:
    order = np.random.default_rng(data.seed).permutation(len(data.train))[:count]
    rows = data.train.select(order.tolist())
    starts = range(0, len(rows), _BATCH)
    if data.task == "sentence-similarity":  # labels of pairs are nothing the model knows
        rows = rows.remove_columns([n for n in ("labels", "other_ids") if n in rows.column_names])
    picked = [rows.select(range(i, min(i + _BATCH, len(rows)))) for i in starts]
    return [data.collate(list(part)) for part in picked]


def _counts(data: TrainingData) -> Tensor | None:
    """Count the ids of all texts; the labels of a translation are a text too."""
    names = {"input_ids", "other_ids"} | ({"labels"} if data.task == "translation" else set())
    total = np.zeros(1, dtype=np.int64)
    for name in names & set(data.train.column_names):
        for row in data.train.with_format("numpy").iter(1000):
            ids = np.concatenate([np.asarray(one).ravel() for one in row[name]])
            found = np.bincount(ids[ids >= 0].astype(np.int64), minlength=len(total))
            found[: len(total)] += total
            total = found
    return torch.from_numpy(total) if total.any() else None
