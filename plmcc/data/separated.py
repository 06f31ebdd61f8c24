"""Files of separated values, looked at before they are read: encoding, delimiter, fields."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import IO, Literal

from plmcc.diagnostics import error
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def options_of(file: Path, delimiter: str) -> Values:
    """Return how pandas has to read a file.

    Args:
        file: with a header; it may be compressed by gzip.
        delimiter: what its name says, a comma or a tab.

    Raises:
        PlmccError: it is not text in UTF-8 or UTF-16, or a row has other fields than the header.
    """
    try:
        encoding = _encoding(file)
        with _open(file, encoding) as stream:
            header = stream.readline()
        found = _delimiter(header, delimiter)
        _check_fields(file, encoding, found)
    except (OSError, EOFError, UnicodeError, zlib.error) as problem:
        message = f"the file cannot be read: {first_line(problem)}"
        raise error("PLM301", message, str(file)) from None
    options: Values = {"encoding": encoding, "sep": found, "index_col": False}
    if found == "\t":
        return options | {"quoting": csv.QUOTE_NONE, "keep_default_na": False}
    return options | {"keep_default_na": False, "na_values": [""]}


def _open(file: Path, encoding: str) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding=encoding, newline="")
    return file.open(encoding=encoding, newline="")


def _encoding(file: Path) -> str:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        start = stream.read(3)
        known = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        if known == "utf-16":
            return known
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                message = "this line is not text in UTF-8"
                hint = (
                    "save the file in UTF-8: `iconv -f latin1 -t utf-8 FILE`, if it is in Latin-1"
                )
                raise error("PLM301", message, f"{file}:{number}", hint=hint) from None
    return known


def _delimiter(header: str, expected: str) -> str:
    """The delimiter of a header: the expected one, or the only other that occurs."""
    if expected in header:
        return expected
    others = [one for one in _DELIMITERS if one in header]
    return others[0] if len(others) == 1 else expected


def _check_fields(file: Path, encoding: str, delimiter: str) -> None:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with _open(file, encoding) as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting)
        columns = 0
        try:
            for row in reader:
                columns = columns or len(row)
                if row and len(row) != columns:
                    what = _NAMES[delimiter]
                    plural = "" if len(row) == 1 else "s"
                    message = f"this row has {len(row)} field{plural}, the header has {columns}"
                    hint = f"put quotes around a text that contains {what}, or separate by tabs"
                    if delimiter == "\t":
                        hint = "a text must not contain a tab"
                    raise error("PLM301", message, f"{file}:{reader.line_num}", hint=hint)
        except csv.Error as problem:
            message = f"this row cannot be read: {problem}"
            raise error("PLM301", message, f"{file}:{reader.line_num}") from None
