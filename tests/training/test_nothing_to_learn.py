"""Rows of a language model in which there is nothing to predict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

import plmcc
from plmcc.diagnostics import PlmccError
from plmcc.recipe import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words


@pytest.mark.parametrize(("name", "task"), [("bert", "fill-mask"), ("gpt2", "text-generation")])
def test_rows_without_anything_to_predict_are_left_out(
    name: str, task: str, tmp_path: Path
) -> None:
    """At batch size 1 their loss would be a mean over nothing, and end the training."""
    tiny(name).save_pretrained(tmp_path / "model")
    tokenizer: Any = words()
    if name == "gpt2":
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(tmp_path / "model")
    lines = ["unknown", *(f"w{i} w{i + 1} w{i + 2}" for i in range(6))]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    recipe = (
        f"plmcc: 1\ntask: {task}\ntrain:\n  data: {{train: {tmp_path / 'text.txt'}}}\n"
        "  arguments: {num_train_epochs: 2, per_device_train_batch_size: 1, logging_steps: 1}\n"
    )
    result = plmcc.apply(parse_recipe(recipe, load_torch=True), tmp_path / "model")
    assert "1 rows of" in " ".join(result.source.notes)
    (logged,) = result.training.values()
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 12
    assert all(map(math.isfinite, losses))
    (tmp_path / "text.txt").write_text("unknown\n")
    with pytest.raises(PlmccError, match="no text has anything to predict"):
        plmcc.apply(parse_recipe(recipe, load_torch=True), tmp_path / "model")
