"""Data files that would take all memory or end the process are refused before they are read."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from plmcc.diagnostics import error

_PACKED = 200
"""How many times its size a file may become; text packs by 3 to 20."""
_FREE = 2**29
"""So many bytes are always allowed; gzip packs 1,032 bytes into one at most."""
_DEEP = 200
"""Levels of JSON. The reader of pyarrow ends the process at some thousands."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def check_packed(file: Path) -> None:
    """Refuse a `.gz` file that unpacks to far more than text does.

    Raises:
        PlmccError: it does. What cannot be unpacked is left to who reads it.
    """
    state = file.stat()
    if file.suffix == ".gz" and state.st_size * 1032 > _FREE:
        most = max(_FREE, state.st_size * _PACKED)
        if _unpacked(file, most, state.st_mtime_ns) > most:
            message = f"the file unpacks to more than {_PACKED} times its size"
            raise error("PLM301", message, str(file), hint="unpack it yourself if it is right")


@lru_cache(maxsize=64)  # a file is opened several times
def _unpacked(file: Path, most: int, changed: int) -> int:
    """Return into how many bytes a file unpacks, or the first number beyond the most."""
    found = 0
    try:
        with gzip.open(file, "rb") as stream:
            while (part := stream.read(2**22)) and found <= most:
                found += len(part)
    except (OSError, EOFError, zlib.error):
        return 0
    return found


def check_nested(file: Path) -> None:
    """Refuse JSON that is nested too deep.

    Raises:
        PlmccError: it is.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, value in enumerate(_values(stream, file), 1):
                if _depth(value) > _DEEP:
                    message = f"the JSON is nested more than {_DEEP} levels deep"
                    raise error("PLM301", message, f"{file}:{number}")
    except (OSError, EOFError, zlib.error):
        return  # said by who reads it


def _values(stream: gzip.GzipFile | BufferedReader, file: Path) -> Iterator[bytes]:
    """Lines, or all of a file that may be one value."""
    if file.name.removesuffix(".gz").endswith(".json"):
        yield stream.read()
    else:
        yield from stream


def _depth(text: bytes) -> int:
    if text.count(b"[") + text.count(b"{") <= _DEEP:
        return 0
    bare = np.frombuffer(_STRING.sub(b"", text), dtype=np.uint8)
    opened = np.isin(bare, list(b"[{")).astype(np.int64)
    closed = np.isin(bare, list(b"]}")).astype(np.int64)
    return int((opened - closed).cumsum().max(initial=0))
