"""Loading word vectors: from a file, or from the directory of a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from plmcc.diagnostics import error
from plmcc.utils.files import check_regular
from plmcc.vectors.codes import Codes, holds_codes, read_codes
from plmcc.vectors.files import Broken, kind_of, read
from plmcc.vectors.keyed import By, Vectors
from plmcc.vectors.model import read as read_directory


@overload
def load(
    file: str | Path,
    words: str | Path | None = None,
    broken: Broken = "refuse",
    by: Literal["cosine"] = "cosine",
) -> Vectors: ...


@overload
def load(
    file: str | Path,
    words: str | Path | None = None,
    broken: Broken = "refuse",
    *,
    by: Literal["hamming"],
) -> Codes: ...


@overload
def load(
    file: str | Path,
    words: str | Path | None = None,
    broken: Broken = "refuse",
    *,
    by: By | None,
) -> Vectors | Codes: ...


def load(
    file: str | Path,
    words: str | Path | None = None,
    broken: Broken = "refuse",
    by: By | None = "cosine",
) -> Vectors | Codes:
    """Read a file of word vectors (`plmcc.vectors.files.read`) or of binary codes
    (`plmcc.vectors.codes.read_codes`), or the directory to which `plmcc apply` has compressed one.

    Args:
        file: what to read.
        words: for `.npy`: a file with the words.
        broken: whether broken lines end the reading or are left out.
        by: `cosine` gives `Vectors`, of a directory the reconstructed ones; `hamming` gives the
            binary `Codes`; None gives codes where there are some.

    Raises:
        PlmccError: it cannot be read, a line is broken and that is refused, or it does not hold
            what `by` asks for.
    """
    file = Path(file)
    check_regular([file])
    if words is not None and kind_of(file) != ".npy":
        message, hint = "a file of words goes with a .npy file", "leave `words` out"
        raise error("PLM502", message, str(file), got=str(words), hint=hint)
    if file.is_dir():
        return read_directory(file, by)
    if by == "hamming" or holds_codes(file):
        if by == "cosine":
            hint = 'compare codes by their bits: `--by hamming`, in Python by="hamming"'
            raise error(
                "PLM301", "the file contains binary codes, not vectors", str(file), hint=hint
            )
        return read_codes(file, broken)
    names, table, notes = read(file, None if words is None else Path(words), broken)
    return Vectors(names, table, notes)
