"""How often a text has each token (a helper of the vocabulary pruning pass, not a pass)."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from plmcc.api import error
from plmcc.passes.prune_vocabulary.tokenizers import normalized

_LINES = 1000
_KNOWN = 16


@dataclass(frozen=True)
class Counted:
    """How often each token occurs in files (V,), and the characters that do."""

    counts: np.ndarray
    characters: frozenset[str]

    @classmethod
    def sum(cls, parts: Iterable[Counted]) -> Counted:
        """Return what several files have together."""
        listed = list(parts)
        counts = np.sum([part.counts for part in listed], axis=0)
        return cls(counts, frozenset().union(*(part.characters for part in listed)))


@dataclass(frozen=True)
class Text:
    """The text of one or several languages; `size` tokens are in the vocabulary."""

    size: int
    languages: dict[str, Counted] = field(default_factory=dict)

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each token occurs (V,)."""
        whole: np.ndarray = sum(
            (one.counts for one in self.languages.values()), np.zeros(self.size, np.int64)
        )
        return whole

    @property
    def characters(self) -> set[str]:
        """The characters that occur."""
        return {c for one in self.languages.values() for c in one.characters}

    def weighed(self, weighting: str) -> np.ndarray:
        """Return what each token counts for (V,): its number, or its part of its language."""
        if weighting == "share":
            return self.counts.astype(float)
        parts = [one.counts / max(1, one.counts.sum()) for one in self.languages.values()]
        weighed: np.ndarray = np.sum(parts, axis=0)
        return weighed

    def covered(self, kept: list[int]) -> dict[str, float]:
        """Return the number of tokens in the text, and the part of them that is kept, of the whole
        and of each language."""
        whole = {"coverage": self.counts} | {
            f"coverage_{name}": one.counts for name, one in self.languages.items() if name
        }
        parts = {n: float(c[kept].sum() / c.sum()) for n, c in whole.items() if c.sum()}
        return {"text_tokens": float(self.counts.sum())} | parts


_COUNTED: dict[tuple[object, ...], Counted] = {}
"""What the last files had: several recipes may prune by the same text."""


def counted(tokenizer: PreTrainedTokenizerBase, file: Path) -> Counted:
    """Count the tokens of a file.

    Raises:
        PlmccError: it is not text.
    """
    backend: Any = tokenizer.backend_tokenizer
    state, known = file.stat(), hashlib.sha256(backend.to_str().encode()).hexdigest()
    key = (known, str(file.resolve()), state.st_mtime_ns, state.st_size)
    if key not in _COUNTED:
        while len(_COUNTED) >= _KNOWN:
            _COUNTED.pop(next(iter(_COUNTED)))
        _COUNTED[key] = _count(tokenizer, file)
    return _COUNTED[key]


def _count(tokenizer: PreTrainedTokenizerBase, file: Path) -> Counted:
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    seen: set[str] = set()
    rows = lines(file)
    while part := list(islice(rows, _LINES)):
        encoded = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.fromiter((i for row in encoded for i in row), dtype=np.int64)
        counts += np.bincount(ids, minlength=len(counts))
        seen.update(*(normalized(tokenizer, line) for line in part))
    return Counted(counts, frozenset(seen))


def lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file that are not empty.

    Raises:
        PlmccError: it is not UTF-8 text.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    message = "the file is not text: it contains zero bytes"
                    raise error("PLM301", message, f"{file}:{number}", hint="list text files")
                if line.strip():
                    yield line.rstrip("\r\n")
    except UnicodeDecodeError as problem:
        message = f"the file is not UTF-8 text: {problem.reason}"
        raise error("PLM301", message, str(file), hint="list text files in UTF-8") from None
