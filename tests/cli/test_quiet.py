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


def test_looking_for_transformers_does_not_lose_the_registration() -> None:
    """Libraries look whether it is installed, long before anything imports it."""
    code = """
import sys, importlib.util, plmcc
for _ in range(2):
    assert importlib.util.find_spec("transformers") is not None
assert "transformers" not in sys.modules
import transformers
assert "plmcc.artifact.format" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commands_are_there_without_the_libraries_of_data() -> None:
    code = "import sys, plmcc.cli.app; print([n for n in ('torch', 'transformers', 'datasets', "
    code += "'pyarrow', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
