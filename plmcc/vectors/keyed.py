"""Word vectors in memory: as a dictionary with gensim's names, nearest words and evaluation.

```python
vectors = load("glove.txt.gz")  # from plmcc.vectors import load
vectors["king"]; vectors.most_similar("king", topn=5)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from plmcc.diagnostics import error
from plmcc.vectors.files import Table, is_number
from plmcc.vectors.lexicon import Lexicon

By = Literal["cosine", "hamming"]


@dataclass(eq=False)
class Vectors(Lexicon):
    """Words and their vectors, compared by the cosine."""

    index_to_key: list[str]
    vectors: Table
    """`(V, D)`, float32."""
    notes: tuple[str, ...] = ()
    key_to_index: dict[str, int] = field(init=False, repr=False)
    _unit: Table | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        """Number the words."""
        self.key_to_index = {word: index for index, word in enumerate(self.index_to_key)}

    def __getitem__(self, word: str) -> Table:
        """Return the vector `(D,)` of a word; a KeyError if it has none."""
        row: Table = self.vectors[self.key_to_index[word]]
        return row

    @property
    def vector_size(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def unit(self) -> Table:
        """Return the vectors at length 1, `(V, D)`."""
        if self._unit is None:
            norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
            self._unit = self.vectors / np.maximum(norms, 1e-12)
        return self._unit

    def similarity(self, first: str, second: str) -> float:
        """Return the cosine of two words' vectors."""
        unit = self.unit()
        return float(unit[self.index(first)] @ unit[self.index(second)])

    def distances(self, ids: Sequence[int], signs: Sequence[int]) -> Table:
        """Return the negative cosines (V,) with the signed sum of unit vectors."""
        query_D = np.array(signs, dtype=np.float32) @ self.unit()[list(ids)]
        distances_V: Table = self.unit() @ (-query_D / max(float(np.linalg.norm(query_D)), 1e-12))
        return distances_V

    def score(self, distance: float, signs: Sequence[int]) -> float:
        """Return the cosine."""
        return -distance

    def completions(self, ids_Q3: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the word (Q,) with the largest cosine with b - a + c."""
        unit, found = self.unit(), []
        for part in np.array_split(ids_Q3, max(1, len(ids_Q3) // 256)):
            query = unit[part[:, 1]] - unit[part[:, 0]] + unit[part[:, 2]]
            scores = query @ unit.T
            np.put_along_axis(scores, part, -np.inf, axis=1)
            found.append(scores.argmax(1))
        return np.concatenate(found)


def analogy(text: str) -> tuple[str, str, str] | None:
    """Return the three words of `a:b::c:?`, None if the text is a word.

    Raises:
        PlmccError: it looks like an analogy and is none.
    """
    if "::" not in text:
        return None
    left, right = text.split("::", 1)
    words = (*left.split(":"), *right.split(":"))
    if len(words) != 4 or words[3] != "?" or not all(words):
        message = "an analogy is written a:b::c:?"
        raise error("PLM502", message, got=text, hint="man:king::woman:?")
    return words[0], words[1], words[2]


@dataclass(frozen=True)
class Score:
    """How vectors do on a data set: Spearman's rho of similarities, or the part of analogies
    answered rightly, both in percent."""

    dataset: str
    kind: str
    score: float
    used: int
    out_of_vocabulary: float
    """The part of its rows that has a word without a vector, in percent."""


def evaluate(vectors: Lexicon, file: str | Path) -> Score:
    """Judge vectors, or codes, by a data set: pairs of words with a similarity (columns separated
    by white space, commas or semicolons), or analogies in the form of word2vec's
    `questions-words.txt`.

    Raises:
        PlmccError: the file holds neither, or none of its words has a vector.
    """
    file = Path(file)
    rows = _rows(file)
    known = {word.lower(): word for word in reversed(vectors.index_to_key)}
    known.update({word: word for word in vectors.index_to_key})
    if all(len(row) == 4 for _, row in rows):
        return _analogies(vectors, file, [row for _, row in rows], known)
    return _similarities(vectors, file, rows, known)


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """Return the rows with their line numbers."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error("PLM301", "the file does not exist", str(file)) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error("PLM301", f"it cannot be read: {problem}", str(file)) from None
    rows = [
        (number, line.replace(",", " ").replace(";", " ").split())
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not line.startswith((":", "#"))
    ]
    first = rows[0][1] if rows else []
    if len(first) >= 3 and not is_number(first[2]) and len(first) != 4:
        rows = rows[1:]  # a header
    if not rows or any(len(row) < 3 for _, row in rows):
        message = "the lines are neither word pairs with a similarity nor analogies of four words"
        raise error("PLM301", message, str(file))
    return rows


def _found(words: Sequence[str], known: Mapping[str, str]) -> list[str] | None:
    found = [known.get(word) or known.get(word.lower()) for word in words]
    return [w for w in found if w is not None] if all(w is not None for w in found) else None


def _similarities(
    vectors: Lexicon, file: Path, rows: list[tuple[int, list[str]]], known: Mapping[str, str]
) -> Score:
    ours, theirs = [], []
    for number, row in rows:
        if not is_number(row[2]):
            given = " ".join(row)
            raise error("PLM301", "the third column is not a number", f"{file}:{number}", got=given)
        pair = _found(row[:2], known)
        if pair is not None:
            ours.append(vectors.similarity(*pair))
            theirs.append(float(row[2]))
    if len(ours) < 2:
        raise error("PLM301", "fewer than two of its pairs have vectors", str(file))
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        whose = "its own" if len(set(theirs)) == 1 else "the vectors'"
        message = f"no rank correlation: all {len(ours)} of {whose} similarities are equal"
        raise error("PLM301", message, str(file))
    rho = 100 * float(spearmanr(ours, theirs).statistic)
    return Score(file.stem, "similarity", rho, len(ours), 100 * (1 - len(ours) / len(rows)))


def _analogies(
    vectors: Lexicon, file: Path, rows: list[list[str]], known: Mapping[str, str]
) -> Score:
    """3CosAdd, the three given words excluded."""
    found = [words for row in rows if (words := _found(row, known)) is not None]
    if not found:
        raise error("PLM301", "none of its analogies has vectors for all words", str(file))
    index = vectors.key_to_index
    ids = np.array([[index[word] for word in words] for words in found])
    right = int((vectors.completions(ids[:, :3]) == ids[:, 3]).sum())
    share = 100 * (1 - len(found) / len(rows))
    return Score(file.stem, "analogy", 100 * right / len(found), len(found), share)
