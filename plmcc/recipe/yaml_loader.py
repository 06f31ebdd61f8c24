"""PyYAML with the scalars of YAML 1.2 and a bound on depth and size."""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from plmcc.utils.types import Values

MAX_DEPTH = 24
MAX_VALUES = 10_000

_CORE_SCHEMA = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """PyYAML's composer with the scalars of YAML 1.2, no tags, and a bound on depth and size."""

    yaml_implicit_resolvers: Values = {}  # noqa: RUF012

    def __init__(self, text: str, file: str, lines: list[str]) -> None:
        super().__init__(text)
        self.name = file
        self.depth = self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse a tag, and what is too deep or too much, before composing it."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self.count += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            _refuse("PLM017", f"nested more than {MAX_DEPTH} levels deep", event)
        if self.count > MAX_VALUES:
            _refuse("PLM018", f"more than {MAX_VALUES} values", event)
        tagged = isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        tag: str | None = cast(Any, event).tag if tagged else None
        if tag:
            _refuse("PLM015", f"the tag `{tag}` is not allowed: a recipe is plain data", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def scan_flow_scalar_non_spaces(self, double: bool, start_mark: yaml.Mark) -> Any:
        """Report an escape that PyYAML fails on, with its location."""
        try:
            return super().scan_flow_scalar_non_spaces(double, start_mark)
        except (ValueError, OverflowError):  # an escape beyond U+10FFFF
            mark = self.get_mark()
            raise yaml.scanner.ScannerError(None, None, "no such character", mark) from None

    def scan_yaml_directive_number(self, start_mark: yaml.Mark) -> Any:
        """Report a version that PyYAML fails on, with its location."""
        try:
            return super().scan_yaml_directive_number(start_mark)
        except ValueError:  # more digits than Python converts
            mark = self.get_mark()
            raise yaml.scanner.ScannerError(None, None, "no such version", mark) from None


def _refuse(code: str, message: str, event: yaml.Event) -> None:
    # The code travels in the note, which PyYAML itself leaves empty.
    mark: Any = event.start_mark
    raise yaml.composer.ComposerError(None, None, message, mark, code)


class Dumper(yaml.SafeDumper):
    """Writes YAML that reads the same as 1.1 and 1.2: what either takes for no text is quoted."""

    def ignore_aliases(self, data: object) -> bool:
        """Write every value out."""
        return True


for _kind, (_pattern, _first) in _CORE_SCHEMA.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first
        )
