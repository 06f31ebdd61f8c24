"""Registers a pass that no installed distribution provides, for a while: `module:Class` or
`file.py:Class`.

It is registered like an installed one, by an entry point on the path, so that child processes find
it too. Using it runs the code of its module.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import did_you_mean, error
from plmcc.utils.text import first_line

_FORMS = "the name of a pass, module:Class, or path/to/file.py:Class"


@contextmanager
def temporarily_registered(given: str) -> Iterator[str]:
    """Yield the name under which this process and its children find a pass in the catalog.

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
        raise error("PLM502", "this is not the name of a class", got=given, allowed=_FORMS)
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
        hint = did_you_mean(file.name, siblings)
        raise error("PLM001", "the file does not exist", str(file), hint=hint)
    if not file.stem.isidentifier():
        message = "a file of this name cannot be imported"
        raise error("PLM502", message, str(file), allowed="letters, digits and _")
    known = importlib.util.find_spec(file.stem) if file.stem not in sys.modules else None
    other = known is not None and Path(known.origin or "").resolve() != file.resolve()
    if file.stem in sys.modules or other:
        message = "a module of this name is installed and would be used instead"
        raise error("PLM502", message, str(file), hint="rename the file")


def _declared(folder: Path, module: str, attribute: str) -> str:
    """Write the metadata of an installed distribution, and return the name of the pass."""
    name = f"{module.rpartition('.')[2].strip('_')}_{attribute}".lower().removeprefix("init_")
    information = folder / "plmcc_guest-0.dist-info"
    information.mkdir()
    text = "Metadata-Version: 2.1\nName: plmcc-guest\nVersion: 0\n"
    (information / "METADATA").write_text(text, encoding="utf-8")
    text = f"[{catalog.GROUP}]\n{name} = {module}:{attribute}\n"
    (information / "entry_points.txt").write_text(text, encoding="utf-8")
    return name


@contextmanager
def _on_path(folders: list[str]) -> Iterator[None]:
    """Let this process and its children import from these directories too: from the last, that of
    the module, after all others, since a file in it may have the name of a library's."""
    before, inherited = list(sys.path), os.environ.get("PYTHONPATH")
    sys.path[:] = [*folders[:-1], *before, folders[-1]]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders[:-1], *filter(None, [inherited])])
    # What a `.pth` file names comes after the libraries, in children too; PYTHONPATH before them.
    (Path(folders[0]) / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({folders[-1]!r})\n", encoding="utf-8"
    )
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
    """Import the class, and check that it is a pass.

    Raises:
        PlmccError: it cannot be imported, or is not a pass.
    """
    from plmcc.api import Pass

    try:
        found = importlib.import_module(module)
    except Exception as problem:  # foreign code may fail in any way
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise error("PLM112", f"its module cannot be imported: {reason}", given) from problem
    named = {n: kind for n, kind in vars(found).items() if isinstance(kind, type)}
    kinds = [n for n, kind in named.items() if issubclass(kind, Pass) and kind is not Pass]
    if attribute not in kinds:
        what = "is not a subclass of plmcc.api.Pass" if attribute in vars(found) else "is not there"
        hint = did_you_mean(attribute, kinds)
        raise error("PLM112", f"`{attribute}` {what}", given, allowed=", ".join(kinds), hint=hint)
