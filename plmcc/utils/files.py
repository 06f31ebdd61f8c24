"""Files and directories that are either complete or not there."""

from __future__ import annotations

import errno
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plmcc.diagnostics import did_you_mean, error, nearest
from plmcc.utils.outputs import UNFINISHED


def write_json(file: Path, values: object) -> None:
    """Write plain values as readable JSON."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it is no JSON, or nested too deep.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_outside(target: Path, model: Path) -> None:
    """Refuse an output directory inside the directory of the model.

    Raises:
        PlmccError: it is inside.
    """
    if model.is_dir() and model.resolve() in target.resolve().parents:
        message = "the output directory is inside the directory of the model"
        raise error("PLM501", message, str(target), hint="choose another directory")


def matching_files(name: str, base: Path | None = None) -> list[Path]:
    """Return the files of a path or glob, in order; relative ones start from the current directory
    or, where nothing is there, from `base`.

    Raises:
        PlmccError: it names no file, or a directory.
    """
    roots = [Path()] if base is None or Path(name).is_absolute() else [Path(), base]
    for root in roots:
        if found := _matching(root / name):
            check_regular(found)
            folders = [path for path in found if path.is_dir()]
            if folders:
                raise error(
                    "PLM301",
                    "this is a directory, not a file",
                    str(folders[0]),
                    hint=f"write {folders[0]}/*.txt or the like",
                )
            return found
    siblings = [path.name for root in roots for path in (root / name).parent.glob("*")]
    hint = did_you_mean(
        Path(name).name,
        siblings,
        "relative paths start from the current directory or from the recipe",
    )
    raise error("PLM301", "the file does not exist", name, hint=hint)


def check_regular(files: list[Path]) -> None:
    """Refuse pipes and devices, which would be read several times, or without end.

    Raises:
        PlmccError: there is one.
    """
    for file in files:
        if file.exists() and not (file.is_file() or file.is_dir()):
            hint = "write what it gives into a file first"
            raise error("PLM301", "this is not a regular file", str(file), hint=hint)


def _matching(path: Path) -> list[Path]:
    if path.exists():  # a file may have brackets in its name
        return [path]
    return sorted(Path(one) for one in glob.glob(str(path)))


def path_from(base: Path | None, file: Path, name: str) -> str:
    """Return the path of one of `matching_files(name, base)`, relative to where `name` starts; an
    absolute one stays so."""
    relative = base is not None and not Path(name).is_absolute() and not _matching(Path(name))
    return (file.relative_to(base) if base is not None and relative else file).as_posix()


def check_not_local(name: str) -> None:
    """Refuse at once a model's name that can only have been meant as a directory, before the hub is
    asked.

    Raises:
        PlmccError: it is a file, or a directory that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_file():
        hint = f"pass the directory, {path.parent}"
        raise error("PLM401", "this is a file, but a model is a directory", name, hint=hint)
    siblings = [p.name for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    inside = path.parent != Path() and path.parent.is_dir()
    if near or inside or name.count("/") > 1 or name.startswith((".", "/", "~")):
        hint = f"did you mean `{path.parent / near}`?" if near else ""
        raise error("PLM401", "there is no such model directory", name, hint=hint)


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yield a file beside `target` that takes its name when the block ends well.

    Raises:
        OSError: nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}{UNFINISHED}")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
