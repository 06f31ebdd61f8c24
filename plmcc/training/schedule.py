"""Which rows make a batch, and which weights make the result: batches by tokens, and averages of
checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from plmcc.api import State


class TokenBatches(Sampler[list[int]]):
    """Batches of rows of like length, with at most so many tokens, padding counted.

    A translation counts with the longer of its two sides, so neither side's padded batch is larger;
    both texts of a labeled pair count. A row that is longer than a whole batch makes a batch of
    its own. Every epoch has its own order, decided by the seed; every row is in one batch of an
    epoch.
    """

    def __init__(self, rows: Dataset, tokens: int, seed: int) -> None:
        self.lengths = _lengths(rows)
        self.tokens, self.seed, self.epoch = tokens, seed, 0
        self._count = len(self._batches(0))

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches(self.epoch + 1)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Cut the rows, sorted by length, into batches, and shuffle these.

        Rows of one length are shuffled before: where batches end, and so their number, stays.
        """
        drawn = random.Random(self.seed * 1_000_003 + epoch)
        noise = [drawn.random() for _ in self.lengths]
        order = sorted(range(len(noise)), key=lambda i: (self.lengths[i], noise[i]))
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0
        for row in order:
            wider = max(longest, self.lengths[row])
            if batch and wider * (len(batch) + 1) > self.tokens:
                batches.append(batch)
                batch, wider = [], self.lengths[row]
            batch.append(row)
            longest = wider
        batches.append(batch)
        drawn.shuffle(batches)
        return batches


def _lengths(rows: Dataset) -> list[int]:
    """The tokens that each row brings to a batch, before padding."""
    names = ("input_ids", "other_ids", "labels")
    columns = [rows[:][name] for name in names if name in rows.column_names]
    columns = [column for column in columns if isinstance(column[0], list)]
    texts = 2 if "other_ids" in rows.column_names else 1
    return [texts * max(map(len, row)) for row in zip(*columns, strict=True)]


class ByEpoch(Sampler[int]):
    """A sampler of transformers whose order depends on nothing but the seed and the epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Hear which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from self.sampler


class Average(TrainerCallback):
    """The mean of the weights at `count` points of a training, summed in float32 as they pass.

    `points` says which; the last step is always one. Of the weights only those that are trained
    change, and only they are averaged. A count of 0 does nothing.
    """

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0
        self.points: set[int] = set()
        self.sums: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Choose the points."""
        epochs = 0.0 if args.max_steps > 0 else args.num_train_epochs
        self.points = set(points(self.count, state.max_steps, epochs))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Add the weights at a point."""
        if state.global_step not in self.points:
            return
        self.taken += 1
        for name, value in _trained(rest["model"]):
            total = self.sums.setdefault(name, torch.zeros_like(value, dtype=torch.float32))
            total += value.detach().float().to(total.device)

    def state(self) -> State:
        """Return the sums so far."""
        return {"taken": self.taken, **self.sums}

    def restore(self, state: State) -> None:
        """Take sums back."""
        self.taken = int(state.pop("taken"))
        self.sums = state

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Give the model the mean."""
        for name, value in _trained(model) if self.taken else ():
            value.copy_((self.sums[name] / self.taken).to(value.dtype))


def points(count: int, steps: int, epochs: float) -> Sequence[int]:
    """Return the steps after which the weights are taken, the last step among them.

    In a run of `count` whole epochs or more these are the ends of the last epochs. In other runs
    (`epochs` is 0 where the steps were given) they are spaced evenly over the last half, and a run
    of fewer than `2 * count` steps has fewer of them.
    """
    if epochs and epochs == int(epochs) and epochs >= count:
        return [steps - i * (steps // int(epochs)) for i in range(count)]
    spaced = (max(1, round(steps - i * steps / (2 * count))) for i in range(count))
    return list(dict.fromkeys(spaced))


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
