"""Adaptive codes in training: lengths follow the task, within a budget, in two phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from plmcc.diagnostics import PlmccError
from plmcc.passes.adaptive_codes import AdaptiveCodes, AdaptiveEmbedding, SoftAdaptive
from plmcc.passes.adaptive_codes.training import AdaptiveTraining
from plmcc.recipe.sections import Train
from plmcc.training.loop import TrainingData, train
from support.embedding_tables import PROGRAM, replaced, site, toy
from support.tiny_models import VOCAB, tiny


def mixed() -> SoftAdaptive:
    """Three codebooks for 60 words, each used by some."""
    soft = AdaptiveCodes(lengths=[3, 5, 12], epochs=2).replace(site(toy(60, 20)), PROGRAM)
    assert isinstance(soft, SoftAdaptive)
    random = torch.Generator().manual_seed(5)
    soft.logits.data = torch.rand(60, 3, generator=random)
    return soft


def training_data() -> TrainingData:
    """Sentences of the tokens 3 to 22 only."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 23, (32, 8), generator=random).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    return TrainingData("text-generation", data, collate)


def trained(steps: int, **options: Any) -> tuple[SoftAdaptive, list[dict[str, float]]]:
    model: Any = tiny("llama")  # its head has a weight of its own
    chosen = AdaptiveCodes(**({"lengths": [2, 24], "epochs": 4} | options))
    (done,) = replaced(model, chosen)
    arguments = {
        "max_steps": steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
    }
    settings = Train.model_validate({"data": {"train": "x.txt"}, "arguments": arguments})
    log = train(model, settings, training_data(), [done])
    assert isinstance(done.soft, SoftAdaptive)
    return done.soft, log


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_lengths_follow_the_task() -> None:
    """Half of the words that the sentences hold get long codes, and none of the others."""
    soft, log = trained(40)
    long = soft.chosen() == 1
    assert soft.selected
    assert int(long[3:23].sum()) > 5
    assert not long[:3].any()
    assert not long[23:].any()
    lengths = [entry["mean_length"] for entry in log if "mean_length" in entry]
    assert len(set(lengths[20:])) == 1, "lengths are fixed in the second half"
    assert len(set(lengths[:20])) > 1
    assert lengths[-1] == pytest.approx(soft.mean_length())
    assert all(entry["relative_error"] > 0 for entry in log if "relative_error" in entry)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_a_budget_holds_after_training() -> None:
    soft, _ = trained(10, bits_per_word=6.0)
    assert 4.5 < soft.mean_length() + 1 <= 6.0
    hard = soft.harden()
    assert isinstance(hard, AdaptiveEmbedding)
    assert hard.code_bits + VOCAB * hard.selector_bits <= 6.0 * VOCAB


def test_the_clock_and_the_losses() -> None:
    soft = mixed().train()
    objective = AdaptiveCodes(reconstruction_weight=2.0, selection=0.25).objective(
        site(toy(60, 20)), soft
    )
    assert isinstance(objective, AdaptiveTraining)
    objective.advance(0.2)
    assert not soft.selected
    loss = objective.loss({}, {}, None)
    assert loss is not None
    loss.backward()
    gradients = soft.codebooks.grad
    assert gradients is not None
    assert gradients.any(1).all(), "every codebook learns the table"
    objective.advance(0.25)
    assert soft.selected
    books = [book.detach() for book in soft.codebooks.split(soft.lengths)]
    expected = sum(
        float((book @ book.T - torch.eye(len(book))).square().sum()) / len(book) for book in books
    )
    assert float(soft.orthogonality().detach()) == pytest.approx(expected)
    every = torch.arange(60)
    with torch.no_grad():
        error = (soft.weight - soft.table * soft.span).square().sum()
        size = (soft.table * soft.span).square().sum()
    assert float(soft.distance(every).detach()) == pytest.approx(float(error / size), rel=1e-4)
    rates = AdaptiveCodes(codebook_learning_rate=0.5).objective(site(toy(60, 20)), soft)
    assert rates is not None
    assert [group["lr"] for group in rates.parameter_groups()] == [0.05, 0.5]
    assert len(objective.parameter_groups()) == 1


def test_too_few_steps_are_refused() -> None:
    objective = AdaptiveCodes(selection=0.9).objective(site(toy(60, 20)), mixed())
    assert objective is not None
    objective.begin(10)
    for steps in (1, 5):
        with pytest.raises(PlmccError, match=f"{steps} steps are too few"):
            objective.begin(steps)


def test_without_a_budget_it_has_to_be_trained() -> None:
    assert "without training" in AdaptiveCodes().needs_training()
    assert AdaptiveCodes(bits_per_word=64).needs_training() == ""
    assert AdaptiveCodes(lengths=[64]).needs_training() == ""
