"""`report_to: trackio`: the Trainer's own integration, into local files."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import tiny
from support.tokenizers import words

pytest.importorskip("trackio")
RECIPE = """\
plmcc: 1
passes: [{compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}}]
train:
  data: {train: TEXT}
  distill: {teacher: original, pooled: 1.0}
  arguments:
    max_steps: 2
    logging_steps: 1
    report_to: trackio
    project: small
    run_name: first
"""


def test_a_training_is_recorded_locally(tmp_path: Path) -> None:
    model: Any = tiny("bert")
    model.base_model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(40)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TEXT", str(tmp_path / "text.txt")))
    plmcc = Path(sys.executable).with_name("plmcc")
    command = [str(plmcc), "apply", str(recipe), str(tmp_path / "model")]
    command += ["-o", str(tmp_path / "out")]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, metrics from metrics").fetchall()
    assert {row[0] for row in rows} == {"first"}
    assert any("loss" in str(row[1]) for row in rows)
