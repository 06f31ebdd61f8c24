"""`plmcc diff A B`: what two models differ in, from their structure alone.

Both are built on the meta device: config, tokenizer and, of an artifact, its record of rewritten
modules are read, and no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from plmcc.models.source import load_source
from plmcc.planning.cost import Cost, cost
from plmcc.utils.types import Values

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Change:
    """Modules of one pattern that differ in the same way. What is not there is an empty text."""

    pattern: str
    """A path, with * for the numbers of layers that change alike."""
    paths: tuple[str, ...]
    what: str
    """`added`, `removed`, `resized` (the same class) or `replaced`."""
    before: str
    after: str
    bytes_before: int
    """Of all of them together."""
    bytes_after: int


@dataclass(frozen=True)
class Difference:
    """Two models: what each costs, and how their modules differ."""

    first: str
    second: str
    before: Cost
    after: Cost
    changes: list[Change]

    def components(self) -> list[tuple[str, int, int]]:
        """Return names with bytes before and after."""
        one, two = self.before.components, self.after.components
        return [(name, one.get(name, 0), two.get(name, 0)) for name in {**one, **two}]

    def totals(self) -> list[tuple[str, Any, Any]]:
        """Return names of figures with their values before and after; None where not known."""
        pairs = (
            ("parameters", "parameters"),
            ("bytes", "bytes"),
            ("operations a token", "flops_per_token"),
            ("cache bytes a token", "cache_bytes"),
        )
        return [(name, getattr(self.before, k), getattr(self.after, k)) for name, k in pairs]

    def to_json(self) -> Values:
        """Return plain values."""
        values = {"first": self.first, "second": self.second}
        costs = {"before": self.before.to_json(), "after": self.after.to_json()}
        return values | costs | {"changes": [asdict(change) for change in self.changes]}


def diff(first: str, second: str) -> Difference:
    """Compare two models.

    Args:
        first: a model directory, an artifact or a hub id.
        second: likewise.

    Raises:
        PlmccError: one of them cannot be built.
    """
    models = [load_source(name, meta=True).model for name in (first, second)]
    before, after = (dict(_leaves(model)) for model in models)
    costs = [cost(models[0]), cost(models[1])]
    # What the first counts by itself is counted by itself in the second too, and the other way.
    names = list({**costs[0].components, **costs[1].components})
    costs = [cost(model, named=names) for model in models]
    return Difference(first, second, costs[0], costs[1], _grouped(before, after))


def _leaves(model: PreTrainedModel) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """Modules with tensors of their own: path, class, shapes in words, bytes. A shared tensor
    counts for the first that has it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = _own(module)
        new = {name: value for name, value in own.items() if id(value) not in seen}
        seen |= {id(value) for value in new.values()}
        if own:
            shapes = ", ".join(
                f"{name} {'x'.join(map(str, value.shape)) or '1'} {str(value.dtype)[6:]}"
                for name, value in own.items()
            )
            yield path, (type(module).__name__, shapes, sum(v.nbytes for v in new.values()))


def _own(module: nn.Module) -> Values:
    unsaved = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in unsaved}
    return dict(module.named_parameters(recurse=False)) | buffers


def _grouped(
    before: dict[str, tuple[str, str, int]], after: dict[str, tuple[str, str, int]]
) -> list[Change]:
    nothing = ("", "", 0)
    order = list({**before, **after})
    found = []
    for path in order:
        one, two = before.get(path, nothing), after.get(path, nothing)
        if one[:2] != two[:2]:
            found.append((_NUMBER.sub("*", path), path, one, two))
    key = lambda item: (item[0], item[2][:2], item[3][:2])  # noqa: E731
    location = {_NUMBER.sub("*", path): index for index, path in reversed(list(enumerate(order)))}
    changes = []
    for (pattern, one, two), items in groupby(sorted(found, key=key), key):
        members = list(items)
        changes.append(
            Change(
                pattern if len(members) > 1 else members[0][1],
                tuple(path for _, path, _, _ in members),
                _what(one[0], two[0]),
                " ".join(one).strip(),
                " ".join(two).strip(),
                sum(b[2] for _, _, b, _ in members),
                sum(a[2] for _, _, _, a in members),
            )
        )
    return sorted(changes, key=lambda change: location[_NUMBER.sub("*", change.pattern)])


def _what(before: str, after: str) -> str:
    if not before or not after:
        return "removed" if before else "added"
    return "resized" if before == after else "replaced"


def in_bytes(value: float | None) -> str:
    """Return bytes, or another large number, in words."""
    return "-" if value is None else f"{value:,.0f}"


def cells(found: Difference) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return tables: a title, a header, rows."""
    totals = [[n, in_bytes(a), in_bytes(b), _ratio(a, b)] for n, a, b in found.totals()]
    parts = [[n, in_bytes(a), in_bytes(b), _ratio(a, b)] for n, a, b in found.components()]
    changes = [
        [
            c.what,
            c.pattern,
            str(len(c.paths)),
            c.before,
            c.after,
            in_bytes(c.bytes_before),
            in_bytes(c.bytes_after),
        ]
        for c in found.changes
    ]
    sizes = ["", "before", "after", ""]
    header = ["", "modules", "number", "before", "after", "bytes", "bytes after"]
    return [("In all", sizes, totals), ("Bytes", sizes, parts), ("Modules", header, changes)]


def _ratio(before: float | None, after: float | None) -> str:
    return f"x{after / before:.3f}" if before and after is not None else ""
