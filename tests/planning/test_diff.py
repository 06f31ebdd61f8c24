"""`plmcc diff`: modules that differ, and what both models cost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import plmcc
from plmcc.artifact.size import component_bytes
from plmcc.planning.diff import Change, diff
from plmcc.recipe.load import parse_recipe
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

RECIPE = """\
plmcc: 1
stages:
  - name: fewer
    passes: [{drop_layers: {targets: encoder, keep: 1}}]
  - name: codes
    passes: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("diff")
    tiny("bert").save_pretrained(made / "m")
    words().save_pretrained(made / "m")
    plmcc.apply(parse_recipe(RECIPE, load_torch=True), made / "m", made / "out")
    return made


def change(changes: list[Change], pattern: str) -> Change:
    return next(one for one in changes if one.pattern == pattern)


def test_what_a_recipe_did_is_the_difference(folder: Path) -> None:
    found = diff(str(folder / "m"), str(folder / "out"))
    table = change(found.changes, "bert.embeddings.word_embeddings")
    assert table.what == "replaced"
    assert table.before == "Embedding weight 99x32 float32"
    assert table.after == "CodedEmbedding codebooks 32x32 float32, codes 99x2 uint8"
    assert (table.bytes_before, table.bytes_after) == (99 * 32 * 4, 99 * 2 + 32 * 32 * 4)
    gone = change(found.changes, "bert.encoder.layer.1.intermediate.dense")
    assert (gone.what, gone.after) == ("removed", "")
    original: Any = tiny("bert")
    assert found.before.bytes == sum(component_bytes(original).values())
    assert found.before.parameters == sum(p.numel() for p in original.parameters())
    assert found.after.flops is not None
    assert found.before.flops is not None
    assert found.after.flops < found.before.flops
    sizes = {name: (one, two) for name, one, two in found.components()}
    assert sizes["bert.embeddings.word_embeddings"] == (table.bytes_before, table.bytes_after)
    report = json.loads((folder / "out/report.json").read_text())
    assert found.after.bytes == sum(report["bytes_after"].values())


def test_a_model_does_not_differ_from_itself(folder: Path) -> None:
    assert diff(str(folder / "out"), str(folder / "out")).changes == []


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["diff", *arguments], cwd=folder)


def test_text_json_and_a_page(folder: Path) -> None:
    text = run(folder, "m", "out")
    assert text.returncode == 0, text.stderr
    assert "bert.embeddings.word_embeddings" in text.stdout
    values = json.loads(run(folder, "m", "out", "--format", "json").stdout)
    assert {one["what"] for one in values["changes"]} == {"removed", "replaced"}
    done = run(folder, "m", "out", "--format", "html", "-o", "diff.html")
    assert done.returncode == 0, done.stderr
    assert "CodedEmbedding" in (folder / "diff.html").read_text()


def test_a_missing_model_is_one_paragraph(folder: Path) -> None:
    done = run(folder, "m", "ouch")
    assert done.returncode == 1
    assert "ouch" in done.stderr
    assert "Traceback" not in done.stderr
