"""Every pass on a second device: nothing is left on the CPU, and no module waits for the device.

The device is pretended, in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.processes import run_module

ROOT = Path(__file__).parents[1]
CASES = (
    "codes, tied",
    "binary, tied",
    "factors, uint8",
    "adaptive",
    "movement, sensitivity",
    "magnitude, T5",
    "compressed attention",
    "fewer layers",
    "low rank",
    "int8, dynamic",
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, object]]:
    done = run_module("support.devices.placed", CASES, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_a_device_computes_what_the_cpu_does(
    name: str, found: dict[str, dict[str, object]]
) -> None:
    line = found[name]
    assert float(str(line["difference"])) < 1e-4
    assert line["same_tokens"]
    assert line["waits"] == {}


def test_a_head_on_another_device_than_its_table(found: dict[str, dict[str, object]]) -> None:
    line = found["a head elsewhere"]
    assert line["device"] == "gpu:1"
    assert float(str(line["difference"])) < 1e-5
