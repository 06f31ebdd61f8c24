"""A pass that no distribution brings, known to the catalog for a while: `module:Class` or
`file.py:Class`.

It is made known as an installed one is, by an entry point on the path, so that fresh processes find
it too. Using it runs the code of its module.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plmcc import catalog
from plmcc.diagnostics import did_you_mean, error

_FORMS = "the name of a pass, module:Class, or path/to/file.py:Class"


@contextmanager
def known(given: str) -> Iterator[str]:
    """Yield the name by which the catalog has a pass, here and in processes that are started here.

    Args:
        given: the name of a pass, `module:Class` or `path/to/file.py:Class`.

    Raises:
        PlmccError: there is no such pass, module, file or class.
    """
    module, colon, attribute = given.rpartition(":")
    if not colon:
        catalog.load(given)
        yield given
        return
    if not module or not attribute.isidentifier():
        raise error("PLM502", "this names no class", given=given, allowed=_FORMS)
    paths = [str(Path.cwd())]
    if module.endswith(".py"):
        file = Path(module)
        _check_file(file)
        paths, module = [str(file.parent.resolve())], file.stem
    with tempfile.TemporaryDirectory(prefix="plmcc-pass-") as folder:
        name = _declared(Path(folder), module, attribute)
        loaded = set(sys.modules)
        with _on_path([folder, *paths]):
            try:
                _check_class(given, module, attribute)
                yield name
            finally:  # the next file of this name is another one
                if module not in loaded:
                    sys.modules.pop(module, None)


def _check_file(file: Path) -> None:
    if not file.is_file():
        siblings = [path.name for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        cure = did_you_mean(file.name, siblings)
        raise error("PLM001", "the file does not exist", str(file), cure=cure)
    if not file.stem.isidentifier():
        message = "a file with such a name cannot be imported"
        raise error("PLM502", message, str(file), allowed="letters, digits and _")
    if file.stem in sys.modules:
        message = "a module of this name is in use, and would be taken in its place"
        raise error("PLM502", message, str(file), cure="rename the file")


def _declared(folder: Path, module: str, attribute: str) -> str:
    """Write what an installed distribution says of itself, and return the name of the pass."""
    name = f"{module.rpartition('.')[2]}_{attribute}".lower()
    information = folder / "plmcc_guest-0.dist-info"
    information.mkdir()
    text = "Metadata-Version: 2.1\nName: plmcc-guest\nVersion: 0\n"
    (information / "METADATA").write_text(text, encoding="utf-8")
    text = f"[{catalog.GROUP}]\n{name} = {module}:{attribute}\n"
    (information / "entry_points.txt").write_text(text, encoding="utf-8")
    return name


@contextmanager
def _on_path(folders: list[str]) -> Iterator[None]:
    """Let this process, and those that it starts, import from some folders first."""
    before, inherited = list(sys.path), os.environ.get("PYTHONPATH")
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [inherited])])
    _forget()
    try:
        yield
    finally:
        sys.path[:] = before
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited
        _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for remembered in (catalog.entries, catalog.options, catalog.load):
        remembered.cache_clear()


def _check_class(given: str, module: str, attribute: str) -> None:
    """Import the class, and say what is wrong with it.

    Raises:
        PlmccError: it cannot be imported, or is no pass.
    """
    from plmcc.api import Pass

    try:
        found = importlib.import_module(module)
    except Exception as problem:  # foreign code may fail in any way
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
        raise error("PLM112", f"its module cannot be imported: {reason}", given) from problem
    named = {n: kind for n, kind in vars(found).items() if isinstance(kind, type)}
    kinds = [n for n, kind in named.items() if issubclass(kind, Pass) and kind is not Pass]
    if attribute not in kinds:
        what = "is no subclass of plmcc.api.Pass" if attribute in vars(found) else "is not there"
        cure = did_you_mean(attribute, kinds)
        raise error("PLM112", f"`{attribute}` {what}", given, allowed=", ".join(kinds), cure=cure)
