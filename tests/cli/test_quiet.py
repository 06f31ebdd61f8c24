from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_models import tiny


@pytest.mark.parametrize("first", ["plmcc", "torch", "transformers"])
def test_importing_says_nothing_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    tiny("bert").save_pretrained(tmp_path)
    code = f"import {first}, sys, plmcc; plmcc.Recipe; from transformers import AutoModel\n"
    code += "from plmcc.pipeline.run import run"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "torchao" not in done.stderr
    assert "_pytree" not in done.stderr


def test_the_command_line_says_nothing_of_its_libraries(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("plmcc: 1\npasses: [low_rank]\n")
    tiny("bert").save_pretrained(tmp_path / "m")
    given = ["apply", file, tmp_path / "m", "-o", tmp_path / "out"]
    command = [sys.executable, "-m", "plmcc.cli", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{file}:2:10: error PLM303")
