"""Passes by name: the files of `plmcc.passes`, and the entry points of installed distributions.

The name of a file, or of an entry point in the group `plmcc.passes`, is the key in a recipe.
Nothing here names a pass, and a broken one is an error only where it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from plmcc.catalog.option_slice import CannotSlice, options_class, pass_classes
from plmcc.diagnostics import did_you_mean, error
from plmcc.pass_base import Pass
from plmcc.utils.text import first_line

GROUP = "plmcc.passes"
OWN = "plmcc"
"""The origin of the passes of plmcc itself."""
_SHIPPED = "plmcc.passes"


@dataclass(frozen=True)
class Entry:
    """A pass by name: its module, its class (None: the only one there), and its distribution."""

    name: str
    module: str
    attribute: str | None
    origin: str

    @property
    def owner(self) -> str:
        """The distribution and the module of the pass, for messages."""
        return f"{self.origin} ({self.module}{':' + self.attribute if self.attribute else ''})"

    def holds(self, kind: type[Pass]) -> bool:
        """Whether this is the entry of a class, be it the real one or its options only."""
        return kind.__module__ == self.module and self.attribute in (None, kind.__qualname__)


_REGISTERED: dict[str, type[Pass]] = {}


def register(kind: type[Pass]) -> type[Pass]:
    """Make a pass class known in this process, for notebooks and tests; also as a decorator.

    Its name in recipes is that of the class in snake_case. Artifacts of such a pass load wherever
    the same class is registered again. A class of the same name takes the place of an earlier one.

    Raises:
        PlmccError: the name belongs to an installed pass.
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
    others = entries().get(name, ())
    if name not in _REGISTERED and others:
        if any(owner.holds(kind) for owner in others):
            return kind  # installed, and known already
        message = f"`{name}` is the name of an installed pass"
        raise error("PLM112", message, hint="give the class another name")
    _REGISTERED[name] = kind
    for cached in (entries, options, load):
        cached.cache_clear()
    return kind


def is_registered(name: str) -> bool:
    """Return whether a pass was registered in this process."""
    return name in _REGISTERED


@cache
def entries() -> dict[str, tuple[Entry, ...]]:
    """Return the owners of every name, sorted; two of one name are an error where it is used."""
    found: dict[str, list[Entry]] = {}
    registered = (
        Entry(name, kind.__module__, kind.__qualname__, "this process")
        for name, kind in _REGISTERED.items()
    )
    for entry in (*_shipped(), *_installed(), *registered):
        found.setdefault(entry.name, []).append(entry)
    return {name: tuple(dict.fromkeys(found[name])) for name in sorted(found)}


def names() -> list[str]:
    """Return the names of all passes, those that are broken included."""
    return list(entries())


def entry(name: str) -> Entry:
    """Return the entry of a pass, without running its code.

    Raises:
        PlmccError: there is no such pass, or two owners claim the name.
    """
    owners = entries().get(name)
    if not owners:
        hint = did_you_mean(name, names(), "`plmcc passes` lists them")
        allowed = ", ".join(names())
        raise error("PLM110", f"there is no pass `{name}`", allowed=allowed, hint=hint)
    if len(owners) > 1:
        both = " and ".join(owner.owner for owner in owners)
        message = f"the pass `{name}` has two owners: {both}"
        raise error("PLM112", message, hint="uninstall one of them")
    return owners[0]


@cache
def options(name: str) -> type[Pass]:
    """Return the options of a pass: its class without torch where possible, else the real class.

    Raises:
        PlmccError: there is no such pass, two owners claim the name, or its module is broken.
    """
    found = entry(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    try:
        source = _source(found.module)
        return options_class(source, found.module, found.attribute)
    except (CannotSlice, OSError, SyntaxError, ValueError):
        return load(name)


@cache
def load(name: str) -> type[Pass]:
    """Return the class of a pass; this imports its module, and with it torch.

    Raises:
        PlmccError: there is no such pass, two owners claim the name, or its module is broken.
    """
    found = entry(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    try:
        return _imported(found)
    except (
        Exception
    ) as problem:  # foreign code may fail in any way, and must not break other passes
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        message = f"the pass `{name}` of {found.owner} is broken: {reason}"
        raise error("PLM112", message, hint=f"repair or uninstall {found.origin}") from problem


def name_of(kind: type[Pass]) -> str:
    """Return the name of a pass class, whether it is the real class or its options only.

    Raises:
        PlmccError: the class is in no catalog.
    """
    found = [name for name, owners in entries().items() if any(o.holds(kind) for o in owners)]
    if found:
        return min(found, key=lambda name: len(entries()[name]))  # a name of its own comes first
    message = f"the class {kind.__qualname__} of {kind.__module__} is not a registered pass"
    hint = f"call `plmcc.register`, or declare an entry point in the group {GROUP}"
    raise error("PLM110", message, hint=hint)


def _shipped() -> Iterator[Entry]:
    spec = importlib.util.find_spec(_SHIPPED)
    for found in pkgutil.iter_modules(spec.submodule_search_locations if spec else None):
        if not found.name.startswith("_"):
            yield Entry(found.name, f"{_SHIPPED}.{found.name}", None, OWN)


def _installed() -> Iterator[Entry]:
    for point in entry_points(group=GROUP):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an entry point"
        yield Entry(point.name, point.module, point.attr or None, origin)


def _source(module: str) -> str:
    """The text of a module, found without running anything, its parent packages included."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        # Asking all finders (editable installs have their own) imports the parents: not wanted.
        known = length == 1 or name == _SHIPPED
        spec = importlib.util.find_spec(name) if known else PathFinder.find_spec(name, path)
        path = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or spec.origin is None:
        raise CannotSlice(f"no source text of {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _imported(found: Entry) -> type[Pass]:
    module = importlib.import_module(found.module)
    kinds = [getattr(module, found.attribute)] if found.attribute else pass_classes(module)
    if len(kinds) != 1:
        defined = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise TypeError(f"it must define exactly one subclass of Pass, but defines {defined}")
    if not (isinstance(kinds[0], type) and issubclass(kinds[0], Pass)):
        raise TypeError(f"{found.attribute} is not a subclass of Pass")
    return kinds[0]
