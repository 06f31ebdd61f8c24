from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plmcc.artifact import lock as seal
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.pipeline import compiler
from plmcc.pipeline.reproduce import Metric, Reproduced, _contained, reproduce
from plmcc.recipe.load import load_recipe
from plmcc.report.provenance import data_digests
from plmcc.training.trainer import DistillingTrainer
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.attack

RECIPE = """\
plmcc: 1
name: again
task: fill-mask
stages:
  - {name: shorter, passes: [{drop_layers: {targets: encoder, keep: 1}}]}
  - name: codes
    passes: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}}]
    train:
      data: {train: text.txt}
      distill: {teacher: original, logits: 1.0}
      arguments: {max_steps: 2, per_device_train_batch_size: 8, disable_tqdm: true}
evaluate: [{metric: fidelity, data: text.txt}]
"""


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("plmcc.artifact.verify.in_fresh_process", lambda _: 0.0)
    monkeypatch.setattr("plmcc.report.documents.page", lambda *_: "")
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\n" * 12)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", load_torch=True)
    compiler.apply(recipe, tmp_path / "model", tmp_path / "small", base=tmp_path)
    return tmp_path / "small"


def test_the_lock_says_what_every_stage_was_given_and_made(artifact: Path) -> None:
    lock = seal.read(artifact)
    one, two = lock["stages"]
    assert (one["name"], one["passes"]) == ("shorter", ["drop_layers"])
    assert (two["name"], two["passes"]) == ("codes", ["compositional_codes"])
    assert one["output"] == two["input"]
    assert len({one["input"], one["output"], two["output"]}) == 3
    assert lock["data"].keys() == {"text.txt"}
    assert lock["metrics"][0]["metric"] == "fidelity"


def test_a_second_run_is_the_same_to_the_bit(artifact: Path, tmp_path: Path) -> None:
    arguments = [
        "reproduce",
        str(artifact),
        "--data-root",
        str(tmp_path),
        "--model",
        str(tmp_path / "model"),
    ]
    arguments += ["--format", "json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["identical"]
    assert found["metrics"][0]["then"] == found["metrics"][0]["now"]


def test_a_difference_is_found_where_it_begins(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = DistillingTrainer.compute_loss

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return -known(self, *args, **kwargs)

    monkeypatch.setattr(DistillingTrainer, "compute_loss", other)
    found = reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), tmp_path)
    assert not found.identical
    assert found.stage == "codes"
    assert 0 < found.difference < 1


def test_metrics_decide_where_bits_differ() -> None:
    near = Reproduced(False, 1e-3, "codes", [Metric("spearman", "sts.tsv", 80.0, 80.5)])
    assert near.within(0.5)
    assert not near.within(0.4)
    assert not Reproduced(False, 1e-3, "codes").within(0.4)  # nothing to tell by
    assert Reproduced(True, 0.0, "").within(0.0)


def test_other_data_and_another_original_are_told_before_anything_runs(
    artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlmccError, match=r"text.txt: error PLM301: the data does not exist"):
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"))
    text, config = tmp_path / "text.txt", tmp_path / "model/config.json"
    text.write_text("w1\n")
    config.write_text(config.read_text() + "\n")
    with pytest.raises(PlmccError) as caught:
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), tmp_path)
    told = [diagnostic.message for diagnostic in caught.value.diagnostics]
    assert told == ["config.json of the original has changed", "the data has changed"]
    assert not (tmp_path / "again").exists()


def test_a_changed_artifact_is_not_reproduced(artifact: Path, tmp_path: Path) -> None:
    (artifact / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(PlmccError, match="changed after it was written"):
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), tmp_path)


def resealed(artifact: Path, changes: dict[str, Any], recipe: str | None = None) -> None:
    """Change lock and recipe, and seal them again, as anyone can."""
    values = seal.read(artifact)
    if recipe is not None:
        (artifact / "recipe.yaml").write_text(recipe)
    seal.write(artifact, {**values, **changes})


def test_data_without_a_digest_is_not_read(artifact: Path, tmp_path: Path) -> None:
    resealed(artifact, {"data": {}})
    with pytest.raises(PlmccError, match="digest the lock does not have"):
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), tmp_path)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.txt", "sub/../../secret.txt", "~/x", "{outside}"]
)
@pytest.mark.parametrize("place", ["train: text.txt", "teacher: original", "data: text.txt"])
def test_nothing_outside_of_the_folder_of_the_data_is_read(
    name: str, place: str, artifact: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("w1 w2\n" * 24)
    (root / "text.txt").write_text((tmp_path / "text.txt").read_text())
    name = name.replace("{outside}", str(tmp_path / "secret.txt"))
    changed = RECIPE.replace(place, f"{place.partition(':')[0]}: {name}")
    data = seal.read(artifact)["data"] | {name: {name: seal.digest(tmp_path / "secret.txt")}}
    resealed(artifact, {"data": data, "models": {name: {"a": "b"}}}, changed)
    with pytest.raises(PlmccError) as caught:
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), root)
    told = str(caught.value)
    assert "outside of the directory of the data" in told
    assert name in told
    assert "--allow-outside" in told


def test_an_original_elsewhere_needs_consent(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(PlmccError, match="outside of the directory of the data"):
        reproduce(artifact, tmp_path / "again", data_root=tmp_path / "model")
    done = reproduce(artifact, tmp_path / "again", data_root=tmp_path, allow_outside=True)
    assert done.identical


def test_an_original_without_digests_has_to_be_named(artifact: Path, tmp_path: Path) -> None:
    base = seal.read(artifact)["base_model"]
    resealed(artifact, {"base_model": base | {"files": {}, "name": "model"}})
    with pytest.raises(PlmccError, match="does not say what the original was"):
        reproduce(artifact, tmp_path / "again", data_root=tmp_path)
    resealed(artifact, {"base_model": base | {"new": True}}, f"model: model\n{RECIPE}")
    with pytest.raises(PlmccError, match="does not make one"):
        reproduce(artifact, tmp_path / "again", data_root=tmp_path)


@pytest.mark.parametrize("changes", [{"stages": 3}, {"base_model": []}, {"metrics": [{"a": 1}]}])
def test_a_lock_of_another_form_is_an_error(
    changes: dict[str, Any], artifact: Path, tmp_path: Path
) -> None:
    resealed(artifact, changes)
    with pytest.raises(PlmccError, match="another version of plmcc wrote this"):
        reproduce(artifact, tmp_path / "again", str(tmp_path / "model"), tmp_path)


def test_what_a_recipe_writes_stays_in_a_temporary_folder(tmp_path: Path) -> None:
    text = RECIPE.replace("fill-mask", "translation").replace(
        "logits: 1.0}", f"sequence: {{cache: {tmp_path / 'elsewhere'}}}}}"
    )
    text = text.replace("max_steps: 2", "max_steps: 2, report_to: wandb, run_name: mine")
    text = text.replace("evaluate: [{metric: fidelity, data: text.txt}]", "")
    recipe = _contained(load_recipe(write(tmp_path, text)), tmp_path, tmp_path / "own")
    assert recipe.stages is not None
    train = recipe.stages[1].train
    assert train is not None
    assert train.distill is not None
    assert train.distill.sequence is not None
    assert train.distill.sequence.cache == str(tmp_path / "own")
    assert train.arguments["report_to"] == "none"
    assert "run_name" not in train.arguments


def test_files_are_known_by_their_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text(f"w1 w2 {folder}\n")
    text = RECIPE.replace("{train: text.txt}", "{train: ['*/train.txt']}")
    recipe = load_recipe(write(tmp_path, text), load_torch=True)
    found = data_digests(recipe, tmp_path)["*/train.txt"]
    assert found.keys() == {"a/train.txt", "b/train.txt"}
    assert len({*found.values()}) == 2


def test_data_that_changes_under_a_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\n" * 12)
    known = DistillingTrainer.compute_loss

    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        (tmp_path / "text.txt").write_text("w9\n")
        return known(self, *args, **kwargs)

    monkeypatch.setattr(DistillingTrainer, "compute_loss", changing)
    recipe = load_recipe(write(tmp_path, RECIPE), load_torch=True)
    with pytest.raises(PlmccError, match="the data has changed while the recipe ran"):
        compiler.apply(recipe, tmp_path / "model", tmp_path / "small", base=tmp_path)
    assert not (tmp_path / "small").exists()


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"
