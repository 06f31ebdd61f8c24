"""A model with its tokenizer, as `Pass.prepare` gets it, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pretrained(Protocol):
    """A loaded model; `plmcc.models.source.Source` is one."""

    @property
    def model(self) -> PreTrainedModel:
        """The model; a pass changes it in place."""

    @property
    def name(self) -> str:
        """The directory or hub id."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of a sentence encoder, one of which precedes every text."""

    def need_tokenizer(self, why: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer, or raise a `PlmccError` where there is none."""


@dataclass(frozen=True)
class Preparation:
    """What `Pass.prepare` did."""

    tokenizer: PreTrainedTokenizerBase
    """Replaces that of the model."""
    statistics: dict[str, float]
    """For the report."""
    notes: tuple[str, ...] = ()
    """What the user should know."""
