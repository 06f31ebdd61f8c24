"""Movement pruning in whole runs: stages, targets, refilled zeros, distillation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import plmcc
from plmcc import Data, Distill, PlmccError, Train
from plmcc.artifact import format as artifact
from plmcc.artifact.verify import outputs
from plmcc.data.collate import collator
from plmcc.data.pooling import Pooling
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.passes.movement_pruning.budget import PenaltyController
from plmcc.passes.movement_pruning.masks import ScoreGroup
from plmcc.passes.movement_pruning.trainable import PrunableLayer, refilled
from plmcc.rewrite import Replacement, harden_all, match, replace_all
from plmcc.training.distillation import Distillation
from plmcc.training.loop import TrainingData, train
from support.pruning import prunable
from support.tiny_models import VOCAB, inputs, tiny
from support.tokenizers import words

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*:UserWarning", "ignore:.*pin_memory.*:UserWarning"
)


def sized(task: str = "SequenceClassification", layers: int = 2) -> PreTrainedModel:
    """A BERT with 8 heads and 96 neurons a layer."""
    torch.manual_seed(0)
    make: Any = transformers.BertConfig
    config = make(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=96,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        attn_implementation="eager",
    )
    model: PreTrainedModel = getattr(transformers, f"BertFor{task}")(config)
    model.train(False)
    return model


def replaced(model: PreTrainedModel, **options: Any) -> list[Replacement]:
    return replace_all(model, match(model, [MovementPruning(**options)]))


def score_groups(done: list[Replacement]) -> list[ScoreGroup]:
    softs = [one.soft for one in done]
    return [
        score_group
        for soft in softs
        if isinstance(soft, PrunableLayer)
        for score_group in soft.score_groups()
    ]


def training_data(**options: Any) -> TrainingData:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCAB, (64, 8), generator=random)
    rows: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": [[1] * 8] * 64}
    rows["labels"] = (ids[:, 0] % 2).tolist()
    task = "text-classification"
    return TrainingData(task, Dataset.from_dict(rows), collator(task, words()), **options)


def settings(steps: int, distill: Distill | None = None, **arguments: Any) -> Train:
    given: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "logging_steps": 1,
    } | arguments
    return Train(data=Data(train="synthetic"), arguments=given, distill=distill)


def encoder(model: Any) -> nn.Module:
    found: nn.Module = model.bert.encoder
    return found


def nonzero(module: nn.Module) -> int:
    return sum(int((p != 0).sum()) for p in module.parameters())


# --- learning


@pytest.mark.parametrize("granularity", ["weight", "structured", {"hybrid": [8, 8]}])
def test_a_pruned_model_learns_its_task(granularity: Any, tmp_path: Path) -> None:
    model = sized()
    done = replaced(model, granularity=granularity, density=0.25)
    log = train(model, settings(150), training_data(), done)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5
    assert all(
        score_group.scores is not None and score_group.scores.any()
        for score_group in score_groups(done)
    )
    records = harden_all(model, done)
    metrics = [one.soft.statistics() for one in done]
    assert all(f["nonzero_weights"] <= 0.26 * f["weights"] for f in metrics)
    artifact.adopt(model, records)
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    one, two = (outputs(m, inputs("bert"))["output"] for m in (model, again))
    assert torch.equal(one, two)


def test_m10_embeddings_can_stay_as_they_are() -> None:
    model = sized()
    before = {name: value.clone() for name, value in model.named_parameters()}
    done = replaced(model, density=0.5)
    train(
        model,
        settings(10).model_copy(update={"trainable": "all_but_embeddings"}),
        training_data(),
        done,
    )
    after = dict(model.named_parameters())
    tables = {name for name in before if name.endswith("_embeddings.weight")}
    assert len(tables) == 3
    for name in tables:
        assert after[name].grad is None
        assert after[name].requires_grad  # as it was
        assert torch.equal(after[name], before[name])
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert {"classifier.weight", "bert.embeddings.LayerNorm.weight"} <= moved
    assert any("attention" in name for name in moved)


# --- targets


LOCAL = [("magnitude", "local"), ("movement", "local")]
WIDE = [
    ("magnitude", "global"),
    ("movement", "global"),
    ("soft_movement", "local"),
    ("l0", "local"),
]


@pytest.mark.parametrize(("method", "scope"), LOCAL + WIDE)
@pytest.mark.parametrize(
    "granularity", ["weight", {"block": [8, 8]}, "neuron", "structured", {"hybrid": [8, 8]}]
)
@pytest.mark.parametrize("aim", [0.6, 0.45])
def test_a_target_of_parameters_is_met(
    aim: float, granularity: Any, method: str, scope: str
) -> None:
    model = sized()
    for parameter in encoder(model).parameters():  # so that all zeros are those of masks
        if parameter.dim() == 1:
            parameter.data.add_(1.0)
    total = nonzero(encoder(model))
    target = {"parameters": aim}
    options = {"method": method, "granularity": granularity, "scope": scope, "target": target}
    done = replaced(model, **options)
    generator = torch.Generator().manual_seed(0)
    for score_group in score_groups(done):
        if score_group.scores is not None:
            score_group.scores.data = torch.randn(score_group.shape, generator=generator)
    harden_all(model, done)
    assert nonzero(encoder(model)) / total == pytest.approx(aim, rel=0.03)


@pytest.mark.parametrize("method", ["soft_movement", "l0"])
@pytest.mark.parametrize("density", [0.3, 0.08])
def test_methods_without_a_density_are_steered_to_one(method: str, density: float) -> None:
    model = sized()
    done = replaced(model, method=method, density=density)
    whole = sum(int(score_group.sizes().sum()) for score_group in score_groups(done))
    for score_group in score_groups(
        done
    ):  # the lesson is so easy that equal scores would stay equal
        assert score_group.scores is not None
        score_group.scores.data += 0.1 * torch.randn(score_group.shape)
    train(model, settings(120), training_data(), done)
    harden_all(model, done)
    kept = sum(one.soft.statistics()["nonzero_weights"] for one in done)
    assert kept == pytest.approx(density * whole, rel=0.03)


def test_gates_of_which_too_few_are_open_are_opened() -> None:
    model = sized()
    done = replaced(model, method="l0", density=0.5)
    generator = torch.Generator().manual_seed(0)
    for score_group in score_groups(done):
        assert score_group.scores is not None
        score_group.scores.data = torch.randn(score_group.shape, generator=generator) - 10
    assert prunable(done[0].site).state.open_part() == 0.0
    harden_all(model, done)
    metrics = [one.soft.statistics() for one in done]
    kept, whole = (sum(f[name] for f in metrics) for name in ("nonzero_weights", "weights"))
    assert kept == pytest.approx(0.5 * whole, rel=0.03)


def test_the_penalty_pushes_harder_while_the_density_is_too_high() -> None:
    pressure, factors = PenaltyController(), []
    for density in (0.9, 0.9, 0.5, 0.1, 0.05):
        pressure.update(density, 0.1)
        factors.append(pressure.factor)
    assert 1 < factors[0] < factors[1]
    assert factors[1] > factors[2] > factors[3] > factors[4]
    for _ in range(1000):
        pressure.update(1.0, 0.01)
    assert pressure.factor <= 1001
    pressure.update(0.001, 0.01)  # what had no effect was not summed up
    assert pressure.factor < 200


@pytest.mark.parametrize("scope", ["local", "global"])
def test_sensitivities_of_the_warm_up_are_what_scores_begin_with(scope: str) -> None:
    model = sized()
    options = {"granularity": "structured", "density": 0.5, "initialization": "sensitivity"}
    done = replaced(model, scope=scope, score_learning_rate=1e-9, warmup=0.5, **options)
    fishers: dict[int, torch.Tensor] = {}
    rules = prunable(done[0].site).state
    for score_group in score_groups(done):
        assert score_group.scores is not None
        fishers[id(score_group)] = torch.zeros(score_group.shape)

        def add(gradient: torch.Tensor, score_group: ScoreGroup = score_group) -> None:
            if rules.left == 1:
                fishers[id(score_group)] += gradient**2 / score_group.sizes()

        score_group.scores.register_hook(add)
    train(model, settings(40), training_data(), done)
    for score_group in score_groups(done):
        assert score_group.scores is not None
        assert fishers[id(score_group)].max() > 0
        assert torch.equal(score_group.scores.argsort(), fishers[id(score_group)].argsort())
    every = torch.cat(
        [
            score_group.scores.detach()
            for score_group in score_groups(done)
            if score_group.scores is not None
        ]
    )
    assert every.sort().values == pytest.approx(torch.linspace(-3, 3, len(every)), abs=1e-3)


@pytest.mark.parametrize("aim", [0.7, 0.5, 0.3])
def test_a_target_of_operations_is_met_by_the_flop_counter(aim: float) -> None:
    model, length = sized(layers=3), 24
    states = torch.randn(1, length, 32)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(model)(states)
        return int(counter.get_total_flops())

    before = flops()
    target = {"flops": aim, "length": length}
    chosen = MovementPruning(method="magnitude", granularity="structured", target=target)
    plmcc.Pipeline([chosen])(model)
    assert flops() / before == pytest.approx(aim, rel=0.03)


@pytest.mark.parametrize(
    ("granularity", "aim"), [("head", 0.3), ("structured", 0.01), ("weight", 0.01)]
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_target_that_nothing_meets_is_refused(granularity: str, aim: float, scope: str) -> None:
    options: dict[str, Any] = {"granularity": granularity, "scope": scope}
    chosen = MovementPruning(method="magnitude", target={"parameters": aim}, **options)
    with pytest.raises(PlmccError, match="these layers keep at least") as caught:
        match(sized(), [chosen])
    assert str(caught.value).count("these layers keep at least") == 1  # not for every layer
    assert "bert.encoder.layer.0 and 1 more: " in str(caught.value)


# --- refilled zeros


def test_zeros_are_refilled_with_noise_around_the_mean() -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) + 3
    weight[:, 10:] = 0
    found = refilled(weight, torch.Generator().manual_seed(1))
    kept = weight[:, :10]
    assert torch.equal(found[:, :10], kept)
    new = found[:, 10:]
    assert float(new.mean()) == pytest.approx(float(kept.mean()), abs=1e-3)
    assert float(new.std()) == pytest.approx(0.01 * float(kept.std()), rel=0.1)
    assert torch.equal(found, refilled(weight, torch.Generator().manual_seed(1)))


def test_a_second_stage_fills_what_the_first_has_kept(tmp_path: Path) -> None:
    model, batch = sized(), inputs("bert")
    first = replaced(model, method="magnitude", granularity={"hybrid": [8, 8]}, density=0.4)
    records = harden_all(model, first)
    before = nonzero(encoder(model))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    hybrid = outputs(model, batch)["output"]
    second = replaced(model, method="refill")
    assert nonzero(encoder(model)) > 1.3 * before
    assert not torch.equal(outputs(model, batch)["output"], hybrid)
    log = train(model, settings(40), training_data(), second)
    assert log[-2]["loss"] < log[0]["loss"]
    trained = outputs(model, batch)["output"]
    records += harden_all(model, second)
    assert torch.equal(outputs(model, batch)["output"], trained)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    artifact.adopt(model, records)
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(outputs(again, batch)["output"], trained)


def test_refilling_needs_zeros_and_training() -> None:
    with pytest.raises(PlmccError, match="no zeros"):
        match(sized(), [MovementPruning(method="refill")])
    with pytest.raises(PlmccError, match="has to be trained"):
        plmcc.Pipeline([MovementPruning(method="refill")])(sized())


# --- distillation


def distillation(model: PreTrainedModel, **options: Any) -> Distillation:
    settings = Distill(logits=1.0, **options)
    return Distillation(model, copy.deepcopy(model), settings, Pooling(), "text-classification")


@pytest.mark.parametrize("warm", [1.0, 2.0, 4.0])
def test_m16_divergence_of_classes_has_the_factor_of_the_temperature(warm: float) -> None:
    model, batch = sized(), inputs("bert")
    part = distillation(model, temperature=warm)
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2), torch.randn(3, 2)
    none = part.loss(batch, {"logits": teacher}, {"logits": teacher})
    assert float(none) == pytest.approx(0, abs=1e-6)
    found = part.loss(batch, {"logits": student}, {"logits": teacher})
    expected = F.kl_div(
        F.log_softmax(student / warm, -1), F.softmax(teacher / warm, -1), reduction="batchmean"
    )
    torch.testing.assert_close(found, expected * warm**2)


def test_m16_answers_are_distilled_as_the_mean_of_start_and_end() -> None:
    model, batch = sized("QuestionAnswering"), inputs("bert")
    part = distillation(model)
    with torch.no_grad():
        output, goal = model(**batch), part.teacher_forward(batch)
    assert float(part.loss(batch, output, goal)) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    start, end = torch.randn_like(goal.start_logits), torch.randn_like(goal.end_logits)
    terms = [
        F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4
        for s, t in ((start, goal.start_logits), (end, goal.end_logits))
    ]
    found = part.loss(batch, {"start_logits": start, "end_logits": end}, goal)
    torch.testing.assert_close(found, (terms[0] + terms[1]) / 2)


def test_m16_the_penalty_stands_beside_task_and_teacher() -> None:
    model = sized()
    teacher = copy.deepcopy(model)
    done = replaced(model, method="soft_movement", warmup=0.0, cooldown=0.0, penalty=8.0)
    distill = Distill(logits=1.0, task=0.0)
    log = train(model, settings(20, distill), training_data(teacher=teacher), done)
    # Nothing is masked yet and the teacher is the model: only the penalty is left, whatever
    # weights task and teacher have. At step 1 of 20 the threshold has come 1 - (19/20)^3.
    assert log[0]["loss"] == pytest.approx(8 * 0.5 * (1 - 0.95**3), rel=1e-3)


@pytest.mark.parametrize("name", ["TokenClassification", "gpt2"])
def test_tokens_and_next_words_are_distilled(name: str) -> None:
    model = tiny(name) if name == "gpt2" else sized(name)
    batch, part = inputs("bert"), distillation(model)
    with torch.no_grad():
        output, goal = model(**batch), part.teacher_forward(batch)
    assert float(part.loss(batch, output, goal)) == pytest.approx(0, abs=1e-6)
    real = batch["attention_mask"].bool()
    torch.manual_seed(0)
    other = torch.randn_like(output["logits"])
    log_s, log_t = (F.log_softmax(x[real] / 2, -1) for x in (other, goal["logits"]))
    rows = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * 4
    torch.testing.assert_close(part.loss(batch, {"logits": other}, goal), rows)
