"""Vocabulary pruning: tokens that given text does not need leave tokenizer, tables and head.

Abdaoui, Pradel and Sigel, "Load What You Need: Smaller Versions of Multilingual BERT", SustaiNLP
2020 (2010.05609). Text is encoded with the original tokenizer, and what never (or too rarely)
occurs goes; the tokens that stay keep their order and are numbered anew. Always kept: added and
special tokens, the unknown token, bytes to fall back on, the model's prompts, the single characters
of the text, and what BPE merges a kept token from; so every text whose tokens were kept is encoded
as before, and the model computes the same from it. What is stored is an ordinary checkpoint with
fewer rows, and a `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from plmcc.api import (
    Miss,
    Pass,
    Preparation,
    Site,
    TableSite,
    Values,
    error,
    refuse_unused,
)
from plmcc.kit import matching_files
from plmcc.passes.prune_vocabulary.scripts import LANGUAGES, in_scripts
from plmcc.passes.prune_vocabulary.text import Counted, Text, counted
from plmcc.passes.prune_vocabulary.tokenizers import (
    KINDS,
    Spelling,
    characters,
    cut,
    definition,
    probable,
    readable,
    rebuilt,
    shortened,
    special,
    unknown_token,
)

# fmt: off
Language = Literal[
    "af", "am", "ar", "az", "be", "bg", "bn", "bs", "ca", "cs", "cy", "da", "de", "el", "en",
    "es", "et", "eu", "fa", "fi", "fil", "fr", "ga", "gl", "gu", "ha", "he", "hi", "hr", "hu",
    "hy", "id", "is", "it", "ja", "ka", "kk", "km", "kn", "ko", "ky", "lo", "lt", "lv", "mk",
    "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl", "no", "pa", "pl", "ps", "pt", "ro", "ru",
    "si", "sk", "sl", "so", "sq", "sr", "sv", "sw", "ta", "te", "th", "tr", "uk", "ur", "uz",
    "vi", "zh",
]
# fmt: on
"""ISO 639 codes of languages whose scripts are known."""
_ROUNDING = 1e-9  # of a sum of floats
_UNKNOWN, _NOTED = 0.3, 0.01  # parts of a text that the tokenizer does not know

if TYPE_CHECKING:
    from plmcc.api import Pretrained, Program


class PruneVocabulary(Pass):
    """Drop the tokens that do not occur in a text, from tokenizer and model."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Abdaoui, Pradel and Sigel, SustaiNLP 2020, arXiv:2010.05609"
    hazards: ClassVar[tuple[str, ...]] = (
        "Words of other texts are split into more tokens, or become the unknown token.",
        "Distillation, and the fidelity of language models, are relative to the original with the "
        "smaller vocabulary.",
    )

    text: str | list[str] | dict[str, str | list[str]] | None = None
    """Text files like those the model will read (and write), line by line; `.gz` too. As a mapping,
    the files of each language: `{de: [a.txt, b.txt], en: c.txt}`."""
    weighting: Literal["share", "alike"] = "share"
    """Of a mapping of languages: `share` counts every token once, so that a language weighs as much
    as it has text; with `alike` all languages weigh the same."""
    languages: list[Language] = Field(default_factory=list)
    """Where there is no text: languages such as `de`, whose scripts tokens are kept of."""
    min_count: int = Field(1, ge=1)
    """Minimum number of occurrences of a token."""
    coverage: float | None = Field(None, gt=0, le=1)
    """Keep the most frequent tokens that make up this part of the tokens of the text. With `keep`,
    the smaller number decides."""
    keep: int | None = Field(None, ge=1)
    """Maximum number of tokens, those that are always kept included; the most frequent stay."""
    unseen: int = Field(0, ge=0)
    """Number of further tokens for words that the text does not have: the most probable ones by the
    tokenizer itself that are written with characters of the text."""
    multiple_of: int = Field(1, ge=1)
    """Round the number of tokens up to a multiple, as matrix products of GPUs prefer."""

    @model_validator(mode="after")
    def _has_no_targets(self) -> PruneVocabulary:
        refuse_unused(self, {"targets": False}, "on the vocabulary, which is the whole model's")
        return self

    @model_validator(mode="after")
    def _counts_text_or_knows_scripts(self) -> PruneVocabulary:
        if self.text is None and not self.languages:
            raise ValueError("`text` is missing: list files, or `languages` where there is none")
        if self.text is not None and self.languages:
            raise ValueError("`languages` has no effect with `text`: remove it")
        used = dict.fromkeys(("min_count", "coverage", "keep", "unseen"), self.text is not None)
        refuse_unused(self, used, "without `text`")
        used = {"weighting": isinstance(self.text, dict)}
        refuse_unused(self, used, "without a mapping of languages in `text`")
        if self.keep is not None and self.keep % self.multiple_of:
            raise ValueError(f"`keep` is no multiple of {self.multiple_of}")
        return self

    def reads(self) -> list[str]:
        """Return the files of text."""
        named = list(self.text.values()) if isinstance(self.text, dict) else [self.text or []]
        return [file for files in named for file in ([files] if isinstance(files, str) else files)]

    def _files(self) -> dict[str, list[str]]:
        """Return the files by language; without languages, by nothing."""
        named = self.text if isinstance(self.text, dict) else {"": self.text} if self.text else {}
        return {n: [files] if isinstance(files, str) else list(files) for n, files in named.items()}

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
        text = self._count(source, base)
        rows = int(source.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        size = min(len(tokenizer), rows)
        if max(special(values)) >= rows:
            message = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows"
            raise error("PLM303", message)
        prompts = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in source.prompts]
        kept, always = self._kept(values, text, {i for ids in prompts for i in ids}, size)
        if len(kept) >= size:
            message = f"all {size} tokens are needed: there is nothing to prune"
            raise error("PLM203", message, hint="set `coverage`, `min_count` or `keep`")
        notes = [_told(text, kept, values)]
        try:
            changed = cut(source.model, kept)
        except ValueError as problem:
            raise error(
                "PLM203", f"the vocabulary of this model cannot be pruned: {problem}"
            ) from None
        statistics = {"tokens_before": rows, "tokens": len(kept), "always_kept": always}
        return Preparation(
            rebuilt(tokenizer, shortened(values, kept)),
            {name: float(value) for name, value in statistics.items()} | text.covered(kept),
            (*notes, *([f"token ids numbered anew: {', '.join(changed)}"] if changed else [])),
        )

    def _kept(
        self, values: Values, text: Text, prompts: set[int], size: int
    ) -> tuple[list[int], int]:
        """Return the ids of the tokens that stay, in order, and how many of them stay whatever the
        text says."""
        spelling = Spelling(values)
        always = special(values) | characters(values, text.characters) | prompts
        if self.languages:
            scripts = {script for name in self.languages for script in LANGUAGES[name]}
            always |= {i for piece, i in readable(values) if in_scripts(piece, scripts)}
        always = {i for i in spelling.parts(always) if i < size}
        often = [int(i) for i in np.argsort(-text.weighed(self.weighting)[:size], kind="stable")]
        wanted = {i for i in spelling.parts({*self._chosen(text, often, always)}) if i < size}
        wanted |= always
        if self.unseen:
            likely = [i for i in probable(values, text.characters) if i < size]
            wanted = spelling.filled(wanted, likely, len(wanted) + self.unseen)
        if self.keep is not None and len(wanted) > self.keep:
            if len(always) > self.keep:
                message = "special, byte and character tokens, which are always kept, are more"
                given, hint = str(self.keep), f"set `keep` to at least {len(always)}"
                raise error("PLM203", message, got=f"keep: {given}", hint=hint)
            wanted = spelling.filled(always, often, self.keep)
        count = -(-len(wanted) // self.multiple_of) * self.multiple_of
        whole = spelling.filled(wanted, often, min(count, size))
        return sorted(whole), len(always)

    def _chosen(self, text: Text, often: list[int], always: set[int]) -> list[int]:
        """Return the tokens that occur often enough, of those in an order that begins with the most
        frequent."""
        chosen = [i for i in often if text.counts[i] >= self.min_count]
        if not (chosen or self.languages):
            raise error(
                "PLM303",
                "no token occurs often enough in the text",
                got=f"{int(text.counts.sum())} tokens in {', '.join(self.reads())}",
                allowed=f"tokens that occur at least {self.min_count} times",
            )
        if self.coverage is None:
            return chosen
        counts = text.weighed(self.weighting)
        reached = counts[[*always]].sum()
        enough = (self.coverage - _ROUNDING) * counts.sum()
        for place, index in enumerate(chosen):
            if reached >= enough:
                return chosen[:place]
            reached += 0 if index in always else counts[index]
        return chosen

    def _count(self, source: Pretrained, base: Path | None) -> Text:
        """Return what the text has."""
        tokenizer = source.need_tokenizer("`prune_vocabulary`")
        found = {
            name: Counted.sum(
                counted(tokenizer, file) for given in files for file in matching_files(given, base)
            )
            for name, files in self._files().items()
        }
        return Text(len(tokenizer), found)


def _told(text: Text, kept: list[int], values: Values) -> str:
    """Say how many tokens stay, and how much of the text they are.

    Raises:
        PlmccError: most of the text are tokens that stand for what the tokenizer does not know.
    """
    total = max(1, int(text.counts.sum()))
    unknown = unknown_token(values)
    lost = int(text.counts[unknown]) / total if unknown is not None else 0.0
    if lost > _UNKNOWN:
        message = f"the tokenizer reads {lost:.0%} of the text as unknown tokens"
        hint = "use text in a language of the model"
        raise error("PLM303", message, ", ".join(text.languages) or "text", hint=hint)
    parts = {n.removeprefix("coverage_"): v for n, v in text.covered(kept).items() if "cov" in n}
    whole = parts.pop("coverage", None)
    if whole is None:
        return f"{len(kept):,} tokens stay"
    by_language = ", ".join(f"{name} {part:.2%}" for name, part in parts.items())
    more = f" ({by_language})" if by_language else ""
    unread = f"; {lost:.1%} of it are unknown tokens" if lost > _NOTED else ""
    return f"{len(kept):,} tokens stay: {whole:.2%} of those of the text{more}{unread}"


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
