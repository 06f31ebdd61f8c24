"""A few of the kills and pairs of `benchmarks/robustness.py`, in every run of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.attack
SCRIPT = Path(__file__).parents[2] / "benchmarks/robustness.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forks")
def test_killed_and_concurrent_runs_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-P", SCRIPT, "--kills", "6", "--pairs", "8", "--output", file]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    for row in found["kills"]:
        assert row["kills"] == 3
        bad = {key: row[key] for key in ("differing", "broken", "left_over", "failed")}
        assert not any(bad.values()), bad
    for row in found["pairs"]:
        assert row["pairs"] == row["one_wins"] + row["in_turn"] == 4
        assert (row["wrong"], row["left_over"]) == (0, 0)
