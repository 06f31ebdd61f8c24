from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny
from transformers import AutoTokenizer
from words import words

import plmcc
from plmcc import catalog
from plmcc.evaluate import Evaluator
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.source import load_source
from plmcc.tasks import Pooling

CODES = CompositionalCodes(codebooks=4, codewords=8, rounds=0)
ROWS = "\n".join(f"w{i} w{i + 1} w{(3 * i) % 90} w7,{i % 3}" for i in range(24))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text(f"text,label\n{ROWS}\n")
    return file


def saved(name: str, folder: Path, pad: bool = True) -> Path:
    tiny(name).save_pretrained(folder)
    words(pad).save_pretrained(folder)
    return folder


def train(rows: Path, **options: object) -> plmcc.Train:
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return plmcc.Train(data=plmcc.Data(train=str(rows)), arguments=arguments, **options)  # type: ignore[arg-type]


def test_classification_gets_a_head_as_wide_as_its_labels(rows: Path, tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    figures = [
        plmcc.Evaluate(metric=name, data=str(rows)) for name in ("accuracy", "f1", "matthews")
    ]
    recipe = plmcc.Recipe(
        task="text-classification", passes=[CODES], train=train(rows), evaluate=figures
    )
    result = plmcc.apply(recipe, model, tmp_path / "out")
    assert plmcc.load(tmp_path / "out").config.num_labels == 3
    assert all(0 <= row["after"] <= 100 for row in result.metrics[:2])


def test_language_models_are_trained_and_measured_by_perplexity(rows: Path, tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "gpt2", pad=False)
    figure = plmcc.Evaluate(metric="perplexity", data=str(rows))
    recipe = plmcc.Recipe(passes=[CODES], train=train(rows), evaluate=[figure])
    result = plmcc.apply(recipe, model, tmp_path / "out")
    assert result.metrics[0]["after"] < result.metrics[0]["before"]
    # The padding token that batches needed is not smuggled into the user's tokenizer.
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


def test_masked_language_models_learn_from_the_teacher(rows: Path, tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    distill = plmcc.Distill(logits=1.0, task=0.5)
    recipe = plmcc.Recipe(passes=[CODES], train=train(rows, distill=distill))
    assert plmcc.apply(recipe, model, tmp_path / "out").training["main"]


def test_encoder_decoders_are_rewritten_but_not_trained(rows: Path, tmp_path: Path) -> None:
    model = saved("marian", tmp_path / "marian")
    assert plmcc.apply(plmcc.Recipe(passes=[CODES]), model, tmp_path / "out").folder
    with pytest.raises(plmcc.PlmccError, match="not yet trained"):
        plmcc.apply(plmcc.Recipe(passes=[CODES], train=train(rows)), model, tmp_path / "other")


def test_a_compressed_model_can_be_compressed_again(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "llama")
    plmcc.apply(plmcc.Recipe(passes=[CODES]), model, tmp_path / "codes")
    merge = catalog.load("optimum")()
    plmcc.apply(plmcc.Recipe(passes=[merge]), tmp_path / "codes", tmp_path / "both")
    names = plmcc.load(tmp_path / "both").state_dict()
    assert any("merged" in name for name in names)
    assert any(name.endswith(".codes") for name in names)


def test_a_model_named_by_hub_id_comes_from_the_local_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--someone--tiny/snapshots" / ("0" * 40)
    saved("bert", snapshot)
    (snapshot / "modules.json").write_text("[]")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "from plmcc.source import load_source\n"
        "source = load_source('someone/tiny', 'fill-mask')\n"
        "print(source.tokenizer is not None, [f.name for f in source.other_files()])\n"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")
    assert "modules.json" in done.stdout


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_ignores_padding(mode: str) -> None:
    states = torch.randn(1, 3, 4)
    padded = torch.cat([states, torch.full((1, 2, 4), 9.0)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    pooling = Pooling(mode)
    assert torch.allclose(pooling(states, mask[:, :3]), pooling(padded, mask))


def test_embeddings_do_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    source = load_source(saved("bert", tmp_path / "bert"))
    evaluator = Evaluator(source.model, source.need_tokenizer("the test"), source.pooling)
    text = ["w1 w2", "w3 w4 w5 w6 w7 w8", "w9"]
    together = evaluator.embed(text)
    assert torch.allclose(together, torch.cat([evaluator.embed([one]) for one in text]), atol=1e-6)


def test_text_longer_than_the_model_is_cut(tmp_path: Path) -> None:
    source = load_source(saved("bert", tmp_path / "bert"))
    assert source.max_length(1000) == 40
    (tmp_path / "long.txt").write_text("w1 " * 500)
    figure = plmcc.Evaluate(metric="fidelity", data=str(tmp_path / "long.txt"))
    recipe = plmcc.Recipe(passes=[CODES], evaluate=[figure])
    result = plmcc.apply(recipe, source)
    assert -100 <= result.metrics[0]["after"] <= 100
