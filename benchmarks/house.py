"""Measures the structure of the code, and prints it as a table: `make house`.

    python benchmarks/house.py [--write]

`--write` puts the table between the `house` markers of docs/architecture.md. The limits are checked
by tests/test_architecture.py.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
_MARKERS = re.compile(r"(<!-- house -->\n).*?(<!-- /house -->)", re.DOTALL)
_LONG = 40  # lines of a function


@dataclass(frozen=True)
class Measure:
    """A value, and the most that it may be (None: no limit)."""

    name: str
    value: float
    limit: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the limit is kept."""
        return self.limit is None or self.value <= self.limit

    def row(self) -> str:
        """Return the line of the table."""
        limit = "" if self.limit is None else f"{self.limit:g}"
        return f"| {self.name} | {self.value:g} | {limit} |"


def sources() -> list[Path]:
    """Return the files of the package, each once."""
    own = [p for p in ROOT.glob("plmcc/**/*.py") if (ROOT / "plmcc/passes") not in p.parents]
    own = [p for p in own if (ROOT / "plmcc/recipes") not in p.parents]
    return sorted([*own, *ROOT.glob("passes/**/*.py")])


def measures() -> list[Measure]:
    """Measure the package."""
    files = sources()
    texts = [file.read_text(encoding="utf-8") for file in files]
    trees = [ast.parse(text) for text in texts]
    lines = sum(text.count("\n") for text in texts)
    functions = [length for tree in trees for length in _lengths(tree)]
    folders = Counter(file.parent for file in files)
    tests = Counter(file.parent for file in ROOT.glob("tests/**/*.py"))
    everything = [*files, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    skips = sum(len(re.findall(r"# fmt: (?:skip|off)", file.read_text())) for file in everything)
    own = skips and len(re.findall(r"# fmt: (?:skip|off)", Path(__file__).read_text()))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").count("\n")
    return [
        Measure("files in the largest folder of the package", max(folders.values()), 15),
        Measure("files in the largest folder of the tests", max(tests.values()), 15),
        Measure("import contracts broken", 0 if _contracts_kept() else 1, 0),
        Measure(f"functions over {_LONG} lines", sum(n > _LONG for n in functions), 12),
        Measure("`Any` per 1,000 lines", round(1000 * sum(map(_anys, trees)) / lines, 1), 6),
        Measure("`# fmt: skip` and `# fmt: off`", skips - own, 10),
        Measure("`hasattr`, and `vars(x)` used as getattr", sum(map(_dynamic, trees)), 0),
        Measure("lines of the median file", statistics.median(t.count("\n") for t in texts), 156),
        Measure("lines of the median function", statistics.median(functions), 7),
        Measure("lines of the README", readme, 150),
        Measure("files", len(files)),
        Measure("lines", lines),
    ]


def _lengths(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def _anys(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def _dynamic(tree: ast.Module) -> int:
    """Count attributes that are looked up by name without saying so."""
    found = 0
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        found += isinstance(called, ast.Name) and called.id == "hasattr"
        looked = node.value if isinstance(node, ast.Subscript) else None
        if isinstance(called, ast.Attribute) and called.attr == "get":
            looked = called.value
        if isinstance(looked, ast.Call) and isinstance(looked.func, ast.Name):
            reads = not isinstance(node, ast.Subscript) or isinstance(node.ctx, ast.Load)
            found += looked.func.id == "vars" and reads
    return found


def _contracts_kept() -> bool:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def table(found: list[Measure]) -> str:
    """Return the measures as a table in Markdown."""
    rows = "\n".join(one.row() for one in found)
    return f"| measure | value | at most |\n|---|---|---|\n{rows}\n"


def main() -> None:
    """Print the table; exit with 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    found = measures()
    made = table(found)
    print(made)
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_MARKERS.sub(rf"\g<1>{made}\g<2>", text), encoding="utf-8")
    sys.exit(0 if all(one.ok for one in found) else 1)


if __name__ == "__main__":
    main()
