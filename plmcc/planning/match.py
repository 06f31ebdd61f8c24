"""What a target pattern hits in a model, and patterns that would hit: `plmcc match`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from plmcc.api import Miss, Site
from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.ir.targets import ALIASES, Scope, rule_of, select
from plmcc.utils.types import Values

_SHOWN = 40  # rows of a table; JSON has all


@dataclass(frozen=True)
class Hit:
    """A path that a pattern hits: what stands there, and the role that passes see it in. `reason`
    says why it cannot be rewritten; empty where it can."""

    kind: str
    path: str
    role: str
    module: str
    shape: tuple[int, ...]
    reason: str = ""


@dataclass(frozen=True)
class Proposal:
    """A pattern, and how many sites of a kind it hits."""

    pattern: str
    kind: str
    sites: int


@dataclass(frozen=True)
class Found:
    """What a pattern hits in a model; without a pattern, or if it hits nothing, what would."""

    model: str
    pattern: str | None
    hits: tuple[Hit, ...]
    proposals: tuple[Proposal, ...]
    nearest: tuple[str, ...] = ()

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


def find(model: PreTrainedModel, pattern: str | None = None) -> Found:
    """Look for a pattern among the sites of every kind.

    Args:
        model: also one on the meta device.
        pattern: as in a recipe's `targets`: an alias, a glob, `re:<regex>` or `class:<Name>`.

    Raises:
        PlmccError: the pattern is not a regular expression.
    """
    program = Program(model)
    scopes = [Scope(model, kind, program.candidates(kind), "PATTERN") for kind in program.kinds()]
    name = type(model).__name__
    if pattern is None:
        return Found(name, None, (), tuple(p for scope in scopes for p in _proposals(scope)))
    hits: list[Hit] = []
    near: list[str] = []
    for scope in scopes:
        try:
            matches = select(scope, [pattern])
        except PlmccError as problem:
            first = problem.diagnostics[0]
            if first.code == "PLM107":
                raise
            near += [first.hint] if first.code == "PLM201" and "nearest" in first.hint else []
            near += [first.hint] if first.hint.startswith("did you mean") else []
            hits += [hit for miss in _refused(scope, pattern) for hit in _hits(scope, miss)]
        else:
            hits += [hit for found in matches for hit in _hits(scope, found)]
    if any(not hit.reason for hit in hits):
        return Found(name, pattern, tuple(hits), ())
    every = [p for scope in scopes for p in _proposals(scope)]
    return Found(name, pattern, tuple(hits), tuple(every), tuple(dict.fromkeys(near)))


def _refused(scope: Scope, pattern: str) -> list[Miss]:
    """Return the misses of a scope that a pattern names."""
    rule = rule_of(scope, pattern)
    return [c for c in scope.candidates if isinstance(c, Miss) and rule(c)]


def _hits(scope: Scope, found: Site | Miss) -> list[Hit]:
    if isinstance(found, Miss):
        module = scope.model.get_submodule(found.path)
        return [Hit(scope.kind, found.path, "", type(module).__name__, (), found.reason)]
    return [
        Hit(scope.kind, path, role, type(module).__name__, _shape(module))
        for path, role, module in zip(found.paths, found.roles, found.modules, strict=True)
    ]


def _shape(module: Any) -> tuple[int, ...]:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return tuple(weight.shape) if weight is not None else ()


def _proposals(scope: Scope) -> list[Proposal]:
    """Return aliases, and a regex for each group of paths that differ in their numbers alone."""
    sites = [c for c in scope.candidates if isinstance(c, Site)]
    found = [Proposal(alias, scope.kind, _count(scope, alias)) for alias in ALIASES]
    groups: dict[str, int] = {}
    for site in sites:
        key = re.sub(r"(?<=\.)\d+(?=\.|$)", r"\\d+", re.escape(site.path).replace("\\.", "."))
        pattern = "re:" + key.replace(".", r"\.") if "\\d+" in key else site.path
        groups[pattern] = groups.get(pattern, 0) + 1
    found += [Proposal(pattern, scope.kind, count) for pattern, count in groups.items()]
    # The table of word vectors is called as the alias is.
    return [proposal for proposal in dict.fromkeys(found) if proposal.sites]


def _count(scope: Scope, pattern: str) -> int:
    try:
        return len(select(scope, [pattern]).sites)
    except PlmccError:
        return 0


def print_found(found: Found, console: Console) -> None:
    """Print hits, or proposals where there are none."""
    if found.hits:
        console.print(_hits_table(found.hits))
        more = len(found.hits) - _SHOWN
        if more > 0:
            console.print(f"and {more} more; `--format json` lists all")
    for line in found.nearest:
        console.print(line, markup=False)
    if found.proposals:
        console.print(_proposals_table(found.proposals))


def _hits_table(hits: Sequence[Hit]) -> Table:
    refused = any(hit.reason for hit in hits)
    table = Table()
    for column in (
        "kind",
        "path",
        "role",
        "class",
        "shape",
        *(["not rewritten"] if refused else []),
    ):
        table.add_column(column)
    for hit in hits[:_SHOWN]:
        shape = " x ".join(map(str, hit.shape))
        row = (hit.kind, hit.path, hit.role, hit.module, shape)
        table.add_row(*row, *([hit.reason] if refused else []))
    return table


def _proposals_table(proposals: Sequence[Proposal]) -> Table:
    table = Table(title="patterns that hit")
    for column in ("kind", "pattern", "sites"):
        table.add_column(column)
    for one in proposals:
        table.add_row(one.kind, one.pattern, str(one.sites))
    return table
