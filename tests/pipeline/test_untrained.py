"""What language models lose by passes that no training follows is said, with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import plmcc
from plmcc.pipeline.untrained import untrained
from plmcc.planning.plan import load_outline, plan
from plmcc.recipe import parse_recipe
from support.tokenizers import words

CODES = """
plmcc: 1
task: text-generation
passes:
  - compositional_codes: {width: 8, codewords: 2, initialization: product}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows what follows each word."""
    place = tmp_path_factory.mktemp("llama")
    (place / "text.txt").write_text("\n".join(lines()))
    tokenizer = words()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "new")
    tokenizer.save_pretrained(place / "new")
    recipe = (
        f"plmcc: 1\ntask: text-generation\ntrain:\n  data: {{train: {place / 'text.txt'}}}\n"
        "  arguments: {max_steps: 120, learning_rate: 1.0e-2, per_device_train_batch_size: 16}\n"
    )
    plmcc.apply(parse_recipe(recipe, load_torch=True), place / "new", output=place / "model")
    return place


def lines() -> list[str]:
    return [" ".join(f"w{(i + 7 * j) % 90}" for j in range(12)) for i in range(90)]


def notes(recipe: str, model: Path) -> tuple[str, str]:
    read: Any = parse_recipe(recipe, load_torch=True)
    planned = plan(read, load_outline(read, str(model / "model")))
    result = plmcc.apply(parse_recipe(recipe, load_torch=True), model / "model")
    return "\n".join(planned.notes), "\n".join(result.source.notes)


def test_codes_without_training_are_measured(model: Path) -> None:
    text = model / "text.txt"
    planned, made = notes(f"{CODES}calibrate: {{data: {text}}}\n", model)
    for found in (planned, made):
        assert "bits a dimension, and no training follows" in found
    assert "perplexity on the calibration text rose from 1." in made
    assert "no training follows compositional_codes: distill the result" in made


def test_nothing_is_said_where_training_follows(model: Path) -> None:
    train = f"train:\n  data: {{train: {model / 'text.txt'}}}\n  arguments: {{max_steps: 2}}\n"
    planned, made = notes(CODES + train, model)
    assert "no training follows" not in planned + made


def test_which_passes_no_training_follows() -> None:
    stages = (
        "plmcc: 1\nstages:\n"
        "  - {name: a, passes: [drop_layers], train: {data: {train: x.txt}}}\n"
        "  - {name: b, passes: [compositional_codes, optimum]}\n"
    )
    assert untrained(parse_recipe(stages, load_torch=True)) == ["compositional_codes"]
