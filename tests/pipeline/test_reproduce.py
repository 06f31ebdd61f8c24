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
from plmcc.pipeline.reproduce import Metric, Reproduced, reproduce
from plmcc.recipe.load import load_recipe
from plmcc.training.trainer import DistillingTrainer
from support.tiny_models import tiny
from support.tokenizers import words

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
    arguments = ["reproduce", str(artifact), "--base", str(tmp_path), "--format", "json"]
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
    found = reproduce(artifact, tmp_path / "again", base=tmp_path)
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
        reproduce(artifact, tmp_path / "again")
    text, config = tmp_path / "text.txt", tmp_path / "model/config.json"
    text.write_text("w1\n")
    config.write_text(config.read_text() + "\n")
    with pytest.raises(PlmccError) as caught:
        reproduce(artifact, tmp_path / "again", base=tmp_path)
    told = [diagnostic.message for diagnostic in caught.value.diagnostics]
    assert told == ["config.json of the original has changed", "the data has changed"]
    assert not (tmp_path / "again").exists()


def test_a_changed_artifact_is_not_reproduced(artifact: Path, tmp_path: Path) -> None:
    (artifact / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(PlmccError, match="changed after it was written"):
        reproduce(artifact, tmp_path / "again", base=tmp_path)
