"""Writes tests/durations.json from the log of `pytest --durations=0`: python durations.py LOG.

The seconds of a function are the mean over its cases; set-up counts for the case that waits for it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

_LINE = re.compile(r"^(\d+\.\d+)s (?:call|setup|teardown) +tests/([^\[\s]+)(\[.*)?$")
_LEAST = 0.5  # seconds


def means(log: str) -> dict[str, float]:
    """Return the seconds of each function in the log, the slowest first."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for line in log.splitlines():
        if one := _LINE.match(line.strip()):
            seconds[one[2]][one[3] or ""] += float(one[1])
    found = {name: sum(cases.values()) / len(cases) for name, cases in seconds.items()}
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    return {name: round(value, 1) for name, value in ordered if value >= _LEAST}


if __name__ == "__main__":
    made = means(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(__file__).parents[1] / "durations.json"
    target.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
