"""Errors with codes: location, what was given, what is allowed, and a hint.

A user error is a `Diagnostic`; a `PlmccError` carries one or more of them, so that everything wrong
with a recipe is reported at once.
"""

from __future__ import annotations

import difflib
import errno
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CODES: dict[str, str] = {
    # Files and YAML syntax
    "PLM001": "the file does not exist",
    "PLM002": "the path is a directory, not a file",
    "PLM003": "the file cannot be read",
    "PLM004": "the file is too large",
    "PLM005": "the file is not UTF-8 text",
    "PLM006": "the file is empty",
    "PLM010": "invalid YAML syntax",
    "PLM011": "a tab in the indentation",
    "PLM012": "a control character",
    "PLM013": "a key that appears twice in one mapping",
    "PLM014": "more than one YAML document",
    "PLM015": "a YAML tag",
    "PLM016": "a merge key (<<)",
    "PLM017": "nesting that is too deep, or an alias that contains itself",
    "PLM018": "too many values",
    "PLM019": "a key that is neither text nor a whole number",
    "PLM020": "a number that cannot be represented",
    # Recipes
    "PLM101": "an unknown key",
    "PLM102": "a missing key",
    "PLM103": "a value of the wrong type",
    "PLM104": "a value out of range",
    "PLM105": "a value that is not one of the choices",
    "PLM106": "an unsupported version of the recipe format",
    "PLM107": "a value that is not valid here",
    "PLM108": "keys that contradict each other or have no effect",
    "PLM110": "an unknown pass",
    "PLM111": "a malformed entry of `passes`",
    "PLM112": "a pass that cannot be used",
    "PLM120": "an unknown training argument",
    "PLM121": "a training argument that plmcc sets itself",
    "PLM130": "a --set argument that is not `path=value`",
    "PLM131": "a --set or search path that leads nowhere",
    # Matching (2xx), data and training (3xx), artifacts (4xx), command line and others (5xx)
    "PLM201": "targets that match nothing",
    "PLM202": "a number of sites other than expected",
    "PLM203": "a module that the pass cannot rewrite",
    "PLM204": "two passes that rewrite the same module",
    "PLM301": "data that cannot be found or read",
    "PLM302": "a row of data that cannot be used",
    "PLM303": "settings that do not fit the model or the data",
    "PLM401": "a model or artifact that cannot be read",
    "PLM402": "an artifact that is not what its lock file records",
    "PLM501": "a file or directory that cannot be written",
    "PLM502": "a command line argument that is not valid here",
    "PLM503": "unfinished work of an earlier run",
    "PLM504": "out of memory",
    "PLM505": "a search without a trial that reaches the target",
}
"""What each code means. Blocks of a hundred: files, recipe, matching, data, artifact, the rest."""

HELP_FILE = Path(__file__).with_name("diagnostics_help.yaml")
"""For each code its cause, what to do, and an example: a command with its real output."""

_EXCERPT = 96  # columns of a source line that are shown


@dataclass(frozen=True)
class Explanation:
    """A code in full; `example` is empty where none can be reproduced."""

    code: str
    meaning: str
    why: str
    fix: str
    example: str = ""

    def to_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


@cache
def explanations() -> dict[str, Explanation]:
    """Return the explanation of every code, in the order of `CODES`."""
    texts = yaml.safe_load(HELP_FILE.read_text(encoding="utf-8"))
    return {code: Explanation(code, meaning, **texts[code]) for code, meaning in CODES.items()}


@dataclass(frozen=True)
class Location:
    """A token in a text: file, line and column (both from 1), its length, and the whole line."""

    file: str
    line: int
    column: int
    width: int = 1
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Diagnostic:
    """One user error.

    `location` is a `Location` in a text, or words for any other one: `data.csv:17`, `model:
    bert.embeddings`. `got` and `allowed` are short texts, `hint` says what to do.
    """

    code: str
    message: str
    location: Location | str = ""
    got: str = ""
    allowed: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        assert self.code in CODES, f"no meaning for {self.code} in CODES"

    def render(self) -> str:
        """Return the error as text: location, message, line with a caret, got, allowed, hint."""
        where = f"{self.location}: " if str(self.location) else ""
        lines = [f"{where}error {self.code}: {self.message}"]
        if isinstance(self.location, Location) and self.location.excerpt.strip():
            lines += _underlined(self.location)
        named = (("got", self.got), ("allowed", self.allowed), ("hint", self.hint))
        lines += [f"  {name}: {value}" for name, value in named if value]
        return "\n".join(_printable(line) for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Return the error as plain values, with `file`, `line` and `column` if it is in a text."""
        values = {"code": self.code, "message": self.message, "location": str(self.location)}
        values |= {"got": self.got, "allowed": self.allowed, "hint": self.hint}
        if not isinstance(self.location, Location):
            return values
        location = self.location
        return values | {
            "file": location.file,
            "line": location.line,
            "column": location.column,
            "excerpt": location.excerpt,
        }


class PlmccError(ValueError):
    """A user error, or several found together: text and exit code 1, never a traceback."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        assert diagnostics, "an error needs a diagnostic"
        super().__init__(*diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = diagnostics

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """Return all diagnostics as text, one paragraph each."""
        return "\n".join(diagnostic.render() for diagnostic in self.diagnostics)

    def to_json(self) -> list[dict[str, object]]:
        """Return all diagnostics as plain values."""
        return [diagnostic.to_json() for diagnostic in self.diagnostics]


def error(
    code: str,
    message: str,
    location: Location | str = "",
    *,
    got: str = "",
    allowed: str = "",
    hint: str = "",
) -> PlmccError:
    """Return an error with one diagnostic, ready to raise; arguments as those of `Diagnostic`."""
    return PlmccError(Diagnostic(code, message, location, got, allowed, hint))


def nearest(name: object, names: Iterable[str]) -> str | None:
    """Return the name in `names` most like `name`, or None when nothing is close."""
    lowered = {known.lower().replace("-", "_"): known for known in names}
    wanted = str(name)[:100].lower().replace("-", "_")
    found = difflib.get_close_matches(wanted, lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def did_you_mean(name: object, names: Iterable[str], otherwise: str = "") -> str:
    """Return `did you mean ...?` for the nearest name, or `otherwise` when nothing is close."""
    near = nearest(name, names)
    return f"did you mean `{near}`?" if near else otherwise


def listing(names: Sequence[str], limit: int = 24) -> str:
    """Return names as `a, b, c`, cut after `limit` of them."""
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _underlined(location: Location) -> list[str]:
    start = max(0, location.column - 1 - _EXCERPT // 2)
    text = location.excerpt[start : start + _EXCERPT].replace("\t", " ")
    before = location.column - 1 - start
    token = text[before : before + location.width]
    margin = " " * len(str(location.line))
    return [
        f"  {location.line} | {text.rstrip()}",
        f"  {margin} | {' ' * _columns(text[:before])}{'^' * max(1, _columns(token))}",
    ]


def _columns(text: str) -> int:
    """The width of a text in a terminal: East Asian characters take two columns, marks none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


def out_of_memory(problem: BaseException) -> bool:
    """Say whether an error of any library means that there is not enough memory."""
    refused = isinstance(problem, OSError) and problem.errno == errno.ENOMEM
    kind = isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError"
    return refused or kind or "can't allocate memory" in str(problem)
