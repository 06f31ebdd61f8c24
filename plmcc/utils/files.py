"""Files and directories that are either complete or not there."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plmcc.diagnostics import did_you_mean, error

UNFINISHED = ".unfinished-"


def write_json(file: Path, values: object) -> None:
    """Write plain values as readable JSON."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        # A file may have brackets in its name.
        exact = [str(root / name)] if (root / name).exists() else []
        found = sorted(Path(path) for path in exact or glob.glob(str(root / name)))
        if found:
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


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends well.

    A directory that is there is moved aside first and removed last: one of the two always exists.

    Raises:
        OSError: nothing can be written there.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}{UNFINISHED}", dir=target.parent))
    aside = draft.with_name(f"{draft.name}-replaced")
    try:
        draft.chmod(0o755)
        yield draft
        if target.exists():
            target.rename(aside)
        try:
            draft.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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


def remove_drafts(folder: Path, name: str) -> None:
    """Remove what killed runs left beside `folder/name`."""
    for left in folder.glob(f".{name}{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
