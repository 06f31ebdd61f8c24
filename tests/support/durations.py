"""Writes tests/durations.json from the log of `pytest --durations=0`: python durations.py LOG.

The seconds of a function are the mean over its cases. Those of its set-up are of the first case
that needed a fixture: others that share the fixture would wait as long in its place.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

_LINE = re.compile(r"^(\d+\.\d+)s (call|setup|teardown) +tests/([^\[\s]+)(\[.*)?$")
_LEAST = 0.5  # seconds


def measured(log: str) -> dict[str, dict[str, float]]:
    """Return the seconds of each function's calls and set-ups in the log, the slowest first."""
    calls: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    setups: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if one := _LINE.match(line.strip()):
            seconds, phase, name, case = float(one[1]), one[2], one[3], one[4]
            if phase == "setup":
                setups[name] = max(setups[name], seconds)
            else:
                calls[name][case or ""] += seconds
    means = {name: sum(cases.values()) / len(cases) for name, cases in calls.items()}
    return {"calls": _longest(means), "setups": _longest(setups)}


def _longest(seconds: dict[str, float]) -> dict[str, float]:
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    return {name: round(value, 1) for name, value in ordered if value >= _LEAST}


if __name__ == "__main__":
    made = measured(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(__file__).parents[1] / "durations.json"
    target.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
