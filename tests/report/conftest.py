"""A run whose report is looked at, by the tests of its text and by those in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

import plmcc
from plmcc import Recipe, Result
from plmcc.passes.movement_pruning import MovementPruning
from support.reports import trained
from support.tiny_models import tiny
from support.tokenizers import words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    config: Any = tiny("bert").config
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    words().save_pretrained(folder / "bert")
    lines = [f"w{i} w{i + 1}\t{i % 2}" for i in range(64)]
    (folder / "rows.tsv").write_text("text\tlabel\n" + "\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def result(data: Path) -> Result:
    pruning = MovementPruning(granularity="structured", density=0.5)
    recipe = Recipe(name="pruned", passes=[pruning], train=trained(data))
    return plmcc.apply(recipe, data / "bert", data / "out")


@pytest.fixture(scope="module")
def text(result: Result) -> str:
    assert result.folder is not None
    return (result.folder / "report.html").read_text(encoding="utf-8")
