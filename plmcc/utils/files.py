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

from plmcc.diagnostics import did_you_mean, error, nearest

UNFINISHED = ".unfinished-"
STAGES = ".plmcc-stages"
"""In an output directory that is written in place: the stages of the run."""


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


def output_place(path: Path) -> Path:
    """Return where an output goes: links to directories are followed, and `.` gets its name."""
    linked = path.is_symlink() and path.is_dir()
    return path.resolve() if linked or path.name in ("", "..") else path


def is_fixed(target: Path) -> bool:
    """Say whether a directory cannot be replaced by another, so that it is written in place: a
    mount point, the current directory, or one whose parent is read-only."""
    if not target.is_dir():
        return False
    here = target.resolve() == Path.cwd()
    return here or os.path.ismount(target) or not os.access(target.parent, os.W_OK)


def is_occupied(target: Path) -> bool:
    """Say whether a directory has entries that are not of an unfinished run."""
    ours = (f".{target.name}{UNFINISHED}", STAGES)
    return target.is_dir() and any(not p.name.startswith(ours) for p in target.iterdir())


def workplace(target: Path) -> Path:
    """Return the directory for what precedes an output, on the same file system."""
    return target if is_fixed(target) else target.parent


def free(target: Path, overwrite: bool) -> Path:
    """Return the output directory if it may be written.

    Raises:
        PlmccError: it holds something that must not be replaced, or cannot be written.
    """
    target = output_place(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise error(
            "PLM501", "the output directory is a file", str(target), hint="choose another directory"
        )
    if is_occupied(target):
        if not overwrite:
            hint = "add --overwrite, or choose another directory"
            raise error("PLM501", "the output directory exists", str(target), hint=hint)
        if not (target / "plmcc.lock.json").exists():
            message = "the output directory exists and was not written by plmcc"
            raise error(
                "PLM501",
                message,
                str(target),
                hint="remove it yourself, or choose another directory",
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".plmcc-", dir=workplace(target))).rmdir()
    except OSError as problem:
        raise error(
            "PLM501", f"the output directory cannot be written: {problem.strerror}", str(target)
        ) from None
    return target


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
def replace_directory(target: Path, last: str = "plmcc.lock.json") -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends well.

    A directory that is there is moved aside first and removed last: one of the two always exists.
    One that cannot be moved (`is_fixed`) gets the new entries one by one.

    Args:
        target: the directory.
        last: the entry without which a directory is not complete: it goes first and comes last.

    Raises:
        OSError: nothing can be written there.
    """
    place = workplace(target)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}{UNFINISHED}", dir=place))
    try:
        draft.chmod(0o755)
        yield draft
        if place == target:
            _refill(target, draft, last)
        else:
            _swap(target, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(target: Path, draft: Path) -> None:
    aside = draft.with_name(f"{draft.name}-replaced")
    if target.exists():
        target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _refill(target: Path, draft: Path, last: str) -> None:
    """Replace the files that an earlier result says it has; others may be the user's."""
    names = _listed(target / last)
    (target / last).unlink(missing_ok=True)
    for name in names:
        (target / name).unlink(missing_ok=True)
    for new in sorted(draft.iterdir(), key=lambda one: one.name == last):
        old = target / new.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)  # of the earlier result: a new one has a directory of that name too
        new.rename(old)


def _listed(file: Path) -> list[str]:
    """The files inside its directory that a lock, or the manifest of an export, names."""
    try:
        names = [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


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
