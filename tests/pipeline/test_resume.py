from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from plmcc.cli.apply import apply as apply_command
from plmcc.diagnostics import PlmccError
from plmcc.pipeline import compiler
from plmcc.pipeline.cache import folder_of
from plmcc.recipe.load import load_recipe
from support.tiny_models import tiny
from support.tokenizers import words

ROOT = Path(__file__).parents[1]
TRAIN = """
    train:
      data: {train: text.txt}
      arguments: {max_steps: 16, save_strategy: steps, save_steps: 3, learning_rate: 1.0e-3,
                  per_device_train_batch_size: 16, disable_tqdm: true}
"""
KILLED = f"""\
plmcc: 1
name: killed
task: fill-mask
stages:
  - name: codes
    passes: [{{compositional_codes: {{codebooks: 4, codewords: 8, rounds: 1}}}}]{TRAIN.rstrip()}
      average_last: 3
      distill: {{teacher: original, logits: 1.0}}
  - name: prune
    passes:
      - movement_pruning: {{granularity: hybrid, density: 0.5, scope: global, warmup: 0.3,
                           initialization: sensitivity}}{TRAIN}"""
STAGES = """\
plmcc: 1
name: three
task: fill-mask
stages:
  - {name: one, passes: [{drop_layers: {targets: encoder, keep: 1}}]}
  - {name: two, passes: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}}]}
  - {name: three, passes: [{movement_pruning: {method: magnitude, density: 0.5}}]}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    draw = random.Random(1)
    lines = (
        " ".join(f"w{draw.randrange(94)}" for _ in range(draw.randint(3, 12))) for _ in range(120)
    )
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmcc.artifact.verify.in_fresh_process", lambda _: 0.0)
    monkeypatch.setattr("plmcc.report.documents.page", lambda *_: "")


def apply(model: Path, text: str, **options: Any) -> list[str]:
    """Apply to `out`, and return what was said."""
    said: list[str] = []
    file = model.parent / "recipe.yaml"
    file.write_text(text)
    out = model.parent / "out"
    compiler.apply(
        load_recipe(file, load_torch=True), model, out, base=file.parent, log=said.append, **options
    )
    return said


def again(said: list[str]) -> list[str]:
    return [line.split()[1].rstrip(":") for line in said if "in an earlier run" in line]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forks")
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(model: Path) -> None:
    file = model.parent / "recipe.yaml"
    file.write_text(KILLED)
    command = [
        sys.executable,
        "-P",  # support/tokenizers.py is not the library
        str(ROOT / "support/kill_and_resume.py"),
        *map(str, (file, model, model.parent, 10)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = [one["left"] for one in found["tries"] if one["digest"] != found["calm"]]
    assert not wrong
    assert len({one["left"] for one in found["tries"]}) > 3  # they were killed at different places


def test_a_changed_stage_and_what_follows_it_are_done_again(model: Path) -> None:
    said = apply(model, STAGES)
    assert again(said) == []
    assert any("kept for `--resume` in" in line and line.endswith(("kB", "MB")) for line in said)
    changed = STAGES.replace("density: 0.5", "density: 0.4")
    assert again(apply(model, changed, resume=True, overwrite=True)) == ["one", "two"]
    changed = changed.replace("codewords: 8", "codewords: 4")
    assert again(apply(model, changed, resume=True, overwrite=True)) == ["one"]
    assert again(apply(model, STAGES, resume=True, overwrite=True)) == ["one", "two", "three"]


def test_other_weights_and_other_data_find_nothing_again(model: Path) -> None:
    text = STAGES.replace(
        "rounds: 0}}]",
        "rounds: 0}}]" + ", train: " + "{data: {train: text.txt}, arguments: {max_steps: 1}}",
    )
    apply(model, text)
    assert again(apply(model, text, resume=True, overwrite=True)) == ["one", "two", "three"]
    data = model.parent / "text.txt"
    data.write_text(data.read_text().replace("w1", "w2"))
    assert (
        again(apply(model, text, resume=True, overwrite=True)) == []
    )  # shown to the first one too
    other = tiny("bert")
    other.base_model.embeddings.LayerNorm.bias.data += 1  # type: ignore[union-attr, operator]
    other.save_pretrained(model)
    assert again(apply(model, text, resume=True, overwrite=True)) == []


def test_who_interrupts_hears_of_resuming(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = model.parent / "recipe.yaml", model.parent / "out"
    file.write_text(STAGES)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plmcc.pipeline.compiler.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_command(file, str(model), out)
    assert "the same command with --resume continues here" in capsys.readouterr().err


def test_what_was_cut_off_is_not_thrown_away_unasked(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlmccError):  # the third stage fails
        apply(model, STAGES.replace("method: magnitude", "method: magnitude, expect: 5000"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlmccError, match="add --resume to continue it, or --overwrite") as caught:
        apply(model, STAGES)
    assert caught.value.diagnostics[0].code == "PLM503"
    assert again(apply(model, STAGES, resume=True)) == ["one", "two"]
    assert again(apply(model, STAGES, overwrite=True)) == []


def test_a_run_that_fails_at_once_leaves_nothing(model: Path) -> None:
    text = KILLED.replace("disable_tqdm: true", "disable_tqdm: true, report_to: nobody")
    with pytest.raises(PlmccError, match="the Trainer rejects its arguments"):
        apply(model, text)
    assert not folder_of(model.parent / "out").exists()


def test_a_tracker_that_is_not_installed_is_a_sentence(model: Path) -> None:
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        pytest.skip("there is a tensorboard here")
    text = KILLED.replace("disable_tqdm: true", "disable_tqdm: true, report_to: tensorboard")
    with pytest.raises(PlmccError, match=r"rejects its arguments: .*requires tensorboard"):
        apply(model, text)


def test_a_single_stage_leaves_nothing_beside_its_result(model: Path) -> None:
    apply(
        model, STAGES.split("stages:")[0] + "passes: [{drop_layers: {targets: encoder, keep: 1}}]\n"
    )
    assert not folder_of(model.parent / "out").exists()


def test_damaged_work_is_an_error(model: Path) -> None:
    apply(model, STAGES)
    (file,) = (
        f
        for f in folder_of(model.parent / "out").glob("*/stage.json")
        if "movement_pruning" in f.read_text()
    )
    file.write_text(file.read_text()[:-20])
    with pytest.raises(PlmccError, match=r"(?s)cannot be read.*instead of --resume"):
        apply(model, STAGES, resume=True, overwrite=True)


@pytest.mark.parametrize("text", [STAGES, KILLED], ids=["a stage", "a checkpoint"])
def test_a_full_disk_is_a_sentence_and_loses_nothing(model: Path, text: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(PlmccError, match=r"(?s)cannot be written.*--resume continues"):
            apply(model, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (model.parent / "out").exists()
    assert not list(model.parent.glob(".out.unfinished-*"))
    apply(model, STAGES, resume=True)


LIMITED = """\
import resource, sys
import datasets, torch, transformers
import plmcc.pipeline.compiler, plmcc.report.documents, plmcc.utils.terminal
from plmcc.cli.app import main
torch.set_num_threads(1)
(pages,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (int(pages) * 1024 + 400_000_000,) * 2)
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_too_little_memory_is_a_sentence(model: Path) -> None:
    file = model.parent / "recipe.yaml"
    settings = "{max_steps: 1, per_device_train_batch_size: 20000, disable_tqdm: true}"
    file.write_text(
        "plmcc: 1\npasses: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}}]\n"
        "train:\n  data: {train: synthetic, synthetic: {sequences: 20000, length: 40}}\n"
        f"  distill: {{logits: 1.0}}\n  arguments: {settings}\n"
    )
    command = [sys.executable, "-c", LIMITED, "apply", str(file), str(model), "-o"]
    command.append(str(model.parent / "out"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "error PLM504: out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (model.parent / "out").exists()
