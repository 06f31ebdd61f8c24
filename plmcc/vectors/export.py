"""Writing compressed word vectors as files for other programs: word2vec's formats, and that of the
authors of near-lossless binarization (NLB; `plmcc.vectors.codes` says what it is).

White space separates columns in these formats: within a word it becomes `_`, as in word2vec.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from plmcc.diagnostics import error
from plmcc.utils.files import replace_file
from plmcc.vectors.codes import INTEGER
from plmcc.vectors.files import kind_of
from plmcc.vectors.model import Compressed

_SPACE = re.compile(r"\s+")


def write_vectors(folder: Path, file: Path) -> tuple[str, ...]:
    """Write the reconstructed vectors of a directory, some rows at a time: in word2vec's binary
    format if the file is `.bin`, else as text with nine digits, with which a float32 comes back
    unchanged.

    Returns:
        Notes on words that had to be changed.

    Raises:
        PlmccError: the directory holds no word vectors, the file would not be read back by its
            name, or two words would become one.
    """
    _check_kind(file, (".npy",), "word2vec's formats are .bin (binary) and text: .vec, .txt")
    found = Compressed.of(folder)
    words, notes = _written(found.words, folder)
    width = found.model.config.hidden_size
    text = " ".join(["%.9g"] * width)

    def as_text(row: npt.NDArray[np.float32]) -> bytes:
        return (text % tuple(row.tolist())).encode()

    def as_bytes(row: npt.NDArray[np.float32]) -> bytes:
        return row.astype("<f4").tobytes()

    encode = as_bytes if kind_of(file) == ".bin" else as_text
    rows = (encode(row) for part in found.parts() for row in part)
    _write(file, (len(words), width), words, rows)
    return notes


def write_codes(folder: Path, file: Path) -> tuple[str, ...]:
    """Write the binary codes of a directory in NLB's format.

    Returns:
        Notes on words that had to be changed, and on bits that NLB's program would not read.

    Raises:
        PlmccError: as `write_vectors`, or the pass makes no binary codes.
    """
    _check_kind(file, (".npy", ".bin"), "NLB's format is text: .nlb, .txt")
    codes = Compressed.of(folder).need_codes("NLB's format")
    words, notes = _written(codes.index_to_key, folder)
    if codes.bits % INTEGER:
        told = f"{codes.bits} bits are no multiple of {INTEGER}: the last integer ends in zeros"
        notes += (f"{told}; plmcc reads them all, the authors' program whole integers only",)
    rows = (" ".join(map(str, row_W.tolist())).encode() for row_W in codes.columns.T)
    _write(file, (len(words), codes.bits), words, rows)
    return notes


def _check_kind(file: Path, refused: tuple[str, ...], hint: str) -> None:
    if kind_of(file) in refused:
        raise error("PLM502", "the name would be read as another format", str(file), hint=hint)


def _written(words: list[str], folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the words without white space, and a note if that changed any."""
    written = [_SPACE.sub("_", word) for word in words]
    changed = [pair for pair in zip(words, written, strict=True) if pair[0] != pair[1]]
    if len(set(written)) < len(words):
        taken = set(words)
        old, new = next((pair for pair in changed if pair[1] in taken), changed[0])
        message = f"`{old}` would be written as `{new}`, which is another word"
        raise error("PLM401", message, str(folder), hint="rename one of them before compressing")
    if not changed:
        return written, ()
    old, new = changed[0]
    return written, (f"white space becomes `_` in {len(changed)} words: `{old}`, `{new}`",)


def _write(file: Path, header: tuple[int, int], words: list[str], rows: Iterable[bytes]) -> None:
    opener: Callable[..., IO[bytes]] = gzip.open if file.suffix == ".gz" else open  # type: ignore[assignment]
    with replace_file(file) as draft, opener(draft, "wb") as stream:
        stream.write(b"%d %d\n" % header)
        for word, row in zip(words, rows, strict=True):
            stream.write(b"%s %s\n" % (word.encode(), row))
