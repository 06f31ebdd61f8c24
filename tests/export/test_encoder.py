"""Encoders exported to onnxruntime, AOTInductor and ExecuTorch: the numbers of the model, any batch
and length, tables that stay coded."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import plmcc
from plmcc.diagnostics import PlmccError
from plmcc.export import exporter as export
from plmcc.export import proof as export_check
from plmcc.export.manifest import MANIFEST
from plmcc.models.source import Source
from plmcc.recipe.load import parse_recipe
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers has exporters from 5.23 on",
)

ROWS, WIDTH, LONGEST = 20_000, 32, 48
DENSE = 4 * ROWS * WIDTH
SHAPES = ((1, 1), (1, LONGEST), (4, 7), (3, 20))
RECIPE = """
plmcc: 1
task: question-answering
passes: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0, beam: 1}}]
lower: {to: [onnx]}
"""


def config(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        **more,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader of questions with a coded table; in it the folder `onnx` that its recipe wants."""
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config()).eval()
    source = Source(model, "question-answering", "tiny", words())
    folder = tmp_path_factory.mktemp("export") / "artifact"
    plmcc.apply(parse_recipe(RECIPE, load_torch=True), source, folder)
    return folder


@pytest.fixture(scope="module")
def compiled(artifact: Path) -> Path:
    target = artifact.parent / "aoti"
    done = run("export", artifact, "-o", target)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]
    assert said == []  # a torch with CUDA says that there is none
    assert "outputs in a fresh process: " in done.stdout
    assert "machine code" in done.stdout
    return target


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", arguments)


def batch(rows: int, length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(0, ROWS, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    mask[-1, max(1, length - 3) :] = 0
    types = torch.randint(0, 2, (rows, length), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@torch.no_grad()
def check_same(folder: Path, call: Callable[[dict[str, Tensor]], Any]) -> None:
    """Compare with the artifact, as transformers runs it."""
    model = plmcc.load(folder)
    for shape in SHAPES:
        inputs = batch(*shape)
        expected, found = model(**inputs), call(inputs)
        assert set(found) == {"start_logits", "end_logits"}
        for name, value in found.items():
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(value[real], expected[name][real], atol=1e-5, rtol=1e-4)


def test_onnxruntime_computes_the_models_numbers(artifact: Path) -> None:
    # As a user does, without plmcc.
    file = artifact / "onnx" / "model.onnx"
    session = importlib.import_module("onnxruntime").InferenceSession(file)
    names = [port.name for port in session.get_outputs()]
    assert [port.shape for port in session.get_inputs()] == [["batch", "length"]] * 3

    def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    check_same(artifact, call)
    assert file.stat().st_size < DENSE / 4


def test_an_artifact_with_an_export_is_verified_and_opened(artifact: Path) -> None:
    model = plmcc.Exported(artifact / "onnx")
    check_same(artifact, lambda inputs: model(**inputs))
    done = run("verify", artifact)
    assert done.returncode == 0, done.stderr


def test_machine_code_computes_the_models_numbers(artifact: Path, compiled: Path) -> None:
    model = plmcc.Exported(compiled)
    check_same(artifact, lambda inputs: model(**inputs))
    assert (compiled / "model.pt2").stat().st_size < DENSE  # machine code included
    ids = batch(2, 6)["input_ids"]
    alone = model(ids)["end_logits"]
    whole = model(ids.int(), torch.ones_like(ids), torch.zeros_like(ids))["end_logits"]
    assert torch.equal(alone, whole)


def test_the_manifest(artifact: Path, compiled: Path) -> None:
    values = json.loads((compiled / MANIFEST).read_text())
    digests = json.loads((artifact / "plmcc.lock.json").read_text())["files"]
    for name in ("config.json", "model.safetensors"):
        assert values["source"][name] == digests[name]
    assert [port["name"] for port in values["outputs"]] == ["start_logits", "end_logits"]
    assert values["inputs"][0] == {
        "name": "input_ids",
        "dtype": "int64",
        "shape": ["batch", "length"],
        "values": ROWS,
    }
    assert values["dimensions"] == {"batch": [1, None], "length": [2, LONGEST]}
    assert 0 <= values["difference"] < 1e-4
    assert {"model.pt2", "tokenizer.json", "probes.safetensors"} <= set(values["files"])


def test_an_export_runs_without_transformers(compiled: Path) -> None:
    code = (
        "import sys, torch, plmcc\n"
        f"model = plmcc.Exported({str(compiled)!r})\n"
        "print(model(torch.tensor([[5, 6, 7]]))['end_logits'].shape)\n"
        "print(any('transformers' in name for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["torch.Size([1, 3])", "False"], done.stderr


def test_what_an_export_refuses(compiled: Path, tmp_path: Path) -> None:
    model, ids = plmcc.Exported(compiled), torch.ones(2, 5, dtype=torch.long)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(ids * ROWS), "got: 20000 to 20000\n  allowed: 0 to 19999"),
        (lambda: model(ids[:0]), "got: none"),
        (lambda: model(ids.float()), "these are not token ids"),
        (lambda: model(ids, ids[:1]), "`attention_mask` does not have the shape"),
        (lambda: model(ids, ids, ids * 2), "`token_type_ids` is out of range\n  got: 2 to 2"),
        (lambda: model(ids[:, :1].expand(2, 49)), "got: 49\n  allowed: at most 48"),
        (lambda: model.generate(ids), "this model does not translate\n  hint: call the export it"),
        (lambda: model.search, "this model does not translate"),
    ]
    for action, message in cases:
        with pytest.raises(PlmccError, match=message):
            action()
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    with (copy / "model.pt2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PlmccError, match=r"model.pt2: error PLM402: the file was changed after it"):
        plmcc.Exported(copy)


def test_a_program_that_computes_something_else_is_an_error(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact / "onnx", copy)
    probes = load_file(copy / "probes.safetensors")
    probes["2.output.end_logits"][0, 3] += 1
    save_file(probes, copy / "probes.safetensors")
    with pytest.raises(PlmccError, match=r"PLM402: the program differs by .* from the model"):
        export_check.prove(copy, rough=False)


def test_probes_of_the_artifact_count(artifact: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "export", plmcc.load(artifact)
    folder.mkdir()
    export_check.record(model, folder, artifact)
    recorded = load_file(artifact / "probes.safetensors")
    found = load_file(folder / "probes.safetensors")
    assert torch.equal(found["0.input_ids"], recorded["input.input_ids"])
    assert torch.equal(found["0.output.start_logits"], recorded["output.output"])


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_encoder", fail)
    model = BertForSequenceClassification(config())
    with pytest.raises(PlmccError, match="PLM501: the export cannot be written: No space left"):
        export.export_model(model, words(), tmp_path / "out", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_code_that_torch_cannot_export_is_a_sentence(tmp_path: Path) -> None:
    model: Any = BertForSequenceClassification(config())
    model.bert.pooler.register_forward_hook(lambda *a: a[2] * float(a[2].sum()))  # looks at values
    with pytest.raises(PlmccError, match="BertForSequenceClassification cannot be exported to ao"):
        export.export_model(model, None, tmp_path / "out", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("export", tmp_path / "none", "--to", "onxx", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == (
        "--to: error PLM502: there is no such target\n  got: onxx\n"
        "  allowed: aoti, onnx, executorch, dense\n  hint: did you mean `onnx`?\n"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for to, names in (("onnx", "onnx onnxscript onnxruntime"), ("executorch", "executorch")):
        with pytest.raises(PlmccError) as caught:
            export.export_directory("none", tmp_path / "out", to)
        hint = f"pip install {names}, or plmcc with the extra `{to}`"
        assert [(d.code, d.hint) for d in caught.value.diagnostics] == [("PLM303", hint)]
    assert list(tmp_path.iterdir()) == []


def test_models_that_no_program_is_made_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    for name, to in (("gpt2", "aoti"), ("bart", "onnx"), ("whisper", "aoti")):
        with pytest.raises(PlmccError, match=f"does not go to {to}: only encoders of text"):
            export.export_model(tiny(name), None, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_int8_by_onnxruntime(artifact: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=3)).eval()
    made = export.export_model(model, words(), tmp_path / "out", "onnx", int8=True)
    assert made.difference is not None
    assert 1e-4 < made.difference < 0.1
    found = plmcc.Exported(tmp_path / "out")(**batch(3, 9))
    assert found["logits"].shape == (3, 3)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_tensors_of_a_large_model_go_into_a_second_onnx_file(
    int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plmcc.export.onnx._LARGEST", 0)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=3)).eval()
    export.export_model(model, words(), tmp_path / "out", "onnx", int8=int8)
    [beside] = (tmp_path / "out").glob("*.data")
    assert beside.stat().st_size > 0
    values = json.loads((tmp_path / "out/manifest.json").read_text())
    assert beside.name in values["files"]
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    found = plmcc.Exported(tmp_path / "elsewhere")(**batch(3, 9))
    assert found["logits"].shape == (3, 3)
    beside = tmp_path / "elsewhere" / beside.name
    beside.write_bytes(beside.read_bytes()[:-8])
    with pytest.raises(PlmccError, match="PLM402"):
        plmcc.Exported(tmp_path / "elsewhere")


def test_executorch_computes_the_models_numbers(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs the extra `executorch`")
    done = run("export", artifact, "--to", "executorch", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]
    assert said == []  # a torch with CUDA says that there is none
    model = plmcc.Exported(tmp_path / "out")
    check_same(artifact, lambda inputs: model(**inputs))
    with pytest.raises(PlmccError, match="the batch is larger than the program supports"):
        model(batch(9, 3)["input_ids"])
    assert (tmp_path / "out" / "model.pte").stat().st_size < DENSE / 4
