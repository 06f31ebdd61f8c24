"""Reading word-vector files: word2vec text and binary, GloVe text, fastText `.vec`, and `.npy` with
a file of words; all but the last also as `.gz`.

The table is allocated once, for the number of lines that a first pass counts, so that reading takes
little more memory than the table.
"""

from __future__ import annotations

import gzip
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from plmcc.data.sound import check_packed
from plmcc.diagnostics import PlmccError, error

Broken = Literal["refuse", "skip"]
Table = npt.NDArray[np.float32]
_CHUNK = 1 << 20
_SHOWN = 5  # broken lines that are told of one by one
_WORDS = (".words", ".vocab", ".txt")
_ODD = 10_000
"""How many times the median of the rows' largest values a row may have."""


@dataclass
class Lines:
    """What has been read, and what was wrong with the rest."""

    file: Path
    broken: Broken
    unit: str = "number"
    """What stands behind a word."""
    words: dict[str, int] = field(default_factory=dict)
    """The row of each word."""
    lines: list[int] = field(default_factory=list)
    """The line of each word."""
    skipped: list[str] = field(default_factory=list)

    def refuse(self, number: int, message: str) -> None:
        """Note a broken line, or raise.

        Raises:
            PlmccError: broken lines are refused.
        """
        if self.broken == "refuse":
            hint = "repair the file, or add --skip-broken"
            raise error("PLM301", message, f"{self.file}:{number}", hint=hint)
        self.skipped.append(f"line {number}: {message}")

    def add(self, number: int, raw: bytes, row: npt.NDArray[Any] | None, width: int) -> bool:
        """Take a word whose row has been read; return whether it counts."""
        try:
            word = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(number, "the word is not UTF-8")
            return False
        problem = ""
        if row is None or len(row) != width:
            many = f"{0 if row is None else len(row)} {self.unit}s"
            problem = f"`{word[:40]}` has {many}, but the first line has {width}"
            if row is None:
                problem = f"`{word[:40]}` has a value that is not a valid {self.unit}"
        elif not np.isfinite(row).all():
            problem = f"`{word[:40]}` has a value that is not finite"
        elif not word:
            problem = "the word is missing"
        elif word in self.words:
            problem = f"`{word[:40]}` appears twice"
        if problem:
            self.refuse(number, problem)
            return False
        self.words[word] = len(self.words)
        self.lines.append(number)
        return True

    def check_count(self, count: int, number: int) -> None:
        """Refuse a file that ends in line `number` without as many words as its header says.

        Raises:
            PlmccError: broken lines are refused.
        """
        found = len(self.words) + len(self.skipped)
        if found != count:
            self.refuse(number, f"the header announces {count} words, but there are {found}")

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know of skipped lines."""
        if not self.skipped:
            return ()
        more = len(self.skipped) - _SHOWN
        tail = (f"... and {more} more",) if more > 0 else ()
        count = len(self.skipped)
        many = "1 broken line" if count == 1 else f"{count} broken lines"
        head = f"{many} of {self.file} left out"
        return (head, *self.skipped[:_SHOWN], *tail)


def read(
    file: Path, words: Path | None = None, broken: Broken = "refuse"
) -> tuple[list[str], Table, tuple[str, ...]]:
    """Read a file of word vectors.

    Args:
        file: the kind follows from the name: `.npy`, `.bin` (word2vec), anything else is text.
        words: for `.npy`: one word a line; what follows a tab or a last space is ignored. Default:
            a file beside it of the same name that ends in .words, .vocab or .txt, or `vocab.txt`.
        broken: whether broken lines end the reading or are left out.

    Returns:
        Words, the table `(V, D)` (float32), and notes on what was left out.

    Raises:
        PlmccError: the file cannot be read, or a line is broken and that is refused.
    """
    state = Lines(file, broken)
    with reading(file):
        suffix = kind_of(file)
        if suffix == ".npy":
            table = _arrays(file, words, state)
        elif suffix == ".bin":
            table = _binary(state)
        else:
            table = _text(state)
    if not state.words:
        raise error("PLM301", "the file contains no word vectors", str(file))
    names, rows = _usual(state, table[: len(state.words)])
    return names, rows, state.notes()


def _usual(state: Lines, table: Table) -> tuple[list[str], Table]:
    """Leave out, or refuse, rows that are larger than others by orders of magnitude: one of them
    decides what every pass makes of all the others."""
    names = list(state.words)
    # Without a copy of the table.
    largest_V = np.maximum(table.max(axis=1, initial=0.0), -table.min(axis=1, initial=0.0))
    known = largest_V[largest_V > 0]
    odd_V = largest_V > _ODD * float(np.median(known)) if len(known) else largest_V > 0
    if not odd_V.any():
        return names, table
    for index in np.flatnonzero(odd_V):
        value = f"{largest_V[index]:.3g}, {_ODD:,} times what is usual in this file or more"
        message = f"`{names[index][:40]}` has a value of {value}"
        state.refuse(state.lines[index], message)
    return [name for name, odd in zip(names, odd_V, strict=True) if not odd], table[~odd_V]


def kind_of(file: Path) -> str:
    """Return the suffix that says what is in a file, `.gz` left aside."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into errors for the user.

    Raises:
        PlmccError: there is no such file, or it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise error("PLM301", "the file does not exist", str(file)) from None
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        if isinstance(problem, PlmccError):
            raise
        raise error("PLM301", f"it cannot be read: {problem}", str(file)) from None


def open_file(file: Path) -> IO[bytes]:
    """Open a file for reading, `.gz` unpacked.

    Raises:
        PlmccError: it unpacks to far more than text does.
    """
    check_packed(file)
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _text(state: Lines) -> Table:
    with open_file(state.file) as stream:
        first = stream.readline().removeprefix(BOM_UTF8).rstrip()
        header = header_of(first)
        width = header[1] if header else len(_spaced(first).split(b" ")) - 1
        count = header[0] if header else 1 + _line_count(stream)
    if width < 1 and state.file.stat().st_size == 0:
        raise error("PLM301", "the file is empty", str(state.file))
    if width < 1:
        message = "the first line is neither a header nor a word with its numbers"
        raise error(
            "PLM301",
            message,
            f"{state.file}:1",
            got=first[:60].decode(errors="replace"),
            hint="separate the word and its numbers by spaces",
        )
    if header and count * width > 1e11:
        raise error("PLM301", f"the header claims {count} x {width} numbers", f"{state.file}:1")
    rows = max(1, min(count, rows_at_most(state.file, width)))
    table = np.empty((rows, width), dtype=np.float32)
    with open_file(state.file) as stream:
        number = 0
        for number, line in enumerate(stream, 1):
            if (header and number == 1) or not line.strip():
                continue
            raw, row = _split(line.removeprefix(BOM_UTF8) if number == 1 else line, width)
            if len(state.words) == len(table):
                table = np.concatenate([table, np.empty_like(table[: max(1, len(table) // 8)])])
            if state.add(number, raw, row, width):
                table[len(state.words) - 1] = row
    if header:
        state.check_count(count, number)
    return table


def rows_at_most(file: Path, width: int) -> int:
    """Return how many rows the file can hold, whatever its header says: a number takes two
    bytes."""
    most = file.stat().st_size * (1100 if file.suffix == ".gz" else 1)  # the most that gzip packs
    return max(1, most // (2 * width))


def header_of(line: bytes) -> tuple[int, int] | None:
    """Return the two numbers of a header, None if the line is none."""
    parts = line.split()
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        return int(parts[0]), int(parts[1])
    return None


def _line_count(stream: IO[bytes]) -> int:
    count, last = 0, b"\n"
    while block := stream.read(_CHUNK):
        count += block.count(b"\n")
        last = block[-1:]
    return count + (last != b"\n")


def _split(line: bytes, width: int) -> tuple[bytes, Table | None]:
    """Split a line from its end: a word may hold spaces."""
    raw, *numbers = _spaced(line).rstrip(b" \r\n").rsplit(b" ", width)
    try:
        with np.errstate(over="ignore"):  # an infinite value is refused with its line
            row = np.array(numbers, dtype=np.float32) if numbers else np.empty(0, np.float32)
    except ValueError:
        row = None
    extra = raw.split(b" ")
    if row is not None and len(extra) > 1 and b"." in extra[-1] and is_number(extra[-1]):
        row = np.empty(width + len(extra) - 1, np.float32)  # too many numbers, not a word of many
        raw = extra[0]
    return raw.lstrip(), row


def _spaced(line: bytes) -> bytes:
    """A line whose word and numbers are separated by tabs, with spaces between the numbers."""
    word, tab, numbers = line.partition(b"\t")
    return word + b" " + b" ".join(numbers.split()) if tab else line


def is_number(text: str | bytes) -> bool:
    """Say whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _binary(state: Lines) -> Table:
    with open_file(state.file) as stream:
        header = header_of(stream.readline(100))
        if header is None:
            message = "this is not word2vec's binary format: there is no header"
            raise error("PLM301", message, f"{state.file}:1")
        count, width = header
        size = 4 * width
        most = max(1, state.file.stat().st_size * (1100 if state.file.suffix == ".gz" else 1))
        table = np.empty((min(count, most // max(1, size) + 1), width), dtype=np.float32)
        for number in range(1, count + 1):
            raw = _word(stream)
            block = stream.read(size)
            if len(block) < size:
                message = f"the file ends in word {number} of {count}"
                state.refuse(number, message)
                break
            row: Table = np.frombuffer(block, dtype="<f4")
            if state.add(number, raw, row, width):
                table[len(state.words) - 1] = row
    return table


def _word(stream: IO[bytes]) -> bytes:
    found = bytearray()
    while (byte := stream.read(1)) not in (b" ", b"") and len(found) < 10_000:
        found += byte
    return bytes(found.lstrip(b"\n"))


def _arrays(file: Path, words: Path | None, state: Lines) -> Table:
    loaded = np.load(file, allow_pickle=False, mmap_mode="r")
    if loaded.ndim != 2 or loaded.dtype.kind != "f":
        given = f"{loaded.dtype} of shape {loaded.shape}"
        message = "the array is not a table of floating-point numbers"
        raise error("PLM301", message, str(file), got=given, allowed="a row for each word")
    beside = [file.with_suffix(suffix) for suffix in _WORDS] + [file.with_name("vocab.txt")]
    found = words or next((path for path in beside if path.exists()), None)
    if found is None:
        hint = f"name it, or put {beside[0].name} beside it, one word a line"
        raise error("PLM301", "the file with the words is missing", str(file), hint=hint)
    with reading(found):
        names = list(_names(found))
    if len(names) != len(loaded):
        given = f"{len(names)} words, {len(loaded)} rows"
        raise error("PLM301", "words and rows do not match", str(found), got=given)
    width = loaded.shape[1]
    table = np.empty((len(names), width), dtype=np.float32)
    state.file = found
    for number, (raw, row) in enumerate(zip(names, loaded, strict=True), 1):
        if state.add(number, raw, np.asarray(row, dtype=np.float32), width):
            table[len(state.words) - 1] = row
    return table


def _names(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream):
            text = (line.removeprefix(BOM_UTF8) if number == 0 else line).rstrip(b"\r\n")
            head, _, tail = text.replace(b"\t", b" ").rpartition(b" ")
            yield head if head and tail.isdigit() else text
