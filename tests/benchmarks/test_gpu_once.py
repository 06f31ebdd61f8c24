"""The script for a GPU that is at hand for minutes runs as a whole: on its day nothing may be lost
to an import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/once.py"
SECTIONS = {"machine", "correctness", "heads", "encoder", "pruned", "decode", "training"}


@pytest.mark.exhaustive  # two minutes; the next test runs the script with sections of its own
def test_the_dry_run_says_ok_for_every_section(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--device", "cpu", "--quick"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found.keys() >= {"command", "commit", "hardware", "versions", "seeds", "sections"}
    assert found["versions"]["torch"]
    assert found["hardware"]["gpu"]
    failed = {name: one for name, one in found["sections"].items() if one["status"] != "ok"}
    assert not failed, json.dumps(failed, indent=1)
    assert found["sections"].keys() == SECTIONS
    assert all(one["rows"] for one in found["sections"].values())


def test_a_section_that_fails_or_hangs_takes_nothing_from_the_others(tmp_path: Path) -> None:
    changed = tmp_path / "once.py"
    text = SCRIPT.read_text(encoding="utf-8")
    main = 'if __name__ == "__main__":'
    assert text.count(main) == 1
    sections = (
        "def fails(setting):\n"
        '    yield "first", lambda: {"value": 1}\n'
        '    yield "second", lambda: 1 / 0\n'
        '    yield "third", lambda: {"value": 3}\n'
        "def dies(setting):\n"
        '    yield "first", lambda: {"value": 1}\n'
        '    yield "second", lambda: os._exit(3)\n'
        "def hangs(setting):\n"
        '    yield "first", lambda: time.sleep(1000)\n'
        "def works(setting):\n"
        '    yield "first", lambda: {"value": 1}\n'
        "SECTIONS = {f.__name__: (1, f) for f in (fails, dies, hangs, works)}\n"
        "GRACE = 0.5\n"
        "Run.limit = lambda self, name, seconds: 0.5 if name == 'hangs' else None\n"
    )
    changed.write_text(text.replace(main, sections + main), encoding="utf-8")
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(changed), "--output", str(output), "--device", "cpu"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))["sections"]
    assert {name: one["status"] for name, one in found.items()} == {
        "fails": "failed",
        "dies": "failed",
        "hangs": "failed",
        "works": "ok",
    }
    assert [row["case"] for row in found["fails"]["rows"]] == ["first", "second", "third"]
    assert "ZeroDivisionError" in found["fails"]["rows"][1]["failed"]
    assert [row["case"] for row in found["dies"]["rows"]] == ["first"]
    assert found["dies"]["reason"].startswith("the process ended with 3")
    assert found["hangs"]["reason"].startswith("stopped after")


def test_every_recipe_of_the_script_is_read() -> None:
    once = script("benchmarks/gpu/once.py")
    assert all(once.recipe(name, "cpu").passes for name in once.CASES)
    assert set(once.QUICK) <= set(once.CASES)
    assert once.SECTIONS.keys() == SECTIONS
