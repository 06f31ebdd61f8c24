"""plmcc.lock.json seals an artifact: it holds the digest of every other file, and its own.

Any change of any file shows, one bit or a missing end: `check` for all files (`plmcc verify`), and
for weights and config whenever an artifact is loaded from where it was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from plmcc.diagnostics import Diagnostic, PlmccError, error
from plmcc.utils.types import Values

LOCK = "plmcc.lock.json"
_OWN = "sha256"
_READ_BY_NOBODY = frozenset(
    [
        ".md",
        ".rst",
        ".html",
        ".pdf",
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".svg",
        ".csv",
        ".tsv",
        ".log",
        ".yaml",
        ".yml",
    ]
)
_TABLES = ("vocab", "merges", "dict", "bpe", "spm", "tokenizer", "special", "added")
"""How text files of tokenizers begin."""
_HINT = "write the artifact again; if it was changed on purpose, remove plmcc.lock.json"


def digest(file: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it cannot be read, or is no regular file, which may have no end.
    """
    if not file.is_file() and file.exists():
        raise OSError(errno.EINVAL, "it is not a regular file")
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files(folder: Path) -> Iterator[Path]:
    """Go through the files that a lock records."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / LOCK:
            yield file


def write(folder: Path, values: Values) -> None:
    """Write the lock: the values, the digests of all files that are there, and its own."""
    found = {file.relative_to(folder).as_posix(): digest(file) for file in files(folder)}
    text = _text(values | {"files": found})
    (folder / LOCK).write_text(text, encoding="utf-8")


def _text(values: Values) -> str:
    """The only text that values have, with their digest at its end."""
    bare = {key: value for key, value in values.items() if key != _OWN}
    own = hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
    return json.dumps(bare | {_OWN: own}, indent=2, ensure_ascii=False) + "\n"


def read(folder: Path) -> Values:
    """Return what a lock says.

    Raises:
        PlmccError: it is missing, damaged, or names files outside of the artifact.
    """
    file = folder / LOCK
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        raw = file.read_bytes()
        values = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        message = "the directory does not exist"
        if folder.is_dir():
            message = "plmcc.lock.json is missing: the files have no recorded checksums"
        raise error(
            "PLM402", message, str(folder), hint="pass a directory that `plmcc apply` has written"
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error("PLM402", f"it cannot be read: {problem}", str(file), hint=_HINT) from None
    names = values.get("files") if isinstance(values, dict) else None
    if not isinstance(names, dict) or _text(values).encode() != raw:
        raise error("PLM402", "the file was changed after it was written", str(file), hint=_HINT)
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            message = "it lists a file outside of the artifact"
            raise error("PLM402", message, str(file), got=name)
    found: Values = values
    return found


def check(folder: Path, only: Iterable[str] | None = None) -> list[str]:
    """Compare files with the lock; return the names of those that it does not know.

    Args:
        folder: an artifact.
        only: names of files to look at; None for all.

    Raises:
        PlmccError: files are missing, changed, or there though the lock does not know them and
            something could load them.
    """
    recorded: dict[str, str] = read(folder)["files"]
    wanted = recorded if only is None else [name for name in only if name in recorded]
    problems = [
        _problem(folder / name, message)
        for name in wanted
        if (message := _difference(folder / name, recorded[name]))
    ]
    extra = []
    if only is None:
        names = [file.relative_to(folder).as_posix() for file in files(folder)]
        extra = [name for name in names if name not in recorded]
        problems += [
            _problem(folder / name, "the file is not in plmcc.lock.json")
            for name in extra
            if _could_be_read(name)
        ]
    if problems:
        raise PlmccError(*problems)
    return extra


def _could_be_read(name: str) -> bool:
    """Say whether transformers, tokenizers, sentence-transformers or Python could read a file that
    lies in an artifact: all but those of which it is known that nobody does."""
    path = PurePosixPath(name.lower())
    if any(part.startswith(".") for part in path.parts):  # what git and hubs leave
        return False
    if path.suffix == ".txt":
        return path.name.startswith(_TABLES)
    return path.suffix not in _READ_BY_NOBODY and path.stem not in ("license", "notice")


def _difference(file: Path, expected: str) -> str:
    try:
        return "" if digest(file) == expected else "the file was changed after it was written"
    except FileNotFoundError:
        return "the file is missing"
    except OSError as problem:
        return f"it cannot be read: {problem.strerror}"


def _problem(file: Path, message: str) -> Diagnostic:
    return error("PLM402", message, str(file), hint=_HINT).diagnostics[0]
