"""Options with which a pass fits tiny models, read from the pass's own tests."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "passes"


@functools.cache
def _options(name: str) -> dict[str, Any]:
    files = [TESTS / f"test_{name}.py", *sorted((TESTS / name).glob("test_*.py"))]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS":
                found: dict[str, Any] = ast.literal_eval(node.value)
                return found
    return {}


def options_of(name: str) -> dict[str, Any]:
    """Return the literal `OPTIONS = {...}` of `tests/passes/test_<name>.py` or of the files of
    `tests/passes/<name>/`; empty where there is none."""
    return dict(_options(name))
