"""Parses YAML text into plain values, each with its location.

Scalars are read as in YAML 1.2: `1e-4` is a number, `no` is text. What makes YAML unsafe or
ambiguous (tags, merge keys, duplicate keys, unbounded aliases) is refused.
"""

from __future__ import annotations

import errno
import math
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plmcc.diagnostics import Diagnostic, Location, PlmccError, did_you_mean, error
from plmcc.recipe.yaml_loader import MAX_DEPTH, MAX_VALUES, Loader

Steps = tuple[str | int, ...]
"""The way from the root of a recipe to a value: keys and list indices."""

_MAX_BYTES = 1 << 20
_MAX_DIGITS = 300
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_BASES = {"0x": 16, "0o": 8}


@dataclass
class Document:
    """Plain values and, by path, the locations of the values and of their keys."""

    data: Any
    values: dict[Steps, Location | str] = field(default_factory=dict)
    keys: dict[Steps, Location | str] = field(default_factory=dict)

    def location(self, path: Steps, *, key: bool = False) -> Location | str:
        """Return the location of the value (or key) at `path`, or of the nearest one around it."""
        for length in range(len(path), -1, -1):
            found = self.keys.get(path[:length]) if key and length == len(path) else None
            found = found or self.values.get(path[:length])
            if found:
                return found
        return ""


def read_text(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        PlmccError: the file is missing, a directory, unreadable, too large, or not UTF-8.
    """
    location = str(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # it might have no end
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise error("PLM001", "the file does not exist", location, hint=_neighbors(path)) from None
    except IsADirectoryError:
        raise error("PLM002", "this is a directory, not a recipe", location) from None
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error("PLM003", f"cannot read the file: {reason}", location) from None
    if len(raw) > _MAX_BYTES:
        raise error("PLM004", "the file is larger than 1 MiB, too large for a recipe", location)
    return _decoded(raw, location)


def compose(text: str, file: str) -> Document:
    """Return the values of a YAML text with their locations.

    Raises:
        PlmccError: a syntax error, alone since it hides the rest; or everything refused.
    """
    lines = _LINE_BREAK.split(text)
    try:
        node = Loader(text, file, lines).get_single_node()
    except yaml.MarkedYAMLError as problem:
        raise PlmccError(_syntax_error(problem, file, lines)) from None
    except yaml.reader.ReaderError as problem:
        raise PlmccError(_bad_character(problem, text, file, lines)) from None
    if node is None:
        raise error("PLM006", "the file is empty", file, hint="begin with `plmcc: 1`")
    reader = _Reader(file, lines)
    data = reader.value(node, ())
    if reader.problems:
        raise PlmccError(*reader.problems)
    return Document(data, reader.values, reader.keys)


def _neighbors(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the directory {path.parent} does not exist"
    names = sorted(other.name for other in path.parent.glob("*.y*ml"))
    return did_you_mean(path.name, names)


def _decoded(raw: bytes, location: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        where = f"{location}:{line}"
        hint = "save the file as UTF-8"
        given = f"byte 0x{raw[problem.start]:02x}"
        raise error("PLM005", "the file is not UTF-8 text", where, got=given, hint=hint) from None


def _locate_in(mark: yaml.Mark, file: str, lines: list[str], width: int = 1) -> Location:
    excerpt = lines[mark.line] if mark.line < len(lines) else ""
    return Location(file, mark.line + 1, mark.column + 1, width, excerpt)


def _syntax_error(problem: yaml.MarkedYAMLError, file: str, lines: list[str]) -> Diagnostic:
    mark = problem.problem_mark or problem.context_mark
    location = _locate_in(mark, file, lines) if mark else file
    words = f"{problem.context or ''} {problem.problem or ''}".strip()
    if "single document" in words:
        hint = "one recipe is one document: remove the second `---`"
        return Diagnostic("PLM014", "a second YAML document begins here", location, hint=hint)
    if r"\t" in words or (isinstance(location, Location) and "\t" in _indent(location.excerpt)):
        hint = "indent with spaces; YAML does not allow tabs there"
        return Diagnostic("PLM011", "a tab in the indentation", location, hint=hint)
    code = problem.note or "PLM010"
    hint = _syntax_hint(words)
    return Diagnostic(code, words, location, hint=hint)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _syntax_hint(words: str) -> str:
    hints = {
        "mapping values are not": "quote a text that contains `: `, or check the indentation",
        "could not find expected ':'": "write `key: value`, with a space after the colon",
        "block collection": "items of one list or mapping begin in the same column",
        "block mapping": "keys of one mapping begin in the same column",
        "flow sequence": "a bracket `[` is not closed, or a comma is missing",
        "flow mapping": "a brace `{` is not closed, or a comma is missing",
        "quoted scalar": "a quote is not closed, or an escape is unknown",
        "cannot start any token": "quote a text that begins with this character",
        "undefined alias": "quote a text that begins with `*`",
    }
    return next((hint for part, hint in hints.items() if part in words), "")


def _bad_character(
    problem: yaml.reader.ReaderError, text: str, file: str, lines: list[str]
) -> Diagnostic:
    before = _LINE_BREAK.split(text[: problem.position])
    mark = yaml.Mark(file, 0, len(before) - 1, len(before[-1]), None, 0)
    given = f"U+{ord(text[problem.position]):04X}"
    hint = "remove it, or write it as an escape between double quotes"
    location = _locate_in(mark, file, lines)
    return Diagnostic("PLM012", "YAML does not allow this character", location, given, hint=hint)


@dataclass
class _Reader:
    """Turns nodes into values and collects what it refuses on the way."""

    file: str
    lines: list[str]
    values: dict[Steps, Location | str] = field(default_factory=dict)
    keys: dict[Steps, Location | str] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)

    def value(self, node: yaml.Node, path: Steps) -> object:
        self.values[path] = self.location(node)
        self._bounded(node, path)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def location(self, node: yaml.Node) -> Location:
        start, end = node.start_mark, node.end_mark
        width = end.column - start.column if end.line == start.line else 1
        return _locate_in(start, self.file, self.lines, max(1, width))

    def _bounded(self, node: yaml.Node, path: Steps) -> None:
        # The composer bounds the text; aliases are followed only here, so they are bounded here.
        if len(path) > MAX_DEPTH:
            self._report("PLM017", f"nested more than {MAX_DEPTH} levels deep by aliases", node)
            raise PlmccError(*self.problems)
        if len(self.values) > MAX_VALUES:
            self._report("PLM018", f"more than {MAX_VALUES} values by aliases", node)
            raise PlmccError(*self.problems)

    def _mapping(self, node: yaml.MappingNode, path: Steps) -> dict[str | int, object]:
        mapping: dict[str | int, object] = {}
        lines: dict[str | int, int] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key is None:
                continue
            if key in lines:
                message = f"the key `{key}` appears twice, first in line {lines[key]}"
                self._report("PLM013", message, key_node, hint="keep one of them")
                continue
            lines[key] = key_node.start_mark.line + 1
            self.keys[*path, key] = self.location(key_node)
            mapping[key] = self.value(value_node, (*path, key))
        return mapping

    def _key(self, node: yaml.Node) -> str | int | None:
        if not isinstance(node, yaml.ScalarNode):
            self._report("PLM019", "a key must be text, not a list or mapping", node)
            return None
        if node.value == "<<" and not node.style:
            hint = "write the keys out, or use an alias for a whole value"
            self._report("PLM016", "merge keys are not supported", node, hint=hint)
            return None
        key = self._scalar(node)
        if isinstance(key, str) or type(key) is int:
            return key
        given = node.value or "nothing"
        hint = "quote the key, or put text before the colon"
        self._report("PLM019", "a key must be text", node, got=given, hint=hint)
        return None

    def _scalar(self, node: yaml.ScalarNode) -> object:
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float"):
            return self._number(node, kind)
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
            self._report("PLM012", "a text with a control character", node)
        return text

    def _number(self, node: yaml.ScalarNode, kind: str) -> int | float:
        text = node.value.lower()
        if len(text) > _MAX_DIGITS:
            self._report("PLM020", f"a number of more than {_MAX_DIGITS} digits", node)
            return 0
        if kind == "int":
            return int(text, _BASES.get(text[:2], 10))
        number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if math.isfinite(number):
            return number
        self._report("PLM020", "a number must be finite", node, got=text)
        return 0.0

    def _report(
        self, code: str, message: str, node: yaml.Node, got: str = "", hint: str = ""
    ) -> None:
        self.problems.append(Diagnostic(code, message, self.location(node), got, hint=hint))
