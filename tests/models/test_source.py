from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import plmcc
from plmcc.catalog import registry as catalog
from plmcc.data.pooling import Pooling
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.inference.batches import generated
from plmcc.ir.probes import positions_of
from plmcc.models.source import Source, load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

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
    metrics = [
        plmcc.Evaluate(metric=name, data=str(rows)) for name in ("accuracy", "f1", "matthews")
    ]
    recipe = plmcc.Recipe(
        task="text-classification", passes=[CODES], train=train(rows), evaluate=metrics
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
    assert "main" in plmcc.apply(recipe, model, tmp_path / "out").training


def test_encoder_decoders_are_trained_on_translations_only(rows: Path, tmp_path: Path) -> None:
    model = saved("marian", tmp_path / "marian")
    assert plmcc.apply(plmcc.Recipe(passes=[CODES]), model, tmp_path / "out").folder
    with pytest.raises(plmcc.PlmccError, match="have no translations"):
        plmcc.apply(plmcc.Recipe(passes=[CODES], train=train(rows)), model, tmp_path / "other")


def test_translation_asks_for_an_encoder_decoder(rows: Path, tmp_path: Path) -> None:
    recipe = plmcc.Recipe(task="translation", passes=[CODES], train=train(rows))
    with pytest.raises(plmcc.PlmccError, match="hint: name an encoder-decoder"):
        plmcc.apply(recipe, saved("gpt2", tmp_path / "gpt2"), tmp_path / "out")


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
        "from plmcc.models.source import load_source\n"
        "source = load_source('someone/tiny', 'fill-mask')\n"
        "print(source.tokenizer is not None, [f.name for f in source.other_files().copied])\n"
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


def edited_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_layers_that_the_weights_lack_are_an_error_not_random(tmp_path: Path) -> None:
    model = edited_config(saved("bert", tmp_path / "bert"), num_hidden_layers=4)
    with pytest.raises(plmcc.PlmccError, match="not in its weights"):
        load_source(model)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    model = edited_config(saved("bert", tmp_path / "bert"), vocab_size=120)
    with pytest.raises(plmcc.PlmccError, match=r"shape.*word_embeddings"):
        load_source(model)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_weights_are_an_error(content: bytes | None, tmp_path: Path) -> None:
    file = saved("bert", tmp_path / "bert") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(plmcc.PlmccError, match="PLM401"):
        load_source(file.parent)


def test_a_new_head_and_a_dropped_one_are_mentioned(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    notes = " ".join(load_source(model, "text-classification").notes)
    assert "starts with new, random tensors" in notes
    assert "classifier.weight" in notes
    assert "drops" in notes
    assert load_source(model).notes == ()


def test_a_broken_tokenizer_is_not_ignored(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(plmcc.PlmccError, match="tokenizer"):
        load_source(model)


@pytest.mark.parametrize(
    ("name", "hint"), [("bort", "bert"), ("bert/config.json", "directory"), ("./x/y", "")]
)
def test_a_wrong_path_is_refused_before_the_hub_is_asked(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("bert", tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plmcc.PlmccError, match=f"PLM401(.|\n)*{hint}"):
        load_source(name)


def test_a_name_of_nothing_is_no_question_of_connections_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(name: str, **_: object) -> None:
        raise OSError(f"cannot connect to load {name}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plmcc.models.source.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(plmcc.PlmccError, match="no such directory, or model of the hub: cannot"):
        load_source("nowhere")


def test_limits_of_encoder_and_decoder_may_differ() -> None:
    sizes: dict[str, Any] = {
        "d_model": 32,
        "vocab_size": 99,
        "attention_window": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 16,
    }
    config = transformers.LEDConfig(**sizes)
    assert [positions_of(config, part) for part in ("encoder", "decoder", "")] == [64, 16, 16]
    model = transformers.LEDForConditionalGeneration(config)
    assert Source.of(model).max_length(128) == 16
    model.generation_config.eos_token_id = 98
    assert len(generated(model, [[5, 6, 7, 2]], 1, 100)[0]) == 15  # the start token is the first


def test_a_teacher_of_another_vocabulary_is_refused_before_rewriting(
    rows: Path, tmp_path: Path
) -> None:
    teacher = tiny("bert")
    teacher.resize_token_embeddings(120)
    teacher.save_pretrained(tmp_path / "teacher")
    distill = plmcc.Distill(teacher=str(tmp_path / "teacher"), hidden_states=1.0)
    recipe = plmcc.Recipe(passes=[CODES], train=train(rows, distill=distill))
    said: list[str] = []
    with pytest.raises(plmcc.PlmccError, match="another vocabulary"):
        plmcc.apply(recipe, saved("bert", tmp_path / "bert"), tmp_path / "out", log=said.append)
    assert not any("rewriting" in line for line in said)


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs"])
def test_a_training_without_a_step_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}: 0` changes nothing"):
        plmcc.Train(data=plmcc.Data(train="rows.csv"), arguments={name: 0})


def test_rows_without_text_are_counted_and_class_names_understood(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nw1 w2,LABEL_1\n,LABEL_0\nw3,LABEL_0\nw4 w5,LABEL_1\n")
    recipe = plmcc.Recipe(task="text-classification", passes=[CODES], train=train(file))
    said: list[str] = []
    model = saved("bert", tmp_path / "bert")
    plmcc.apply(recipe, model, tmp_path / "out", log=said.append)
    assert any("1 rows of" in line for line in said)


def test_the_output_may_not_lie_in_the_model(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    with pytest.raises(plmcc.PlmccError, match="is inside"):
        plmcc.apply(plmcc.Recipe(passes=[CODES]), model, model / "out")


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    for name in ("one", "two"):
        plmcc.apply(plmcc.Recipe(passes=[CODES]), model, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    kept = [(folder / "tokenizer.json").read_bytes() for folder in (model, tmp_path / "one")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RobertaModel", {"pad_token_id": 1}),
        ("CamembertModel", {"pad_token_id": 1}),
        ("MPNetModel", {"pad_token_id": 1}),
        ("BertModel", {"pad_token_id": 0}),
        ("GPT2Model", {"n_positions": 20, "n_embd": 32, "n_layer": 1, "n_head": 2}),
        ("OPTModel", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("BartModel", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
        ("MarianModel", {"d_model": 32, "encoder_layers": 1, "pad_token_id": 0}),
    ],
)
def test_positions_are_those_of_the_table(kind: str, options: dict[str, Any]) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 20}
    given = options if "d_model" in options or "n_embd" in options else sizes | options
    given = {"max_position_embeddings": 20, "vocab_size": 99} | given
    config = getattr(transformers, kind).config_class(**given)
    model = getattr(transformers, kind)(config).eval()
    limit = positions_of(model)
    assert limit is not None

    def read(length: int) -> None:
        ids = torch.full((1, length), 5)
        more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)

    read(limit)
    with pytest.raises((IndexError, RuntimeError)):
        read(limit + 1)


def test_a_classifier_without_padding_gets_the_same_in_model_and_tokenizer(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2}
    sizes |= {"n_positions": 40, "num_labels": 3, "pad_token_id": None}
    config = transformers.GPT2Config(**sizes)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    words(pad=False).save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.csv"
    rows.write_text(f"text,label\n{ROWS}\n")
    metric = plmcc.Evaluate(metric="accuracy", data=str(rows))
    recipe = plmcc.Recipe(passes=[CODES], train=train(rows), evaluate=[metric])
    result = plmcc.apply(recipe, tmp_path / "model", tmp_path / "out")
    assert "both get `[SEP]`" in " ".join(result.source.notes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plmcc.load(tmp_path / "out").config.pad_token_id == tokenizer.pad_token_id == 2


def test_a_dollar_in_a_name_is_no_variable(tmp_path: Path) -> None:
    for name in ("data$HOME.txt", "data1.txt", "data[1].txt"):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "$HOME").mkdir()
    (tmp_path / "$HOME" / "rows.csv").write_text("text,label\na,1\n")
    assert load_rows(str(tmp_path / "data$HOME.txt")).texts() == ["data$HOME.txt"]
    found = load_rows(str(tmp_path / "data*.txt")).texts()
    assert sorted(found) == ["data$HOME.txt", "data1.txt", "data[1].txt"]
    assert load_rows(str(tmp_path / "$HOME" / "rows.csv")).texts() == ["a"]


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    file = folder / "train[1].txt"
    file.write_text("\ufeffw1 w2\nw3\n", encoding="utf-8")
    (folder / "train1.txt").write_text("w9\n")
    assert load_rows(str(file)).texts() == ["w1 w2", "w3"]


def test_a_checkpoint_that_another_library_quantized_is_refused(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    tiny("llama").save_pretrained(tmp_path / "plain")
    words().save_pretrained(tmp_path / "model")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    quantized.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2\n" * 9)
    text = f"plmcc: 1\npasses: [{{prune_vocabulary: {{text: {tmp_path}/text.txt}}}}]\n"
    with pytest.raises(PlmccError, match=r"quantized already \(torchao\)"):
        plmcc.apply(parse_recipe(text, load_torch=True), tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
