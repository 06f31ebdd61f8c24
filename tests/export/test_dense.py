"""Artifacts as ordinary checkpoints: `export --to dense`, and results that are ones already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

import plmcc
from plmcc.artifact.stock import needs_plmcc
from plmcc.artifact.verify import first_output
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.ir.probes import probe_inputs
from plmcc.planning.plan import plan
from plmcc.recipe.load import Recipe, parse_recipe
from plmcc.utils.numerics import relative_difference
from support.tiny_models import tiny
from support.tokenizers import words

LOAD = """
import sys, json, torch, transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
assert "plmcc" not in sys.modules
print(json.dumps([model.config.model_type, sum(p.numel() for p in model.parameters())]))
"""
CODES = "compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}"
RECIPES = {
    "bert": [CODES, "quantized_linears"],
    "gpt2": [CODES, "low_rank: {rank: 4, weighting: none}"],
    "t5": [CODES, "quantized_linears: {scheme: int8}"],
    "mbart": [CODES],
    "llama": ["share_layers"],
}


def recipe(*passes: str) -> Recipe:
    text = "plmcc: 1\npasses:\n" + "".join(f"  - {one}\n" for one in passes)
    return parse_recipe(text, load_torch=True)


def saved(name: str, folder: Path) -> Path:
    tiny(name).save_pretrained(folder / name)
    words().save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("name", RECIPES)
def test_an_artifact_becomes_a_checkpoint_that_transformers_loads_alone(
    name: str, tmp_path: Path
) -> None:
    result = plmcc.apply(recipe(*RECIPES[name]), saved(name, tmp_path), tmp_path / "small")
    assert needs_plmcc(result.model)
    given = ["export", str(tmp_path / "small"), "--to", "dense", "-o", str(tmp_path / "dense")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.exception
    assert "it loads without plmcc" in done.stdout
    kind = type(result.model)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "dense"), kind.__name__]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)[0] == name
    again = kind.from_pretrained(tmp_path / "dense").eval()
    inputs = probe_inputs(result.model)
    outputs = [first_output(model, inputs) for model in (again, result.model)]
    assert relative_difference(*outputs) < 1e-5
    assert (tmp_path / "dense/tokenizer.json").exists()


def test_only_an_export_is_overwritten(tmp_path: Path) -> None:
    plmcc.apply(recipe(CODES), saved("bert", tmp_path), tmp_path / "small")
    given = ["export", str(tmp_path / "small"), "--to", "dense", "-o"]
    for place, flag, said in (
        ("dense", [], ""),
        ("dense", [], "the output directory exists"),
        ("dense", ["--overwrite"], ""),
        ("bert", ["--overwrite"], "was not written by this command"),
        ("small/inside", [], "inside"),
    ):
        done = CliRunner().invoke(app, [*given, str(tmp_path / place), *flag])
        assert (done.exit_code == 0) == (not said), done.exception
        assert not said or said in done.exception.render()  # type: ignore[union-attr]
    assert (tmp_path / "bert/model.safetensors").exists()
    plmcc.apply(recipe(CODES), tmp_path / "dense", tmp_path / "again")
    assert not (tmp_path / "again/plmcc_export.json").exists()


def test_another_structure_is_refused(tmp_path: Path) -> None:
    pruned = "movement_pruning: {method: magnitude, granularity: structured, density: 0.5}"
    plmcc.apply(recipe(pruned), saved("bert", tmp_path), tmp_path / "small")
    given = ["export", str(tmp_path / "small"), "--to", "dense", "-o", str(tmp_path / "dense")]
    done = CliRunner().invoke(app, given)
    assert isinstance(done.exception, PlmccError)
    assert "cannot be written as an ordinary checkpoint" in done.exception.render()
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fewer_layers_are_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    chosen = recipe("drop_layers: {targets: layers, keep: 1, select: even}")
    folder = saved(name, tmp_path)
    made = plan(chosen, str(folder))
    assert made.needs_plmcc == ""
    said = {target.name: target for target in made.targets}
    assert "without plmcc" in said["transformers"].reason
    assert said["ctranslate2"].takes != "no"
    result = plmcc.apply(chosen, folder, tmp_path / "small")
    assert json.loads((tmp_path / "small/config.json").read_text())["model_type"] == name
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), type(result.model).__name__]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "small")]).exit_code == 0
    assert json.loads((tmp_path / "small/report.json").read_text())["loads_with"] == [
        "transformers"
    ]
    later = plmcc.apply(recipe(CODES), tmp_path / "small", tmp_path / "smaller")
    assert "CodedEmbedding" in needs_plmcc(later.model)
    loaded = AutoModel.from_pretrained(tmp_path / "smaller")
    assert torch.isfinite(first_output(loaded, probe_inputs(loaded))).all()
