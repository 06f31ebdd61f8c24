"""Which code made a site: the distribution of a pass, its version, and a digest of its files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import CodeType

from plmcc.catalog import registry as catalog
from plmcc.pass_base import Pass


@dataclass(frozen=True)
class Origin:
    """Where a pass that is not part of plmcc comes from."""

    distribution: str
    """Its name; empty for a class that was registered in the process."""
    version: str
    digest: str
    """SHA-256 of the Python files of the distribution, or of the package or module of the pass."""

    @classmethod
    def from_json(cls, values: dict[str, str]) -> Origin:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a value is missing, or is nothing that names a distribution: it comes from
                an artifact, and stands in commands that are shown.
        """
        found = cls(**{key: str(value) for key, value in values.items()})
        if not all(re.fullmatch(r"[A-Za-z0-9._+!-]*", text) for text in asdict(found).values()):
            raise ValueError("a name, a version or a digest has other characters")
        return found

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip() or "a class registered in Python"

    def to_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)

    def differs(self, made: Origin) -> str:
        """Return how the code that made something differs from this; empty if it does not."""
        if made.distribution != self.distribution or made.version != self.version:
            return f"made by {made}, and {self} is installed"
        if made.digest != self.digest:
            return f"made by {made}, whose code has changed since"
        return ""


def origin_of(name: str) -> Origin | None:
    """Return the origin of a pass by its name; None for one of plmcc's own.

    Raises:
        PlmccError: there is no such pass.
    """
    found = catalog.entry(name)
    if found.origin == catalog.OWN:
        return None
    # A cell of a notebook may define the class anew: that is looked at each time.
    return _of_class(name) if catalog.is_registered(name) else _origin(found)


@cache
def _origin(found: catalog.Entry) -> Origin:
    dist = _distribution(found)
    if dist is None:
        return _of_class(found.name)
    files: Iterable[Path] = ()
    if not _is_editable(dist):
        listed = (Path(str(dist.locate_file(f))) for f in dist.files or () if f.suffix == ".py")
        files = (file for file in listed if file.exists())
    found_files = sorted(files) or _module_files(found.module)
    return Origin(dist.name, dist.version, _digest(found_files))


def _distribution(found: catalog.Entry) -> importlib.metadata.Distribution | None:
    for point in importlib.metadata.entry_points(group=catalog.GROUP):
        same = (point.name, point.module, point.attr or None)
        if same == (found.name, found.module, found.attribute) and point.dist is not None:
            return point.dist
    return None


def _is_editable(dist: importlib.metadata.Distribution) -> bool:
    text = dist.read_text("direct_url.json")
    return bool(text and json.loads(text).get("dir_info", {}).get("editable"))


def _module_files(module: str) -> list[Path]:
    """The files of the package that a module is in, recursively, or the file of the module."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is not None and spec.submodule_search_locations:
        return sorted(f for top in spec.submodule_search_locations for f in Path(top).rglob("*.py"))
    return [Path(spec.origin)] if spec is not None and spec.origin else []


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _of_class(name: str) -> Origin:
    """By the file of the module, or where it has none (a notebook), by the code of its classes."""
    kind = catalog.load(name)
    try:
        return Origin("", "", _digest([Path(inspect.getfile(kind))]))
    except (TypeError, OSError):
        module = vars(sys.modules.get(kind.__module__, kind))
        known = [one for one in module.values() if isinstance(one, type)]
        own = {one.__qualname__: one for one in known if one.__module__ == kind.__module__}
        text = [_text_of(one) for one in (own | {kind.__qualname__: kind}).values()]
        return Origin("", "", hashlib.sha256(repr(text).encode()).hexdigest())


def _text_of(kind: type) -> object:
    """What a class computes, as values whose text is the same for the same code."""
    members = sorted(vars(kind).items())
    functions = {key: _code(value.__code__) for key, value in members if inspect.isfunction(value)}
    options = repr(kind.model_fields) if issubclass(kind, Pass) else ""
    return kind.__qualname__, functions, options


def _code(code: CodeType) -> object:
    inner = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return code.co_code, code.co_names, inner
