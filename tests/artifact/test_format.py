"""Artifacts that are damaged, foreign, saved again or loaded by another class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel

import plmcc
from plmcc import Pipeline, PlmccError
from plmcc.api import Layout
from plmcc.artifact import verify
from plmcc.ir.probes import probe_inputs
from plmcc.passes.compositional_codes import CodedEmbedding, CompositionalCodes
from plmcc.rewrite import Record, View, build
from support.tiny_models import inputs, tiny

Change = Callable[[dict[str, Any]], object]
TABLE = "bert.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    model = compressed("bert")
    model.save_pretrained(folder)
    verify.record(model, folder)
    return folder


def compressed(name: str) -> PreTrainedModel:
    chosen = CompositionalCodes(codebooks=2, codewords=4, beam=2, rounds=1)
    return Pipeline([chosen])(tiny(name))


def copied(artifact: Path, target: Path) -> Path:
    return shutil.copytree(artifact, target / "copy")


def with_config(artifact: Path, target: Path, change: Change) -> Path:
    folder = copied(artifact, target)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return folder


def with_record(artifact: Path, target: Path, change: Change) -> Path:
    return with_config(artifact, target, lambda v: change(v["quantization_config"]["modules"][0]))


def with_tensors(artifact: Path, target: Path, change: Change) -> Path:
    folder = copied(artifact, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def every_loader(folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: plmcc.load(folder),
        lambda: AutoModel.from_pretrained(folder),
        lambda: AutoModelForMaskedLM.from_pretrained(folder),
        lambda: transformers.BertForMaskedLM.from_pretrained(folder),
        lambda: transformers.BertModel.from_pretrained(folder),
    ]


def assert_refused(folder: Path, words: str) -> None:
    for load in every_loader(folder):
        with pytest.raises(PlmccError, match=words) as caught:
            load()
        assert {d.code for d in caught.value.diagnostics} <= {"PLM401", "PLM402"}


def test_the_undamaged_artifact_loads_everywhere(artifact: Path) -> None:
    for load in every_loader(artifact):
        model = load()
        assert isinstance(model, PreTrainedModel)
        assert isinstance(model.get_input_embeddings(), CodedEmbedding)


# --- damaged weights


@pytest.mark.parametrize("name", ["codes", "codebooks"])
def test_a_missing_tensor(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = with_tensors(artifact, tmp_path, lambda t: t.pop(f"{TABLE}.{name}"))
    assert_refused(folder, f"the tensor {name} of shape .* is not in the weight file")


def test_no_tensors_of_ours_at_all(artifact: Path, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "plain")
    folder = copied(artifact, tmp_path)
    shutil.copyfile(tmp_path / "plain" / "model.safetensors", folder / "model.safetensors")
    assert_refused(folder, "is not in the weight file")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", torch.zeros(99, 2, dtype=torch.uint8)),
        ("codes", torch.zeros(98, 1, dtype=torch.uint8)),
        ("codebooks", torch.zeros(9, 32)),
        ("codebooks", torch.zeros(8, 31)),
        ("codebooks", torch.zeros(256)),
    ],
)
def test_a_tensor_of_the_wrong_shape(
    artifact: Path, tmp_path: Path, name: str, value: Tensor
) -> None:
    folder = with_tensors(artifact, tmp_path, lambda t: t.update({f"{TABLE}.{name}": value}))
    assert_refused(folder, f"the tensor {name} of shape .* is not in the weight file")


def test_a_truncated_weight_file(artifact: Path, tmp_path: Path) -> None:
    folder = copied(artifact, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for load in every_loader(folder):
        with pytest.raises(Exception, match=r"(?i)incomplete|invalid|corrupt|damaged|header"):
            load()


def test_a_missing_weight_file(artifact: Path, tmp_path: Path) -> None:
    folder = copied(artifact, tmp_path)
    (folder / "model.safetensors").unlink()
    for load in every_loader(folder):
        with pytest.raises((OSError, PlmccError)):
            load()


# --- damaged records


@pytest.mark.parametrize(
    "kind",
    [
        "Linear",
        "__import__",
        "Hard",
        "CompositionalCodes",
        "Trainable",
        "nn",
        "",
        "torch.nn.Linear",
    ],
)
def test_a_class_that_is_no_module_of_the_pass(artifact: Path, tmp_path: Path, kind: str) -> None:
    folder = with_record(artifact, tmp_path, lambda record: record.update({"class": kind}))
    assert_refused(folder, "has no module class")


@pytest.mark.parametrize("name", ["compositional_code", "os", "../evil", "_bits", ""])
def test_an_unknown_pass(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = with_record(artifact, tmp_path, lambda record: record.update({"pass": name}))
    for load in every_loader(folder):
        with pytest.raises(PlmccError):
            load()


@pytest.mark.parametrize(
    "layout",
    [
        {"codebooks": 3},
        {"codewords": 16},
        {"num_embeddings": 98},
        {"num_embeddings": 10**12},
        {"embedding_dim": 33},
        {"num_embeddings": -1},
        {"codebooks": "2"},
        {"codebooks": None},
        {"codebooks": 2.5},
        {"surprise": 1},
        {"codebooks": 0},
        {"embedding_dim": 10**30},
    ],
    ids=str,
)
def test_a_wrong_layout(artifact: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = with_record(artifact, tmp_path, lambda record: record["layout"].update(layout))
    assert_refused(folder, "rejects its layout|is not in the weight file|much larger than")


@pytest.mark.parametrize("key", ["pass", "paths", "roles", "class", "layout", "removed"])
def test_a_record_without_a_key(artifact: Path, tmp_path: Path, key: str) -> None:
    assert_refused(with_record(artifact, tmp_path, lambda record: record.pop(key)), "malformed")


@pytest.mark.parametrize(
    "change",
    [{"paths": []}, {"roles": ["embedding"]}, {"layout": 3}, {"layout": None}, {"paths": 1}],
)
def test_a_record_of_wrong_values(artifact: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = with_record(artifact, tmp_path, lambda record: record.update(change))
    assert_refused(folder, "record")


def test_a_module_path_that_is_not_there(artifact: Path, tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["paths"][0] = "bert.embeddings.wrod_embeddings"

    folder = with_record(artifact, tmp_path, change)
    assert_refused(folder, "has no module|removed the tensor")


def test_a_removed_tensor_without_its_record(artifact: Path, tmp_path: Path) -> None:
    """transformers 5.17 would leave the table empty."""
    folder = with_config(artifact, tmp_path, lambda v: v["quantization_config"].update(modules=[]))
    assert_refused(folder, "removed the tensor")


@pytest.mark.parametrize(
    "values",
    [
        {"format": 99},
        {"format": 0},
        {"format": "1"},
        {"modules": 3},
        {"modules": None},
        {"modules": {}},
        {"modules": [3]},
        {"modules": [{}]},
    ],
    ids=str,
)
def test_a_wrong_quantization_config(
    artifact: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = with_config(artifact, tmp_path, lambda v: v["quantization_config"].update(values))
    assert_refused(folder, "format|malformed")


def test_a_config_that_hides_its_modules(artifact: Path, tmp_path: Path) -> None:
    """The original table is missing from the file: it must not be made up."""
    folder = with_config(
        artifact, tmp_path, lambda v: v["quantization_config"].update({"modules": []})
    )
    for load in every_loader(folder):
        with pytest.raises((PlmccError, RuntimeError)):
            load()


def test_a_config_without_quantization(artifact: Path, tmp_path: Path) -> None:
    folder = with_config(artifact, tmp_path, lambda v: v.pop("quantization_config"))
    for load in every_loader(folder):
        with pytest.raises((PlmccError, RuntimeError)):
            load()


@pytest.mark.parametrize("base", [None, "no_such_model", "plmcc", "", 3])
def test_a_wrong_base_type(artifact: Path, tmp_path: Path, base: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        values.pop("base_model_type") if base is None else values.update(base_model_type=base)

    folder = with_config(artifact, tmp_path, change)
    for load in every_loader(folder)[:3]:
        with pytest.raises(PlmccError, match="base_model_type"):
            load()


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_a_config_that_is_no_config(artifact: Path, tmp_path: Path, text: str) -> None:
    folder = copied(artifact, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(PlmccError) as caught:
        plmcc.load(folder)
    assert caught.value.diagnostics[0].code == "PLM401"


def test_loading_runs_no_code_of_the_artifact(artifact: Path, tmp_path: Path) -> None:
    folder = with_config(
        artifact,
        tmp_path,
        lambda v: v.update(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}),
    )
    (folder / "evil.py").write_text("raise SystemExit('the code of the artifact was run')")
    assert isinstance(plmcc.load(folder).get_input_embeddings(), CodedEmbedding)


# --- things that are no artifacts


def test_a_plain_model_is_no_artifact(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(PlmccError, match="was not written by plmcc"):
        plmcc.load(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), transformers.BertModel)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlmccError) as caught:
        plmcc.load(tmp_path / name)
    assert caught.value.diagnostics[0].code == "PLM401"


# --- loading, saving again, other heads


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("loader", range(5))
def test_saving_again_keeps_the_format(artifact: Path, tmp_path: Path, loader: int) -> None:
    model: Any = every_loader(artifact)[loader]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("plmcc", "bert")
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("plmcc", 1)
    assert [record["class"] for record in quantization["modules"]] == ["CodedEmbedding"]
    removed = load_file(tmp_path / "model.safetensors")
    assert [key for key, value in removed.items() if value.numel() == 0] == [
        next(key for key in removed if key.endswith("word_embeddings.weight"))
    ]
    assert same(type(model).from_pretrained(tmp_path), model)
    bare = AutoModel.from_pretrained(tmp_path)
    assert same(bare.encoder, getattr(model, "bert", model).encoder)
    assert same(bare.embeddings, getattr(model, "bert", model).embeddings)


def test_saving_in_shards(artifact: Path, tmp_path: Path) -> None:
    model = plmcc.load(artifact)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(plmcc.load(tmp_path), model)


def test_a_config_reads_as_its_base(artifact: Path) -> None:
    config = AutoConfig.from_pretrained(artifact)
    assert isinstance(config, transformers.BertConfig)
    assert config.to_dict()["model_type"] == "bert"  # by which peft looks up its defaults
    assert json.loads(config.to_json_string())["model_type"] == "plmcc"
    assert type(config).__name__ == "BertConfig"


@pytest.mark.parametrize(
    "kind",
    ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"],
)
def test_other_heads_on_the_same_artifact(artifact: Path, tmp_path: Path, kind: str) -> None:
    whole, other = plmcc.load(artifact), getattr(transformers, kind).from_pretrained(artifact)
    with torch.no_grad():
        models: list[Any] = [whole, other]
        one, two = (m.bert(**inputs("bert")).last_hidden_state for m in models)
    assert torch.equal(one, two)
    other.save_pretrained(tmp_path)
    assert same(plmcc.load(tmp_path), other)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModelForMaskedLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("albert", "AutoModelForMaskedLM"),
        ("mbart", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_base_artifact_under_a_head_is_tied(tmp_path: Path, name: str, auto: str) -> None:
    base: Any = compressed(name).base_model
    base.save_pretrained(tmp_path)
    model = getattr(transformers, auto).from_pretrained(tmp_path)
    head = model.get_output_embeddings()
    assert isinstance(head, View)
    width = head.weight.shape[1]
    hidden, table = torch.randn(2, width), base.get_input_embeddings()
    bias = 0 if head.bias is None else head.bias
    torch.testing.assert_close(head(hidden), hidden @ table.weight.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(artifact: Path, dtype: torch.dtype) -> None:
    model, whole = plmcc.load(artifact, dtype=dtype), plmcc.load(artifact)
    table, full = model.get_input_embeddings(), whole.get_input_embeddings()
    assert isinstance(table, CodedEmbedding)
    assert isinstance(full, CodedEmbedding)
    assert (table.codebooks.dtype, table.codes.dtype) == (dtype, torch.uint8)
    assert torch.equal(table.codes, full.codes)
    assert torch.equal(table.codebooks, full.codebooks.to(dtype))


def test_a_loaded_model_changes_its_dtype(artifact: Path) -> None:
    model = plmcc.load(artifact)
    assert model.half().dtype is torch.float16
    assert model.float().dtype is torch.float32


def test_a_head_of_its_own_stays_its_own(tmp_path: Path) -> None:
    model = compressed("t5_gated")
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    model.save_pretrained(tmp_path)
    for load in (plmcc.load, type(model).from_pretrained):
        again = load(tmp_path).get_output_embeddings()
        assert torch.equal(again.weight, head.weight)


# --- the proof


def test_the_artifact_repeats_its_probes(artifact: Path) -> None:
    assert verify.compare(artifact) <= 1e-6


@pytest.mark.parametrize(
    "name",
    [f"{TABLE}.codebooks", f"{TABLE}.codes", "bert.encoder.layer.1.output.dense.weight"],
)
def test_a_changed_weight_is_noticed(artifact: Path, tmp_path: Path, name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors[name]
        tensors[name] = values.roll(1, 0) if values.dtype == torch.uint8 else values * 1.05

    with pytest.raises(PlmccError, match="differs by"):
        verify.compare(with_tensors(artifact, tmp_path, change))


def test_other_tokens_are_noticed(tmp_path: Path) -> None:
    model = compressed("gpt2")
    model.save_pretrained(tmp_path)
    verify.record(model, tmp_path)
    assert verify.compare(tmp_path) <= 1e-6
    probes = load_file(tmp_path / verify.PROBES)
    probes["output.tokens"][0, -1] += 1
    save_file(probes, tmp_path / verify.PROBES)
    with pytest.raises(PlmccError, match="other tokens with cache"):
        verify.compare(tmp_path)


def test_nan_outputs_are_noticed(artifact: Path, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    folder = with_tensors(artifact, tmp_path, lambda t: t[name].fill_(float("nan")))
    with pytest.raises(PlmccError, match="differs by nan"):
        verify.compare(folder)


def test_an_artifact_without_probes_proves_nothing(artifact: Path, tmp_path: Path) -> None:
    folder = copied(artifact, tmp_path)
    (folder / verify.PROBES).unlink()
    with pytest.raises(PlmccError, match="no recorded outputs"):
        verify.compare(folder)


def test_a_fresh_process_says_what_is_wrong(artifact: Path, tmp_path: Path) -> None:
    folder = with_record(artifact, tmp_path, lambda record: record.update({"class": "Linear"}))
    with pytest.raises(PlmccError, match="no module class `Linear`"):
        verify.in_fresh_process(folder)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mbart", "whisper"])
def test_probing_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny(name).train()
    state = torch.get_rng_state()
    made = verify.outputs(model, probe_inputs(model))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert ("tokens" in made) == (name != "bert")
    assert made["output"].dtype == torch.float32


def test_a_record_names_only_classes_of_its_pass() -> None:
    layout: Layout = {"num_embeddings": 9, "embedding_dim": 4, "codebooks": 2, "codewords": 2}
    good = Record("compositional_codes", ("a",), ("embedding",), "CodedEmbedding", layout, ())
    assert isinstance(build(good), CodedEmbedding)
    for kind in ("Tensor", "CodeAutoencoder", "Module", "F"):
        with pytest.raises(PlmccError, match="no module class"):
            build(Record("compositional_codes", ("a",), ("embedding",), kind, layout, ()))
