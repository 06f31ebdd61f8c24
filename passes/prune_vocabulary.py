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

from plmcc.api import Miss, Pass, Site
from plmcc.data import data_files
from plmcc.diagnostics import error
from plmcc.passes._vocabulary import (
    KINDS,
    characters,
    cut,
    definition,
    normalised,
    rebuilt,
    shortened,
    special,
    spelt,
)

if TYPE_CHECKING:
    from plmcc.program import Program
    from plmcc.source import Source

_LINES = 1000


class PruneVocabulary(Pass):
    """Drop the tokens that do not occur in a text, from tokenizer and model."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Abdaoui, Pradel and Sigel, SustaiNLP 2020, arXiv:2010.05609"
    hazards: ClassVar[tuple[str, ...]] = (
        "Words of other text are cut into more tokens, or become the unknown token.",
        "Fidelity, and distillation, are relative to the original with the smaller vocabulary.",
    )

    text: str | list[str]
    """Files of text as the model will read (and write) it, line by line; `.gz` too."""
    min_count: int = Field(1, ge=1)
    """How often a token must occur."""
    keep: int | None = Field(None, ge=1)
    """At most so many tokens, the most frequent, besides those that are always kept."""

    @model_validator(mode="after")
    def _has_no_targets(self) -> PruneVocabulary:
        if self.targets:
            raise ValueError(
                "`targets` has no effect: the vocabulary is the whole model's; remove it"
            )
        return self

    def reads(self) -> list[str]:
        """Return the files of text."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Refuse: when passes are matched, it is too late for another tokenizer."""
        reason = "the tokenizer changes with it: give it to `plmcc apply`, in the first stage"
        for found in program.tables():
            facts = {} if isinstance(found, Miss) else found.facts
            if facts.get("is_input"):
                yield Miss(found.path, reason)

    def prepare(self, source: Source, base: Path | None) -> dict[str, float]:
        """Cut tokenizer and model in place; return how many tokens there were and are.

        Raises:
            PlmccError: the tokenizer or the model is not of a known kind, or nothing is left out.
        """
        tokenizer = source.need_tokenizer("`prune_vocabulary`")
        values = definition(tokenizer)
        kind = type(tokenizer).__name__ if values is None else values["model"]["type"]
        if values is None or kind not in KINDS:
            raise error("PLM303", "this kind of tokenizer cannot be cut", given=kind,
                        allowed=", ".join(KINDS), cure="use a fast tokenizer")  # fmt: skip
        if kind == "WordLevel" and values["model"]["unk_token"] not in values["model"]["vocab"]:
            message = "a tokenizer of whole words without an unknown one cannot read text"
            cure = "leave words out of the file itself"
            raise error("PLM303", message, given=source.name, cure=cure)
        counts, seen = self._count(source, base)
        size = len(counts)
        table = source.model.get_input_embeddings()
        rows = int(table.weight.shape[0])  # type: ignore[index]
        chosen = {int(i) for i in np.flatnonzero(counts >= self.min_count)}
        if self.keep is not None and len(chosen) > self.keep:
            order = np.argsort(-counts, kind="stable")[: self.keep]
            chosen = {int(i) for i in order}
        always = special(values) | characters(values, seen)
        kept = sorted(i for i in spelt(values, chosen | always) if i < rows)
        if not chosen:
            given = f"{int(counts.sum())} tokens in {', '.join(self.reads())}"
            raise error("PLM303", "the text holds no token often enough", given=given,
                        allowed=f"a token that occurs {self.min_count} times")  # fmt: skip
        if len(kept) >= min(size, rows):
            message = f"all {size} tokens are needed: there is nothing to prune"
            raise error("PLM203", message, cure="set `min_count` or `keep`")
        if max(special(values)) >= rows:
            message = f"the tokenizer has {size} tokens, the model only {rows} rows"
            raise error("PLM303", message)
        try:
            cut(source.model, kept)
        except ValueError as problem:
            raise error("PLM203", f"this model cannot be cut: {problem}") from None
        source.retokenized = True
        source.tokenizer = rebuilt(tokenizer, shortened(values, kept))
        return {"tokens_before": float(rows), "tokens": float(len(kept)),
                "text_tokens": float(counts.sum())}  # fmt: skip

    def _count(self, source: Source, base: Path | None) -> tuple[np.ndarray, set[str]]:
        """Return how often each token occurs, and the characters of the text."""
        tokenizer = source.need_tokenizer("`prune_vocabulary`")
        counts = np.zeros(len(tokenizer), dtype=np.int64)
        seen: set[str] = set()
        for file in data_files(self.reads(), base):
            lines = _lines(file)
            while part := list(islice(lines, _LINES)):
                encoded = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                ids = np.fromiter((i for row in encoded for i in row), dtype=np.int64)
                counts += np.bincount(ids, minlength=len(counts))
                seen.update(*(normalised(tokenizer, line) for line in part))
        return counts, seen


def _lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    message = "this is no text: it holds zero bytes"
                    raise error("PLM301", message, f"{file}:{number}", cure="name files of text")
                if line.strip():
                    yield line.rstrip("\r\n")
    except UnicodeDecodeError as problem:
        message = f"this is no text in UTF-8: {problem.reason}"
        raise error("PLM301", message, str(file), cure="name files of text, in UTF-8") from None
