"""Words with something to compare them by: what word vectors and binary codes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plmcc.diagnostics import did_you_mean, error

_SAMPLE = 4096
"""Values that bound the smallest of many."""


class Lexicon(Mapping[str, npt.NDArray[Any]]):
    """A mapping from words, with the names of gensim's `KeyedVectors` beside it; abstract.

    Shapes: V words, Q questions.
    """

    index_to_key: list[str]
    key_to_index: dict[str, int]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        """Go through the words."""
        return iter(self.index_to_key)

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.index_to_key)

    @abstractmethod
    def similarity(self, first: str, second: str) -> float:
        """Return how alike two words are.

        Raises:
            PlmccError: a word is not there.
        """

    @abstractmethod
    def distances(self, ids: Sequence[int], signs: Sequence[int]) -> npt.NDArray[Any]:
        """Return how far each word (V,) is from words that are added or taken away, in any unit."""

    @abstractmethod
    def score(self, distance: float, signs: Sequence[int]) -> float:
        """Return the similarity that a distance stands for."""

    @abstractmethod
    def completions(self, ids_Q3: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the word (Q,) that completes each analogy a : b :: c : ?, none of these three."""

    def most_similar(
        self,
        positive: str | Sequence[str],
        negative: str | Sequence[str] = (),
        topn: int = 10,
    ) -> list[tuple[str, float]]:
        """Return the words most similar to the positive words and least to the negative ones,
        without these words, with their similarities. The earlier word comes first in doubt.

        Raises:
            PlmccError: a word is not there.
        """
        plus = [positive] if isinstance(positive, str) else list(positive)
        minus = [negative] if isinstance(negative, str) else list(negative)
        given = [self.index(word) for word in (*plus, *minus)]
        signs = [1] * len(plus) + [-1] * len(minus)
        distances_V = self.distances(given, signs)
        nearest = smallest(distances_V, topn + len(given))
        kept = [int(index) for index in nearest if index not in given][:topn]
        return [(self.index_to_key[i], self.score(float(distances_V[i]), signs)) for i in kept]

    def index(self, word: str) -> int:
        """Return the row of a word.

        Raises:
            PlmccError: it is not there.
        """
        if word not in self.key_to_index:
            near = did_you_mean(word, self.index_to_key[:50_000])
            raise error("PLM301", f"`{word}` has no vector", hint=near)
        return self.key_to_index[word]


def smallest(values_V: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Return the indices of the smallest values, in their order; the earlier index in doubt.

    The `count` smallest of the first few are no smaller than those of all: all that are larger are
    left out before anything is sorted, which takes a tenth of the time of `argpartition`.
    """
    count = min(count, len(values_V))
    first = values_V[: max(_SAMPLE, count)]
    candidates = np.flatnonzero(values_V <= np.partition(first, count - 1)[count - 1])
    order = np.argsort(values_V[candidates], kind="stable")
    return candidates[order[:count]]
