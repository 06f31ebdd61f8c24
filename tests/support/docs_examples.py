"""The code blocks of README and documentation, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return language, title (or nothing) and text of each fenced block, in order."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def texts(page: Path, language: str) -> list[str]:
    """Return the text of each block in a language."""
    return [text for name, _, text in blocks(page) if name == language]


def example_pass() -> str:
    """Return the complete pass of `docs/writing-a-pass.md`: a module with `Int8Embedding`."""
    source, *_ = texts(ROOT / "docs/writing-a-pass.md", "python")
    return source
