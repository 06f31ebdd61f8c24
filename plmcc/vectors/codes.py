"""Binary codes of words: nearest words by the Hamming distance, and the file format of the authors
of near-lossless binarization (NLB).

Tissier, Gravier and Habrard, AAAI 2019 (1803.09065). The file is text: a line `V n`, then for each
word a line with the word and ⌈n/64⌉ unsigned 64-bit integers in decimal, the first bit being the
highest of the first integer. Where n is no multiple of 64 the last integer ends in zeros. (The
authors' program leaves such bits out instead, and keeps n in the header: that is read too.)
Shapes: V words, n bits, W 64-bit integers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plmcc.diagnostics import error
from plmcc.vectors.files import Broken, Lines, header_of, kind_of, open_file, reading
from plmcc.vectors.lexicon import Lexicon

INTEGER = 64
"""Bits of an integer in the file."""
Bits = npt.NDArray[np.bool_]


@dataclass(eq=False)
class Codes(Lexicon):
    """Words and their binary codes, compared by the share of equal bits (Sokal and Michener):
    1 - Hamming distance / n."""

    index_to_key: list[str]
    columns: npt.NDArray[np.uint64]
    """`(W, V)`: the first bit is the highest of row 0. An integer of all words lies together, so
    that distances are sums of whole arrays."""
    bits: int
    notes: tuple[str, ...] = ()
    key_to_index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Number the words."""
        self.key_to_index = {word: index for index, word in enumerate(self.index_to_key)}

    @classmethod
    def of(cls, words: list[str], packed: npt.NDArray[np.uint8], bits: int) -> Codes:
        """Return the codes of packed rows `(V, ⌈n/8⌉)`, most significant bit first."""
        spare = -packed.shape[1] % (INTEGER // 8)
        rows_VW = np.pad(packed, ((0, 0), (0, spare))).view(">u8")
        return cls(words, np.ascontiguousarray(rows_VW.T, dtype=np.uint64), bits)

    def __getitem__(self, word: str) -> Bits:
        """Return the bits `(n,)` of a word; a KeyError if it has none."""
        integers_W = self.columns[:, self.key_to_index[word]].astype(">u8")
        return np.unpackbits(integers_W.view(np.uint8))[: self.bits].astype(bool)

    def similarity(self, first: str, second: str) -> float:
        """Return the share of bits that two words have in common."""
        pair = self.columns[:, self.index(first)] ^ self.columns[:, self.index(second)]
        return 1 - int(np.bitwise_count(pair).sum()) / self.bits

    def distances(self, ids: Sequence[int], signs: Sequence[int]) -> npt.NDArray[Any]:
        """Return Hamming distances (V,), of several words their signed sum.

        Codes as vectors of -1 and 1 have one length, and their inner products are n - 2·Hamming:
        the order is that of the cosine with the signed sum of such vectors (3CosAdd).
        """
        # Sixteen bits where they suffice: what takes time is memory.
        small = len(ids) * self.bits < np.iinfo(np.int16).max
        total_V = np.zeros(len(self), np.int16 if small else np.int32)
        for index, sign in zip(ids, signs, strict=True):
            add = np.add if sign > 0 else np.subtract
            for column_V in self.columns:
                add(total_V, np.bitwise_count(column_V ^ column_V[index]), out=total_V)
        return total_V

    def score(self, distance: float, signs: Sequence[int]) -> float:
        """Return the signed sum of the shares of equal bits."""
        return sum(signs) - distance / self.bits

    def completions(self, ids_Q3: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the word (Q,) nearest to b - a + c."""
        found = []
        for ids in ids_Q3:
            distances_V = self.distances(ids, (-1, 1, 1))
            distances_V[ids] = np.iinfo(distances_V.dtype).max
            found.append(int(distances_V.argmin()))
        return np.array(found)


def holds_codes(file: Path) -> bool:
    """Say whether a file is in NLB's format: after a header `V n`, a word with ⌈n/64⌉ (or ⌊n/64⌋)
    whole numbers. A file of vectors would have n numbers there, so that only n = 1 is in doubt: it
    counts as vectors."""
    if not file.is_file() or kind_of(file) in (".npy", ".bin"):
        return False
    with reading(file), open_file(file) as stream:
        header, first = header_of(stream.readline()), stream.readline().split()
    if header is None or header[1] < 2:
        return False
    integers = len(first) - 1
    return integers in _counts(header[1]) and all(
        _integer(token) is not None for token in first[1:]
    )


def read_codes(file: Path, broken: Broken = "refuse") -> Codes:
    """Read a file in NLB's format, as plain text or `.gz`.

    Raises:
        PlmccError: the file cannot be read, or a line is broken and that is refused.
    """
    state = Lines(file, broken, "unsigned 64-bit integer")
    with reading(file), open_file(file) as stream:
        header = header_of(stream.readline())
        if header is None or header[1] < 1:
            message = "a file of binary codes begins with the numbers of words and bits"
            hint = "compare vectors by the cosine, or compress them by `binary_embedding`"
            raise error("PLM301", message, f"{file}:1", hint=hint)
        first = stream.readline()
    count, bits = header
    width = max(0, len(first.split()) - 1)
    if width not in _counts(bits):
        message = f"{bits} bits take {_counts(bits)[0]} integers, but the first word has {width}"
        raise error("PLM301", message, f"{file}:2")
    held = width * INTEGER
    note = f"{file}: the header says {bits} bits, and the lines hold {held}"
    notes, bits = (note,) if held < bits else (), min(bits, held)
    integers, number = array("Q"), 1
    with reading(file), open_file(file) as stream:
        stream.readline()
        for number, line in enumerate(stream, 2):
            raw, *tokens = line.split() or [b""]
            values = [_integer(token) for token in tokens]
            row = None if None in values else np.array(values, dtype=np.uint64)
            if not raw:
                continue
            if row is not None and len(row) == width and int(row[-1]) % (1 << (-bits % INTEGER)):
                state.refuse(number, f"there are more bits than the {bits} of the header")
            elif state.add(number, raw, row, width) and row is not None:
                integers.extend(row.tolist())
    state.check_count(count, number)
    if not state.words:
        raise error("PLM301", "the file contains no codes", str(file))
    rows_VW = np.frombuffer(integers, np.uint64).reshape(-1, width)
    return Codes(list(state.words), np.ascontiguousarray(rows_VW.T), bits, (*notes, *state.notes()))


def _counts(bits: int) -> tuple[int, ...]:
    """How many integers a line may have."""
    whole = bits // INTEGER
    return (-(-bits // INTEGER), whole) if whole else (1,)


def _integer(token: bytes) -> int | None:
    value = int(token) if token.isdigit() and len(token) <= 20 else 1 << INTEGER
    return value if value < 1 << INTEGER else None
