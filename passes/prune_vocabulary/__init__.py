"""Vocabulary pruning: tokens that given text does not need leave tokenizer, tables and head.

Abdaoui, Pradel and Sigel, "Load What You Need: Smaller Versions of Multilingual BERT", SustaiNLP
2020 (2010.05609). Text is encoded with the original tokenizer, and what never (or too rarely)
occurs goes; the tokens that stay keep their order and are numbered anew. Always kept: added and
special tokens, the unknown token, bytes to fall back on, the single characters of the text, and
what BPE merges a kept token from; so every text whose tokens were kept is encoded as before, and
the model computes the same from it. What is stored is an ordinary checkpoint with fewer rows, and
a `tokenizer.json`.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from plmcc.api import Miss, Pass, Preparation, Site, TableSite, Values, error, refuse_unused
from plmcc.kit import matching_files
from plmcc.passes.prune_vocabulary.tokenizers import (
    KINDS,
    characters,
    cut,
    definition,
    normalized,
    rebuilt,
    shortened,
    special,
    spelt,
)

if TYPE_CHECKING:
    from plmcc.api import Pretrained, Program

_LINES = 1000


class PruneVocabulary(Pass):
    """Drop the tokens that do not occur in a text, from tokenizer and model."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Abdaoui, Pradel and Sigel, SustaiNLP 2020, arXiv:2010.05609"
    hazards: ClassVar[tuple[str, ...]] = (
        "Words of other texts are split into more tokens, or become the unknown token.",
        "Fidelity, and distillation, are relative to the original with the smaller vocabulary.",
    )

    text: str | list[str]
    """Text files like those the model will read (and write), line by line; `.gz` too."""
    min_count: int = Field(1, ge=1)
    """Minimum number of occurrences of a token."""
    keep: int | None = Field(None, ge=1)
    """Maximum number of tokens, the most frequent ones, besides those always kept."""

    @model_validator(mode="after")
    def _has_no_targets(self) -> PruneVocabulary:
        refuse_unused(self, {"targets": False}, "on the vocabulary, which is the whole model's")
        return self

    def reads(self) -> list[str]:
        """Return the files of text."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Refuse: when passes are matched, it is too late for another tokenizer."""
        reason = "the tokenizer changes with it: give it to `plmcc apply`, in the first stage"
        for found in program.tables():
            if isinstance(found, TableSite) and found.is_input:
                yield Miss(found.path, reason)

    def prepare(self, source: Pretrained, base: Path | None) -> Preparation:
        """Cut the model in place; return the shorter tokenizer and the numbers of tokens.

        Raises:
            PlmccError: the tokenizer or the model is not of a known kind, or nothing is left out.
        """
        tokenizer = source.need_tokenizer("`prune_vocabulary`")
        values = _definition(tokenizer, source.name)
        counts, seen = self._count(source, base)
        size = len(counts)
        table = source.model.get_input_embeddings()
        rows = int(table.weight.shape[0])  # type: ignore[index]
        kept = self._kept(values, counts, seen, rows)
        if len(kept) >= min(size, rows):
            message = f"all {size} tokens are needed: there is nothing to prune"
            raise error("PLM203", message, hint="set `min_count` or `keep`")
        if max(special(values)) >= rows:
            message = f"the tokenizer has {size} tokens, the model only {rows} rows"
            raise error("PLM303", message)
        try:
            changed = cut(source.model, kept)
        except ValueError as problem:
            raise error(
                "PLM203", f"the vocabulary of this model cannot be pruned: {problem}"
            ) from None
        statistics = {"tokens_before": rows, "tokens": len(kept), "text_tokens": counts.sum()}
        return Preparation(
            rebuilt(tokenizer, shortened(values, kept)),
            {name: float(value) for name, value in statistics.items()},
            (f"token ids numbered anew: {', '.join(changed)}",) if changed else (),
        )

    def _kept(self, values: Values, counts: np.ndarray, seen: set[str], rows: int) -> list[int]:
        """Return the ids of the tokens that stay, in order."""
        chosen = {int(i) for i in np.flatnonzero(counts >= self.min_count)}
        if self.keep is not None and len(chosen) > self.keep:
            order = np.argsort(-counts, kind="stable")[: self.keep]
            chosen = {int(i) for i in order}
        if not chosen:
            raise error(
                "PLM303",
                "no token occurs often enough in the text",
                got=f"{int(counts.sum())} tokens in {', '.join(self.reads())}",
                allowed=f"tokens that occur at least {self.min_count} times",
            )
        always = special(values) | characters(values, seen)
        return sorted(i for i in spelt(values, chosen | always) if i < rows)

    def _count(self, source: Pretrained, base: Path | None) -> tuple[np.ndarray, set[str]]:
        """Return how often each token occurs, and the characters of the text."""
        tokenizer = source.need_tokenizer("`prune_vocabulary`")
        counts = np.zeros(len(tokenizer), dtype=np.int64)
        seen: set[str] = set()
        for file in [f for name in self.reads() for f in matching_files(name, base)]:
            lines = _lines(file)
            while part := list(islice(lines, _LINES)):
                encoded = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                ids = np.fromiter((i for row in encoded for i in row), dtype=np.int64)
                counts += np.bincount(ids, minlength=len(counts))
                seen.update(*(normalized(tokenizer, line) for line in part))
        return counts, seen


def _definition(tokenizer: PreTrainedTokenizerBase, name: str) -> Values:
    """Return what a tokenizer is made of, if it is of a kind that can be pruned."""
    values = definition(tokenizer)
    kind = type(tokenizer).__name__ if values is None else values["model"]["type"]
    if values is None or kind not in KINDS:
        raise error(
            "PLM303",
            "this kind of tokenizer cannot be pruned",
            got=kind,
            allowed=", ".join(KINDS),
            hint="use a fast tokenizer",
        )
    if kind == "WordLevel" and values["model"]["unk_token"] not in values["model"]["vocab"]:
        message = "a word-level tokenizer without an unknown token cannot be pruned"
        hint = "remove words from the file itself"
        raise error("PLM303", message, got=name, hint=hint)
    return values


def _lines(file: Path) -> Iterator[str]:
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
