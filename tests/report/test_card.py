"""The model card: metadata that the hub reads, and text that shows names as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils._validators import validate_repo_id

import plmcc
from plmcc import Recipe
from plmcc.api import Pass
from plmcc.models.source import Source, load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.quantized_linears import QuantizedLinears
from plmcc.recipe.load import Evaluate
from plmcc.report.card import hub_id
from support.reports import trained

CODES = CompositionalCodes(codebooks=8, codewords=2, initialization="product")
INT8 = QuantizedLinears(scheme="int8")
DROP = DropLayers(targets="encoder", keep=1)


def card_of(data: Path, name: str, *passes: Pass, **more: Any) -> tuple[Any, str]:
    """The metadata and the text of the card of a run on a model that is called so."""
    source = replace(load_source(data / "bert"), name=name)
    out = data / f"card-{len(list(data.iterdir()))}"
    plmcc.apply(Recipe(name="small", passes=list(passes), **more), source, out)
    text = (out / "README.md").read_text(encoding="utf-8")
    return ModelCard(text).data, text


@pytest.mark.parametrize(("chosen", "relation"), [(INT8, "quantized"), (DROP, "finetune")])
def test_the_hub_learns_what_a_model_was_made_from(chosen: Pass, relation: str, data: Path) -> None:
    card, _ = card_of(data, "owner/bert_small.v2", chosen)
    assert card.base_model == "owner/bert_small.v2"
    validate_repo_id(card.base_model)
    assert card.to_dict()["base_model_relation"] == relation
    assert card.library_name == "transformers"
    assert card.pipeline_tag == "text-classification"
    assert card.tags == ["plmcc", "compression"]


def test_a_model_that_was_only_trained_is_a_finetune(data: Path) -> None:
    card, text = card_of(data, "owner/bert", train=trained(data))
    assert card.to_dict()["base_model_relation"] == "finetune"
    assert card.tags == ["plmcc"]
    assert "trained by plmcc" in text
    assert "import plmcc" not in text


def test_a_directory_is_no_id(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    for name in (str(data / "bert"), "bert", "./bert", "../" + data.name + "/bert"):
        card, text = card_of(data, name, DROP)
        assert card.base_model is None
        assert "base_model_relation" not in card.to_dict()
        assert str(data) not in text


def test_only_what_the_hub_may_have_is_an_id(data: Path) -> None:
    source = load_source(data / "bert")
    names = {"owner/name": True, "name": True, "a/b/c": False, "/gone/model": False, "a b": False}
    for name, known in names.items():
        assert (hub_id(replace(source, name=name)) is not None) == known, name
    assert hub_id(replace(source, name="owner/name", scratch=True)) is None
    assert hub_id(Source.of(source.model)) is None


def test_metrics_are_a_model_index(data: Path) -> None:
    odd = data / "a | _b_: <d>.tsv"
    odd.write_text((data / "rows.tsv").read_text())
    asked = [
        Evaluate(metric="fidelity", data=str(data / "rows.tsv")),
        Evaluate(metric="accuracy", data=str(odd)),
    ]
    card, text = card_of(data, "owner/bert", DROP, evaluate=asked)
    found = card.eval_results
    assert card.model_name == "small"
    assert [(one.metric_type, one.dataset_name) for one in found] == [
        ("fidelity", "rows.tsv"),
        ("accuracy", odd.name),
    ]
    assert [one.dataset_type for one in found] == ["rows.tsv", "a-_b_-d-.tsv"]
    assert all(isinstance(one.metric_value, float) for one in found)
    assert all(one.task_type == "text-classification" for one in found)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == "rows.tsv"
    assert r"| accuracy | a \| \_b\_: \<d\>.tsv |" in text


def test_the_text_has_sizes_for_people(data: Path) -> None:
    _, text = card_of(data, "owner/bert", CODES)
    assert "owner/bert, compressed by plmcc: " in text
    assert "times smaller" in text
    assert "import plmcc  # registers the format with transformers" in text
    assert r"embeddings.word\_embeddings (compositional\_codes) | " in text
    assert " kB | " in text
