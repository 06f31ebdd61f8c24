"""Coded errors: where, what was given, what is allowed, and the nearest name.

A user error is a `Diagnostic`; a `PlmccError` carries one or more of them, so that everything wrong
with a recipe is reported at once.
"""

from __future__ import annotations

import difflib
import errno
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CODES: dict[str, str] = {
    # Files and YAML syntax
    "PLM001": "the file does not exist",
    "PLM002": "the path is a folder",
    "PLM003": "the file cannot be read",
    "PLM004": "the file is too large",
    "PLM005": "the file is not UTF-8 text",
    "PLM006": "the file is empty",
    "PLM010": "YAML syntax",
    "PLM011": "a tab in the indentation",
    "PLM012": "a control character",
    "PLM013": "a key stands twice in one mapping",
    "PLM014": "more than one YAML document",
    "PLM015": "a YAML tag",
    "PLM016": "a merge key (<<)",
    "PLM017": "nested too deep, or an alias that contains itself",
    "PLM018": "too many values, aliases counted as often as they are used",
    "PLM019": "a key that is neither text nor a whole number",
    "PLM020": "a number that cannot be represented",
    # Recipes
    "PLM101": "an unknown key",
    "PLM102": "a missing key",
    "PLM103": "a value of the wrong type",
    "PLM104": "a value out of range",
    "PLM105": "a value that is not one of the choices",
    "PLM106": "an unsupported format version",
    "PLM107": "a value that is not valid here",
    "PLM108": "keys that contradict each other or have no effect",
    "PLM110": "an unknown pass",
    "PLM111": "a malformed entry of `passes`",
    "PLM112": "a pass that cannot be used: it is broken, or two owners claim its name",
    "PLM120": "an unknown training argument",
    "PLM121": "a training argument that plmcc sets itself",
    "PLM130": "a --set argument that is not `path=value`",
    "PLM131": "a --set path that leads nowhere",
    # Matching (2xx), data and training (3xx), artifacts (4xx), command line and others (5xx)
    "PLM201": "a pass matched nothing",
    "PLM202": "a pass matched another number of sites than expected",
    "PLM203": "a site that a pass refuses",
    "PLM204": "two passes that want the same site",
    "PLM301": "data that cannot be found or read",
    "PLM302": "a row of data that cannot be used",
    "PLM303": "training settings that do not fit the model or the data",
    "PLM401": "an artifact that cannot be read or written",
    "PLM402": "an artifact that does not fit its record",
    "PLM501": "a file or folder that cannot be written or read",
    "PLM502": "a command line argument that is not valid here",
    "PLM503": "the work of an earlier run that was cut off",
    "PLM504": "memory that does not suffice",
    "PLM505": "a search without a trial that reaches the target",
}
"""What each code means. Blocks of a hundred: files, recipe, matching, data, artifact, the rest."""

_EXCERPT = 96  # columns of a source line that are shown


@dataclass(frozen=True)
class Place:
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

    `place` is a `Place` in a text, or words for any other place: `data.csv:17`, `model:
    bert.embeddings`. `given` and `allowed` are short texts, `cure` a sentence that says what to do.
    """

    code: str
    message: str
    place: Place | str = ""
    given: str = ""
    allowed: str = ""
    cure: str = ""

    def __post_init__(self) -> None:
        assert self.code in CODES, f"no meaning for {self.code} in CODES"

    def render(self) -> str:
        """Return the error as text: where, what, the line with a caret, given, allowed, cure."""
        where = f"{self.place}: " if str(self.place) else ""
        lines = [f"{where}error {self.code}: {self.message}"]
        if isinstance(self.place, Place) and self.place.excerpt.strip():
            lines += _underlined(self.place)
        named = (("given", self.given), ("allowed", self.allowed), ("help", self.cure))
        lines += [f"  {name}: {value}" for name, value in named if value]
        return "\n".join(_printable(line) for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Return the error as plain values, with `file`, `line` and `column` if it is in a text."""
        values = {"code": self.code, "message": self.message, "place": str(self.place)}
        values |= {"given": self.given, "allowed": self.allowed, "cure": self.cure}
        if not isinstance(self.place, Place):
            return values
        place = self.place
        return values | {
            "file": place.file,
            "line": place.line,
            "column": place.column,
            "excerpt": place.excerpt,
        }


class PlmccError(ValueError):
    """A user error, or several found together: text and exit code 1, never a traceback."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        assert diagnostics, "an error without a diagnostic says nothing"
        super().__init__(*diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = diagnostics

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """Return all diagnostics as text, one paragraph each."""
        return "\n".join(diagnostic.render() for diagnostic in self.diagnostics)

    def to_json(self) -> list[dict[str, Any]]:
        """Return all diagnostics as plain values."""
        return [diagnostic.to_json() for diagnostic in self.diagnostics]


def error(
    code: str,
    message: str,
    place: Place | str = "",
    *,
    given: str = "",
    allowed: str = "",
    cure: str = "",
) -> PlmccError:
    """Return an error with one diagnostic, ready to raise; arguments as those of `Diagnostic`."""
    return PlmccError(Diagnostic(code, message, place, given, allowed, cure))


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


def _underlined(place: Place) -> list[str]:
    start = max(0, place.column - 1 - _EXCERPT // 2)
    text = place.excerpt[start : start + _EXCERPT].replace("\t", " ")
    before = place.column - 1 - start
    token = text[before : before + place.width]
    margin = " " * len(str(place.line))
    return [
        f"  {place.line} | {text.rstrip()}",
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
