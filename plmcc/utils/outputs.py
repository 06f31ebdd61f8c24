"""Output directories: of one process at a time, complete or not there, and nothing that plmcc has
not written is replaced."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from plmcc.diagnostics import error, listing

UNFINISHED = ".unfinished-"
STAGES = ".plmcc-stages"
"""In an output directory that is written in place: the stages of the run."""
LOCK = "plmcc.lock.json"
_HELD = ".plmcc-running"
_PATIENCE = 0.5
"""Seconds in which another process may be just about to end."""
_ASIDE = "-replaced"
Index = Callable[[Path], str | None]
"""Of a directory: the name of the file in it that names the files that plmcc has written there."""


def artifact_index(folder: Path) -> str | None:
    """Return the name of the lock, where there is one."""
    return LOCK if (folder / LOCK).is_file() else None


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


def workplace(target: Path) -> Path:
    """Return the directory for what precedes an output, on the same file system."""
    return target if is_fixed(target) else target.parent


def is_occupied(target: Path) -> bool:
    """Say whether a directory has entries that are not of an unfinished run."""
    return target.is_dir() and any(not _is_ours(target, p.name) for p in target.iterdir())


def _is_ours(target: Path, name: str) -> bool:
    return name.startswith((f".{target.name}{UNFINISHED}", STAGES, f".{target.name}{_HELD}"))


def free(target: Path, overwrite: bool, index: Index = artifact_index) -> Path:
    """Return the output directory if it may be written.

    Args:
        target: the directory.
        overwrite: whether files that plmcc has written there may be replaced.
        index: what names these files.

    Raises:
        PlmccError: it holds something that must not be replaced, or cannot be written.
    """
    target = output_place(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        hint = "choose another directory"
        raise error("PLM501", "the output directory is a file", str(target), hint=hint)
    if is_occupied(target):
        _check_replaceable(target, overwrite, index(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".plmcc-", dir=workplace(target))).rmdir()
    except OSError as problem:
        raise error(
            "PLM501", f"the output directory cannot be written: {problem.strerror}", str(target)
        ) from None
    return target


def _check_replaceable(target: Path, overwrite: bool, index: str | None) -> None:
    if index is None:
        message = "the output directory exists and was not written by this command"
        hint = "remove it yourself, or choose another directory"
        raise error("PLM501", message, str(target), hint=hint)
    if not overwrite:
        hint = "add --overwrite, or choose another directory"
        raise error("PLM501", "the output directory exists", str(target), hint=hint)
    known = {index, *_listed(target / index)}
    others = [name for name in _entries(target) if name not in known]
    if others:
        message = "the output directory holds files that plmcc has not written"
        hint = "move them away, or choose another directory"
        raise error("PLM501", message, str(target), got=listing(others), hint=hint)


def _entries(target: Path) -> Iterator[str]:
    """Go through files and links below a directory, by their relative names."""
    for folder, folders, names in os.walk(target):
        here = Path(folder)
        if here == target:
            folders[:] = [name for name in folders if not _is_ours(target, name)]
            names = [name for name in names if not _is_ours(target, name)]
        linked = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*names, *linked]):
            yield (here / name).relative_to(target).as_posix()


@contextmanager
def claim(target: Path) -> Iterator[None]:
    """Keep other processes from writing an output directory, until the block or the process ends.

    What killed processes have left beside it is removed; a directory that one of them had moved
    aside gets its name again. A thread may claim what it holds already.

    Raises:
        PlmccError: another process, or thread, is writing it.
    """
    place = workplace(target)
    place.mkdir(parents=True, exist_ok=True)
    file = place / f".{target.name}{_HELD}"
    held = FileLock(file, timeout=_PATIENCE, poll_interval=_PATIENCE / 10, is_singleton=True)
    nested = held.is_locked
    try:
        held.acquire()
    except Timeout:
        hint = "wait for it to end, or choose another directory"
        raise error("PLM501", "another run is writing this", str(target), hint=hint) from None
    try:
        if not nested:
            _recover(target)
            remove_drafts(place, target.name)
        yield
    finally:
        if not nested:
            with suppress(OSError):  # Windows removes no open file
                file.unlink()  # while it is held: who waits for this file notices, and begins anew
        held.release()


def _recover(target: Path) -> None:
    """Complete what a killed process has begun: the old directory stays, or the new one."""
    drafts = _drafts(workplace(target), glob.escape(target.name))
    if is_fixed(target):
        for draft in drafts:
            if (draft / LOCK).exists() and not (target / LOCK).exists():
                _refill(target, draft, LOCK)
        return
    aside = [draft for draft in drafts if draft.name.endswith(_ASIDE)]
    if aside and not target.exists():
        max(aside, key=lambda one: one.stat().st_mtime).rename(target)


@contextmanager
def replace_directory(
    target: Path, last: str = LOCK, check: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends well.

    It is exchanged with a directory that is there in one step, where the system can; elsewhere that
    one is moved aside first and removed last. One that cannot be moved (`is_fixed`) gets the new
    entries one by one.

    Args:
        target: the directory.
        last: the entry without which a directory is not complete: it goes first and comes last.
        check: called right before, to raise where the directory must not be replaced after all.

    Raises:
        OSError: nothing can be written there.
    """
    place = workplace(target)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}{UNFINISHED}", dir=place))
    try:
        draft.chmod(0o755)
        yield draft
        check()
        if place == target:
            _refill(target, draft, last)
        else:
            _swap(target, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(target: Path, draft: Path) -> None:
    if not is_occupied(target):
        draft.rename(target)  # also an empty directory; fails where something has come in
        return
    if _exchange(draft, target):
        return
    aside = draft.with_name(f"{draft.name}{_ASIDE}")
    target.rename(aside)
    try:
        draft.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Give each of two directories the name of the other in one step, where the system can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = (here, os.fsencode(one), here, os.fsencode(two))
    return rename is not None and rename(*paths, exchange) == 0


def _refill(target: Path, draft: Path, last: str) -> None:
    """Replace the files that an earlier result says it has; others may be the user's."""
    names = _listed(target / last)
    (target / last).unlink(missing_ok=True)
    for name in names:
        if (target / name).parent.resolve().is_relative_to(target.resolve()):
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed runs left beside `folder/name`, or beside anything in the folder."""
    for left in _drafts(folder, "*" if name is None else glob.escape(name)):
        shutil.rmtree(left, ignore_errors=True)


def _drafts(folder: Path, names: str) -> list[Path]:
    return [*folder.glob(f".{names}{UNFINISHED}*")]
