"""Greedy and beam search over any `Beams`, with the results of transformers' `generate`, in pure
torch.

Shape suffixes: B sentences, A sentences still open, N beams (1 in greedy search), C candidates, L
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_NEVER = -1.0e9  # the score that transformers gives to what must not be chosen
_FEW = 0.75  # rows are dropped when less than this part of them is still needed


@dataclass(frozen=True)
class GenerationSettings:
    """What to search for; the fields are those of `transformers.GenerationConfig`. `max_length`
    counts the start token too."""

    max_length: int
    start: int
    eos: tuple[int, ...]
    pad: int
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    forced_bos: int | None = None
    forced_eos: int | None = None
    banned: tuple[int, ...] = ()
    """Tokens that are never written (`bad_words_ids` of one token each)."""
    renormalized: bool = False
    """Whether probabilities are shares of those of tokens that may be written
    (`renormalize_logits`)."""

    @property
    def restrictions(self) -> tuple[tuple[int, ...], bool]:
        """What a program for a step has to know of the search."""
        return self.banned, self.renormalized

    @property
    def candidates(self) -> int:
        """How many continuations a step needs: enough that N remain when others have ended."""
        return 1 if self.num_beams == 1 else max(2, 1 + len(self.eos)) * self.num_beams

    def forced(self, length: int) -> int | None:
        """Return the token that must follow `length` tokens, if there is one."""
        if length == self.max_length - 1 and self.forced_eos is not None:
            return self.forced_eos
        return self.forced_bos if length == 1 else None


class BeamState(Protocol):
    """Sentences being translated, each with its beams."""

    def step(self, token_AN: Tensor, parent_AN: Tensor) -> tuple[Tensor, Tensor]:
        """Read a token in each beam, after the tokens of the sentence's beam `parent_AN`; return
        log probabilities and ids of the best next tokens, `scores_ANC` and `tokens_ANC`, best
        first. In greedy search the scores are logits."""

    def keep(self, index_A: Tensor) -> None:
        """Go on with these sentences, in this order."""


def search_tokens(beams: BeamState, batch: int, search: GenerationSettings) -> Tensor:
    """Translate `batch` sentences.

    Returns:
        `tokens_BL` (int64), from the start token on, padded as transformers pads.
    """
    if search.num_beams == 1:
        found, filler = _greedy(beams, batch, search), search.pad
    else:
        # transformers 5 writes `pad or eos`, and token 0 is false.
        found, filler = _beam(beams, batch, search), search.pad or search.eos[0]
    longest = max(map(len, found))
    return torch.tensor([tokens + [filler] * (longest - len(tokens)) for tokens in found])


def _greedy(beams: BeamState, batch: int, search: GenerationSettings) -> list[list[int]]:
    found = [[search.start] for _ in range(batch)]
    sentences = list(range(batch))  # those that `beams` still has
    ended = [False] * batch
    token_A = torch.full((batch,), search.start)
    itself_AN = torch.zeros(batch, 1, dtype=torch.long)
    for length in range(1, search.max_length):
        _, tokens_ANC = beams.step(token_A[:, None], itself_AN[: len(token_A)])
        token_A = _or_forced(tokens_ANC[:, 0, 0], search.forced(length))
        for sentence, token in zip(sentences, token_A.tolist(), strict=True):
            if not ended[sentence]:
                found[sentence].append(token)
                ended[sentence] = token in search.eos
        going = [at for at, sentence in enumerate(sentences) if not ended[sentence]]
        if not going:
            break
        if len(going) <= _FEW * len(sentences):
            index_A = torch.tensor(going)
            beams.keep(index_A)
            sentences = [sentences[at] for at in going]
            token_A = token_A[index_A]
    return found


def _or_forced(token_A: Tensor, forced: int | None) -> Tensor:
    return token_A if forced is None else torch.full_like(token_A, forced)


def _beam(beams: BeamState, batch: int, search: GenerationSettings) -> list[list[int]]:
    width = search.candidates
    state = _Beams.of(batch, search)
    eos_E = torch.tensor(search.eos)
    results: list[list[int]] = [[] for _ in range(batch)]
    for length in range(1, search.max_length):
        scores_ANC, tokens_ANC = beams.step(state.tokens_ANL[:, :, -1], state.parents_AN)
        total_ANC = scores_ANC[..., :width] + state.scores_AN[:, :, None]
        scores_AC, flat_AC = total_ANC.flatten(1).topk(width)
        parents_AC = flat_AC // width
        tokens_AC = tokens_ANC[..., :width].flatten(1).gather(1, flat_AC)
        forced = search.forced(length)
        if forced is not None:
            scores_AC, parents_AC, tokens_AC = _forced(state, forced, length, width)
        ends_AC = torch.isin(tokens_AC, eos_E)
        if length == search.max_length - 1:
            ends_AC = torch.ones_like(ends_AC)
        open_A = state.advance(scores_AC, parents_AC, tokens_AC, ends_AC, length)
        going = open_A.nonzero()[:, 0]
        if not len(going) or length == search.max_length - 1:
            state.report(results)
            break
        if len(going) <= _FEW * len(open_A):
            state.report(results)
            state.keep(going)
            beams.keep(going)
    return results


@dataclass
class _Beams:
    """The state of beam search: open hypotheses and, for each sentence, the best ended ones."""

    search: GenerationSettings
    sentence_A: Tensor
    scores_AN: Tensor
    tokens_ANL: Tensor
    parents_AN: Tensor
    best_AN: Tensor
    best_tokens_ANL: Tensor  # up to `max_length`
    best_length_AN: Tensor
    ended_AN: Tensor
    improvable_A: Tensor

    @classmethod
    def of(cls, batch: int, search: GenerationSettings) -> _Beams:
        shape = (batch, search.num_beams)
        scores = torch.full(shape, _NEVER)
        scores[:, 0] = 0
        return cls(
            search,
            sentence_A=torch.arange(batch),
            scores_AN=scores,
            tokens_ANL=torch.full((*shape, 1), search.start),
            parents_AN=torch.zeros(shape, dtype=torch.long),
            best_AN=torch.full(shape, _NEVER),
            best_tokens_ANL=torch.full((*shape, search.max_length), search.start),
            best_length_AN=torch.ones(shape, dtype=torch.long),
            ended_AN=torch.zeros(shape, dtype=torch.bool),
            improvable_A=torch.ones(batch, dtype=torch.bool),
        )

    def advance(
        self, scores_AC: Tensor, parents_AC: Tensor, tokens_AC: Tensor, ends_AC: Tensor, length: int
    ) -> Tensor:
        """Add a token: the best candidates go on or end. Return which sentences are still open."""
        beams, search = self.search.num_beams, self.search
        before_ACL = self.tokens_ANL.gather(1, _wide(parents_AC, length))
        tokens_ACL = torch.cat([before_ACL, tokens_AC[:, :, None]], -1)
        going_AC = scores_AC + ends_AC * _NEVER
        index_AN = going_AC.topk(beams).indices
        self.scores_AN = going_AC.gather(1, index_AN)
        self.parents_AN = parents_AC.gather(1, index_AN)
        self.tokens_ANL = tokens_ACL.gather(1, _wide(index_AN, length + 1))
        ended_AN = ends_AC[:, :beams]
        if ended_AN.any():
            self._end(scores_AC[:, :beams], tokens_ACL[:, :beams], ended_AN, length)
        # Can the best open hypothesis still beat the worst of the ended ones?
        span = search.max_length - 1 if self._patient else length
        hope_A = self.scores_AN[:, 0] / span**search.length_penalty
        worst_A = torch.where(self.ended_AN, self.best_AN.amin(1, keepdim=True), _NEVER).amin(1)
        self.improvable_A = self.improvable_A & (hope_A > worst_A)
        return self.improvable_A & ~self._full

    def _end(self, scores_AN: Tensor, tokens_ANL: Tensor, ended_AN: Tensor, length: int) -> None:
        """Put hypotheses that have just ended among the best."""
        scores_AN = scores_AN / length**self.search.length_penalty
        closed_A = ~self.improvable_A | self._full
        scores_AN = scores_AN + closed_A[:, None] * _NEVER + ~ended_AN * _NEVER
        padded_ANL = torch.zeros_like(self.best_tokens_ANL)
        padded_ANL[:, :, : length + 1] = tokens_ANL
        merged = torch.cat([self.best_AN, scores_AN], 1)
        index_AN = merged.topk(self.search.num_beams).indices
        self.best_AN = merged.gather(1, index_AN)
        lengths = torch.cat(
            [self.best_length_AN, torch.full_like(self.best_length_AN, length + 1)], 1
        )
        self.best_length_AN = lengths.gather(1, index_AN)
        self.ended_AN = torch.cat([self.ended_AN, ended_AN], 1).gather(1, index_AN)
        self.best_tokens_ANL = torch.cat([self.best_tokens_ANL, padded_ANL], 1).gather(
            1, _wide(index_AN, self.search.max_length)
        )

    @property
    def _patient(self) -> bool:
        return self.search.early_stopping == "never" and self.search.length_penalty > 0

    @property
    def _full(self) -> Tensor:
        if self.search.early_stopping is True:
            return self.ended_AN.all(1)
        return torch.zeros_like(self.improvable_A)

    def keep(self, index_A: Tensor) -> None:
        """Go on with these sentences only."""
        for name in (
            "sentence_A",
            "scores_AN",
            "tokens_ANL",
            "parents_AN",
            "best_AN",
            "best_tokens_ANL",
            "best_length_AN",
            "ended_AN",
            "improvable_A",
        ):
            setattr(self, name, getattr(self, name)[index_A])

    def report(self, results: list[list[int]]) -> None:
        """Write each sentence's best ended hypothesis to its place in `results`."""
        lengths = self.best_length_AN[:, 0].tolist()
        tokens = self.best_tokens_ANL[:, 0].tolist()
        for sentence, row, length in zip(self.sentence_A.tolist(), tokens, lengths, strict=True):
            results[sentence] = row[:length]


def _wide(index_AC: Tensor, length: int) -> Tensor:
    return index_AC[:, :, None].expand(-1, -1, length)


def _forced(state: _Beams, token: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates when every open hypothesis has to continue with one token, at no cost."""
    scores_AN = state.scores_AN
    missing = width - scores_AN.shape[1]
    scores_AN, parents_AN = scores_AN.sort(dim=1, descending=True, stable=True)
    scores_AC = torch.nn.functional.pad(scores_AN, (0, missing), value=float("-inf"))
    parents_AC = torch.nn.functional.pad(parents_AN, (0, missing))
    return scores_AC, parents_AC, torch.full_like(parents_AC, token)
