"""What a pass cannot do on an architecture is refused by `plan` and before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import plmcc
from plmcc.models.reduced import Reducible
from plmcc.models.source import Source
from plmcc.pipeline.expected import on_meta
from plmcc.pipeline.trial import try_out
from plmcc.planning.plan import plan
from plmcc.recipe.load import Recipe, parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

HEADS = "movement_pruning: {method: magnitude, granularity: structured, density: 0.5}"


def recipe_of(entry: str, more: str = "") -> Recipe:
    return parse_recipe(f"plmcc: 1\npasses: [{entry}]\n{more}", load_torch=True)


def model_of(name: str, **options: Any) -> PreTrainedModel:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model: Any = kind(kind.config_class(**options))
    model.eval()
    return model  # type: ignore[no-any-return]


def mpnet() -> PreTrainedModel:
    """Its layers share a position bias of all heads, which is computed outside of them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    return model_of("MPNetForMaskedLM", vocab_size=99, intermediate_size=48, **sizes)


def test_plan_and_apply_refuse_alike_and_before_training(tmp_path: Path) -> None:
    model = mpnet()
    made = plan(recipe_of(HEADS), Source.of(on_meta(model)))
    [problem] = made.problems
    assert problem.code == "PLM203"
    assert "does not fit MPNetForMaskedLM" in problem.message
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    train = "train: {data: {train: synthetic}, arguments: {max_steps: 1000000}}\n"
    with pytest.raises(plmcc.PlmccError, match="does not fit MPNetForMaskedLM"):
        plmcc.apply(recipe_of(HEADS, train), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_changed_by_a_trial() -> None:
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try_out(recipe_of(HEADS), Reducible.of(model))
    assert torch.equal(torch.rand(3), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


FITS = {
    "layers called layer_id": (
        "GPTNeoForCausalLM",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
        "drop_layers: {keep: [1, 2]}",
    ),
    "a window for each layer": (
        "LongformerForMaskedLM",
        {"num_hidden_layers": 4, "num_attention_heads": 4, "attention_window": [4, 4, 8, 8]},
        "drop_layers: {keep: [0, 3]}",
    ),
    "two stacks of the same depth": (
        "LEDForConditionalGeneration",
        {"encoder_layers": 3, "decoder_layers": 3, "attention_window": [4, 4, 8], "d_model": 32}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "drop_layers: {keep: 1, select: even}",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_layers_are_numbered_and_lists_cut(case: str, tmp_path: Path) -> None:
    name, options, entry = FITS[case]
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = model_of(
        name, **(sizes | options if "d_model" not in options else options | {"vocab_size": 99})
    )
    result = plmcc.apply(recipe_of(entry), model, tmp_path / "out")
    assert result.folder is not None  # a fresh process has repeated outputs and tokens
    again = plmcc.load(tmp_path / "out")
    window = getattr(again.config, "attention_window", None)
    if name == "LongformerForMaskedLM":
        assert window == [4, 8]
    if name == "LEDForConditionalGeneration":
        assert window == [4, 4, 8]
