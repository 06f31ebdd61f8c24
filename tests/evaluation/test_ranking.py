"""Rerankers: the order of texts for a query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import BertForSequenceClassification, BertModel

import plmcc
from plmcc.data.rows import Rows, load_rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.source import Source, load_source
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

TEXT = ["query", "passage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranking")
    config: Any = tiny("bert").config
    torch.manual_seed(0)
    BertModel(config).save_pretrained(made / "base")
    words().save_pretrained(made / "base")
    CrossEncoder(str(made / "base"), num_labels=1).save_pretrained(str(made / "reranker"))
    rows = [
        {"query": f"w{q} w{q + 1}", "passage": f"w{(q * p) % 60} w{p}", "label": int(p == q % 6)}
        for q in range(8)
        for p in range(6)
    ]
    rows += [
        {"query": "w70", "passage": "w1", "label": 0},
        {"query": "w71 w2", "passage": "w3", "label": 1},
    ]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return made


def rows_of(folder: Path) -> Rows:
    return load_rows(str(folder / "rows.jsonl"), text=TEXT, label="label")


def test_metrics_are_those_of_the_scores_of_sentence_transformers(folder: Path) -> None:
    rows = rows_of(folder)
    model = CrossEncoder(str(folder / "reranker"))
    pairs = list(zip(rows.texts(0), rows.texts(1), strict=True))
    scores = np.array(model.predict(pairs))
    gains, places = [], []
    for q in range(8):  # the last two queries have nothing to order
        mine = scores[q * 6 : q * 6 + 6]
        rank = 1 + int((mine > mine[q % 6]).sum())
        gains.append(1 / np.log2(1 + rank))
        places.append(1 / rank)
    source = load_source(folder / "reranker", "reranking")
    evaluator = Evaluator(source.model, words(), source.pooling)
    assert evaluator.compute("ndcg", rows) == pytest.approx(100 * np.mean(gains), abs=1e-4)
    assert evaluator.compute("mrr", rows) == pytest.approx(100 * np.mean(places), abs=1e-4)


def test_equal_scores_are_no_help(folder: Path) -> None:
    source = load_source(folder / "reranker", "reranking")
    torch.nn.init.zeros_(source.model.get_submodule("classifier").weight)  # type: ignore[arg-type]
    evaluator = Evaluator(source.model, words(), source.pooling)
    assert evaluator.compute("mrr", rows_of(folder)) == pytest.approx(100 / 6)


def test_a_new_reranker_is_trained_and_loads_as_one(folder: Path, tmp_path: Path) -> None:
    data = f"{{train: {folder}/rows.jsonl, text: {TEXT}, label: label}}"
    text = f"""\
plmcc: 1
task: reranking
passes: [quantized_linears: {{}}]
train:
  data: {data}
  arguments: {{max_steps: 2, per_device_train_batch_size: 4}}
evaluate: [{{metric: ndcg, data: {folder}/rows.jsonl, text: {TEXT}, label: label}}]
"""
    result = plmcc.apply(parse_recipe(text, load_torch=True), folder / "base", tmp_path / "out")
    assert result.model.config.num_labels == 1
    assert isinstance(result.model, BertForSequenceClassification)
    assert 0 < result.metrics[0]["after"] <= 100


def test_a_sample_has_whole_queries(folder: Path) -> None:
    found = rows_of(folder).spread(20, whole=True)
    assert all(len(group) in (1, 6) for group in found.groups().values())
    assert 6 <= len(found) <= 24


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("metric: ndcg, text: [passage]", "two columns of text"),
        ("metric: accuracy, text: [query, passage]", "not a metric of reranking"),
    ],
)
def test_bad_input_is_refused(folder: Path, values: str, said: str) -> None:
    text = f"plmcc: 1\ntask: reranking\nevaluate: [{{{values}, data: {folder}/rows.jsonl}}]\n"
    with pytest.raises(PlmccError, match=said):
        parse_recipe(text + "passes: [quantized_linears: {}]\n", load_torch=True)


def test_queries_without_a_relevant_text_are_named(folder: Path, tmp_path: Path) -> None:
    rows = [{"query": "w1", "passage": f"w{p}", "label": 0} for p in range(4)]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source: Source = load_source(folder / "reranker", "reranking")
    given = load_rows(str(tmp_path / "none.jsonl"), text=TEXT, label="label")
    with pytest.raises(PlmccError, match="no query has a relevant text"):
        Evaluator(source.model, words(), source.pooling).compute("ndcg", given)


def test_scores_that_are_no_numbers_are_no_success(folder: Path) -> None:
    source = load_source(folder / "reranker", "reranking")
    torch.nn.init.constant_(source.model.get_submodule("classifier").weight, torch.nan)  # type: ignore[arg-type]
    evaluator = Evaluator(source.model, words(), source.pooling)
    assert all(np.isnan(evaluator.compute(metric, rows_of(folder))) for metric in ("ndcg", "mrr"))


def test_negative_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = [{"query": "w1", "passage": f"w{p}", "label": p - 1} for p in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = load_source(folder / "reranker", "reranking")
    given = load_rows(str(tmp_path / "rows.jsonl"), text=TEXT, label="label")
    with pytest.raises(PlmccError, match="labels from 0 on"):
        Evaluator(source.model, words(), source.pooling).compute("ndcg", given)
