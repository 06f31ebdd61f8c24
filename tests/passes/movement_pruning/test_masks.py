"""The acceptance facts of movement pruning that concern scores, masks, schedules and training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

import plmcc
from plmcc import Data, PlmccError, Train
from plmcc.data.collate import collator
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.passes.movement_pruning import scores as scores
from plmcc.passes.movement_pruning.masks import (
    Masked,
    PruningSettings,
    PruningState,
    ScoreGroup,
    score_group_of,
)
from plmcc.passes.movement_pruning.scores import ScoreLayout
from plmcc.passes.movement_pruning.trainable import PrunableLayer
from plmcc.rewrite import Replacement, harden_all, match, replace_all
from plmcc.training.loop import TrainingData, train
from support.pruning import prunable
from support.tiny_models import VOCAB, inputs, tiny
from support.tokenizers import words

OPTIONS = {
    "method": "magnitude",
    "granularity": {"hybrid": [4, 4]},
    "density": 0.5,
    "storage": "bitmask",
}
SOFT: dict[str, Any] = {"method": "soft_movement"}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*:UserWarning", "ignore:.*pin_memory.*:UserWarning"
)


def rules(**options: Any) -> PruningState:
    given: dict[str, Any] = {
        "method": "movement",
        "density": 0.5,
        "threshold": 0.1,
        "floor": 0.005,
        "global_threshold": False,
        "granularity": "weight",
        "block": (32, 32),
        "int8": False,
        "has_density": False,
        "has_target": False,
        "timed": False,
    } | options
    settings = PruningSettings(**given)
    return PruningState(settings, settings.density)


def masked(spread: ScoreLayout | None = None, groups: int = 0, **options: Any) -> Masked:
    """A masked linear 6 -> 4 with random scores, in double precision."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    (found,) = score_group_of(
        rules(**options), [linear], [spread or ScoreLayout("each", (4, 6))], groups
    )
    if found.score_group.scores is not None:
        found.score_group.scores = nn.Parameter(torch.randn(found.score_group.shape).double())
    return found


def gradients(layer: Masked, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a loss to scores, weight and output, and the mask."""
    a = layer(x)
    a.retain_grad()
    (a.square() * torch.arange(1, 5)).sum().backward()
    assert a.grad is not None
    assert layer.score_group.scores is not None
    assert layer.score_group.scores.grad is not None
    assert layer.weight.grad is not None
    return (
        layer.score_group.scores.grad,
        layer.weight.grad,
        a.grad,
        layer.score_group.mask(settled=True).detach(),
    )


def replaced(model: PreTrainedModel, **options: Any) -> list[Replacement]:
    chosen = MovementPruning(**options)
    return replace_all(model, match(model, [chosen]))


def score_groups(done: list[Replacement]) -> list[ScoreGroup]:
    softs = [one.soft for one in done]
    return [
        score_group
        for soft in softs
        if isinstance(soft, PrunableLayer)
        for score_group in soft.score_groups()
    ]


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    make: Any = transformers.BertConfig
    config = make(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    model: PreTrainedModel = transformers.BertForSequenceClassification(config)
    model.train(False)
    return model


def training_data() -> TrainingData:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCAB, (16, 8), generator=random)
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * 8] * 16}
    rows["labels"] = (ids[:, 0] % 2).tolist()
    task = "text-classification"
    return TrainingData(task, Dataset.from_dict(rows), collator(task, words()))


def settings(steps: int = 20, **arguments: Any) -> Train:
    given = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    } | arguments
    return Train(data=Data(train="synthetic"), arguments=given)


# --- gradients


def test_m1_scores_learn_everywhere_and_weights_where_they_are_kept() -> None:
    layer, x = masked(), torch.randn(5, 6).double()
    score, weight, a, mask = gradients(layer, x)
    whole = a.T @ x  # dL/dW' of the masked weight W' = W * M, summed over the batch
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(score, whole * layer.weight)
    torch.testing.assert_close(weight, whole * mask)
    kept = mask.bool()
    torch.testing.assert_close(score[kept], (layer.weight * weight)[kept])
    assert not weight[~kept].any()
    assert score[~kept].all()
    products = (a * (x @ layer.weight.T)).sum(0)
    torch.testing.assert_close(score.sum(1), products)


@pytest.mark.parametrize(
    ("spread", "groups"),
    [
        (ScoreLayout("blocks", (4, 6), (2, 4)), 0),  # the blocks at the right edge are cut
        (ScoreLayout("rows", (4, 6)), 4),
        (ScoreLayout("columns", (4, 6)), 6),
        (ScoreLayout("rows", (4, 6)), 2),
    ],
    ids=str,
)
def test_m2_a_group_learns_the_sum_of_its_weights(spread: ScoreLayout, groups: int) -> None:
    layer, x = masked(spread, groups), torch.randn(5, 6).double()
    score, _, a, mask = gradients(layer, x)
    single = (a.T @ x) * layer.weight
    for index in range(score.numel()):
        alone = torch.zeros(score.numel()).double()
        alone[index] = 1
        members = spread(alone.view(score.shape)).bool()
        torch.testing.assert_close(score.flatten()[index], single[members].sum())
    assert torch.equal(spread(mask).sum(), spread.gather(spread(mask), score.shape).sum().double())


def test_m2_neurons_and_heads_learn_from_all_their_matrices() -> None:
    model = tiny("llama")
    done = replaced(model, granularity="structured", density=0.5)
    for score_group in score_groups(done):
        assert score_group.scores is not None
        nn.init.normal_(score_group.scores)
    model.train()(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    shared = [score_group for score_group in score_groups(done) if len(score_group.members) > 1]
    assert {len(score_group.members) for score_group in shared} == {
        3,
        4,
    }  # fc1, gate, fc2; q, k, v, o
    for score_group in shared:
        assert score_group.scores is not None
        assert score_group.scores.grad is not None
        kept = score_group.mask(settled=True).bool()
        sums = torch.zeros_like(score_group.scores)
        for member in score_group.members:
            assert member.weight.grad is not None
            sums += member.spread.gather(member.weight * member.weight.grad, score_group.shape)
        torch.testing.assert_close(score_group.scores.grad[kept], sums[kept], rtol=1e-4, atol=1e-5)


def test_m3_with_sgd_a_score_is_the_sum_of_gradient_times_weight() -> None:
    layer, rate = masked(), 0.01
    assert layer.score_group.scores is not None
    nn.init.zeros_(layer.score_group.scores)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    expected = torch.zeros_like(layer.score_group.scores)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).double()
        before = layer.weight.detach().clone()
        _, _, a, _ = gradients(layer, x)
        expected -= rate * (a.T @ x) * before
        optimizer.step()
    torch.testing.assert_close(layer.score_group.scores.detach(), expected)


def test_m8_the_sigmoid_has_a_derivative_in_the_penalty_only() -> None:
    layer, x = masked(**SOFT), torch.randn(5, 6).double()
    score, _, a, _ = gradients(layer, x)
    torch.testing.assert_close(score, (a.T @ x) * layer.weight)
    assert layer.score_group.scores is not None
    (penalty,) = torch.autograd.grad(layer.score_group.penalty(), layer.score_group.scores)
    s = torch.sigmoid(layer.score_group.scores)
    torch.testing.assert_close(penalty, s * (1 - s) / 24)


# --- masks


@pytest.mark.parametrize(("rows", "columns", "kept"), [(768, 768, 88473), (768, 3072, 353894)])
def test_m4_top_keeps_exactly_the_density(rows: int, columns: int, kept: int) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    count = scores.kept_of(0.15, values.numel())
    assert count == kept
    for tied in (values, torch.zeros_like(values)):
        assert int(scores.top(tied, count).sum()) == kept
    mask = scores.top(values, count)
    assert values[mask].min() > values[~mask].max()


def test_m4_magnitude_looks_at_weights_and_movement_at_scores() -> None:
    by_size = masked(method="magnitude")
    before = by_size.score_group.mask(settled=True)
    with torch.no_grad():
        by_size.weight.neg_()
    assert torch.equal(by_size.score_group.mask(settled=True), before)
    assert by_size.score_group.scores is None
    by_score = masked()
    own = by_score.score_group.scores
    assert own is not None
    first = by_score.score_group.mask(settled=True).detach()
    with torch.no_grad():
        by_score.weight.mul_(-7)
        own.copy_(torch.exp(own))  # monotone
        assert torch.equal(by_score.score_group.mask(settled=True), first)
        own.neg_()  # no absolute value anywhere
    assert torch.equal(by_score.score_group.mask(settled=True), 1 - first)


def test_m7_soft_masks_follow_the_threshold_down_to_a_floor() -> None:
    assert math.log(0.1 / 0.9) == pytest.approx(-2.19722, abs=1e-5)
    near = torch.tensor([-2.1973, -2.1972])
    assert scores.above(near, 0.1, 0.0).tolist() == [False, True]
    assert scores.above(torch.zeros(10), 0.49, 0.0).all()
    n = 589_824
    low = torch.randn(n, generator=torch.Generator().manual_seed(0)) - 100
    assert int(scores.above(low, 0.1, 0.005).sum()) == int(0.005 * n) + 1 == 2950
    assert int(scores.above(torch.full((200,), -9.0), 0.1, 0.005).sum()) == 2  # ties too


def test_m7_without_a_task_the_penalty_empties_the_matrix_down_to_the_floor() -> None:
    layer = masked(**SOFT, floor=0.1)
    assert layer.score_group.scores is not None
    nn.init.zeros_(layer.score_group.scores)
    assert layer.score_group.penalty() == 0.5
    optimizer = torch.optim.Adam([layer.score_group.scores], lr=0.01)
    densities = [layer.score_group.mask(settled=True).mean().item()]
    for _ in range(300):
        before = layer.score_group.scores.detach().clone()
        optimizer.zero_grad()
        layer.score_group.penalty().backward()
        optimizer.step()
        assert (layer.score_group.scores < before).all()
        densities.append(layer.score_group.mask(settled=True).mean().item())
    assert densities[0] == 1
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == pytest.approx(3 / 24)


@pytest.mark.parametrize(("columns", "gradient"), [(768, 2.3548e-6), (3072, 5.8869e-7)])
def test_m7_the_penalty_is_a_mean_over_matrices_of_means(columns: int, gradient: float) -> None:
    values = torch.zeros(768, columns, requires_grad=True)
    score_group = ScoreGroup(rules(**SOFT), (1,), torch.device("cpu"))
    score_group.scores = nn.Parameter(values.detach())
    (400 * score_group.penalty() / 72).backward()
    assert score_group.scores.grad is not None
    assert float(score_group.scores.grad[0, 0]) == pytest.approx(gradient, rel=1e-4)


def test_m9_hard_concrete_gates() -> None:
    edge = math.log(11)
    given = torch.tensor([-edge - 1e-4, -edge + 1e-3, 0.0, 2.197, edge + 1e-4])
    found = scores.gates(given)
    assert found[0] == 0
    assert found[1] > 0
    assert found[2] == 0.5
    assert float(found[3]) == pytest.approx(0.97998, abs=1e-5)
    assert found[4] == 1
    assert float(scores.open_probability(torch.zeros(1))) == pytest.approx(0.8318, abs=1e-4)


def test_m9_sampled_gates_have_the_paper_s_gradient() -> None:
    own = torch.linspace(-3, 3, 9, dtype=torch.double, requires_grad=True)
    noise = scores.noise_like(own.detach())
    gate = scores.gates(own, noise)
    gate.sum().backward()
    s = torch.sigmoid((noise.log() - (1 - noise).log() + own) / scores.BETA)
    stretched = s * 1.2 - 0.1
    expected = 1.2 / scores.BETA * s * (1 - s) * ((stretched >= 0) & (stretched <= 1))
    torch.testing.assert_close(own.grad, expected)
    layer = masked(method="l0")
    drawn = layer.score_group
    layer.score_group.state.steps = 10
    layer.score_group.state.advance(0.1)
    first = drawn.mask(settled=False)
    assert torch.equal(drawn.mask(settled=False), first)  # one draw a step
    layer.score_group.state.advance(0.2)
    assert not torch.equal(drawn.mask(settled=False), first)
    layer.score_group.state.advance(1.0)
    assert torch.equal(drawn.mask(settled=False), drawn.mask(settled=True))


def test_two_of_every_four() -> None:
    mask = scores.two_of_four(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    assert (mask.unflatten(-1, (4, 4)).sum(-1) == 2).all()
    model = tiny("bert")
    done = replaced(model, method="magnitude", granularity="2:4")
    for score_group in score_groups(done):
        score_group.state.steps = 100
        score_group.state.advance(0.4)
        early, final = score_group.mask(settled=False), score_group.mask(settled=True)
        assert ((early - final) >= 0).all()  # the pattern and what the density adds
        assert early.sum() > final.sum()
        assert (final.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_one_threshold_for_the_whole_model_keeps_the_density_of_weights() -> None:
    model = tiny("bert")
    done = replaced(model, granularity={"hybrid": [4, 4]}, density=0.3, scope="global")
    generator = torch.Generator().manual_seed(0)
    for score_group in score_groups(done):
        assert score_group.scores is not None
        shift = 1.0 if len(score_group.members) > 1 else 0.0  # neurons win
        score_group.scores.data = torch.randn(score_group.shape, generator=generator) + shift
    kept = [float((u.mask(settled=True) * u.sizes()).sum().detach()) for u in score_groups(done)]
    total = [float(u.sizes().sum()) for u in score_groups(done)]
    assert sum(kept) / sum(total) == pytest.approx(0.3, abs=0.01)
    assert max(k / t for k, t in zip(kept, total, strict=True)) > 0.4


# --- schedule


def test_m5_the_schedule_of_the_official_code() -> None:
    steps = 55_330
    state = rules(density=0.15, warmup=5400.0, cooldown=10_800.0)
    state.steps = steps

    def at(step: int) -> float:  # the official code counts steps from 1
        state.advance((step - 1) / steps)
        return state.density_at(state.left)

    assert at(1) == at(5400) == 1
    assert at(5401) < 1
    assert at(24_965) == pytest.approx(0.25625)
    assert 400 * (1 - state.left) == pytest.approx(350)
    assert 0.1 * (1 - state.left) == pytest.approx(0.0875)
    assert at(44_530) == pytest.approx(0.15)
    assert at(steps) == 0.15
    every = [at(step) for step in range(1, steps, 500)]
    assert every == sorted(every, reverse=True)


def test_m5_threshold_and_penalty_rise_together() -> None:
    model = tiny("bert")
    done = replaced(model, method="soft_movement", warmup=0.0, cooldown=0.0, penalty=400.0)
    objective = done[0].objective
    assert objective is not None
    objective.begin(1000)
    objective.advance(0.0)
    with torch.no_grad():
        early = objective.loss({}, None, None)
    objective.advance(0.499)
    with torch.no_grad():
        middle = objective.loss({}, None, None)
    assert early is not None
    assert middle is not None
    assert float(early) < 1
    # One objective for both layers; the mean of sigmoid(0) is 0.5.
    assert done[1].objective is objective
    assert float(middle) == pytest.approx(350 * 0.5)


@pytest.mark.parametrize(("steps", "cooldown"), [(117, 0.0), (1400, 1000.0), (1500, 1000.0)])
def test_m6_a_run_that_is_too_short_is_refused_before_it_begins(
    steps: int, cooldown: float
) -> None:
    model = classifier()
    done = replaced(model, warmup=500.0, cooldown=cooldown)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlmccError, match="ends before the final density") as caught:
        train(model, settings(steps), training_data(), done)
    assert caught.value.diagnostics[0].got.startswith(f"{steps} steps: 500 of warm-up")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_uses_the_final_density_and_training_the_present_one() -> None:
    layer, x = masked(density=0.25, warmup=0.5), torch.randn(3, 6).double()
    layer.score_group.state.steps = 10
    layer.score_group.state.advance(0.0)
    for training in (True, False):  # `dropout: false` trains in evaluation mode
        layer.train(training)
        dense = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), dense)
    with torch.no_grad():
        assert not torch.allclose(layer(x), dense)
        final = layer.weight * scores.top(layer.score_group.importance(), 6)
        assert torch.equal(layer(x), nn.functional.linear(x, final, layer.bias))


# --- training


def test_m12_scores_have_a_group_of_their_own_without_decay() -> None:
    for method, rate in {"movement": 1e-2, "soft_movement": 1e-2, "l0": 1e-1}.items():
        done = replaced(tiny("bert"), method=method)
        groups = done[0].objective.parameter_groups()  # type: ignore[union-attr]
        assert {(g["lr"], g["weight_decay"]) for g in groups} == {(rate, 0.0)}
        found = {id(p) for g in groups for p in g["params"]}
        assert found == {id(score_group.scores) for score_group in score_groups(done)}
    done = replaced(tiny("bert"), method="magnitude")
    assert [g for one in done for g in one.objective.parameter_groups()] == []  # type: ignore[union-attr]


def test_m12_density_one_is_ordinary_fine_tuning_weight_for_weight() -> None:
    plain, pruned = classifier(), classifier()
    chosen = settings(6, max_grad_norm=0.0, weight_decay=0.01)
    train(plain, chosen, training_data(), [])
    done = replaced(pruned, density=1.0)
    train(pruned, chosen, training_data(), done)
    assert any(u.scores is not None and u.scores.any() for u in score_groups(done))
    harden_all(pruned, done)
    expected, found = plain.state_dict(), pruned.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("method", ["magnitude", "movement", "soft_movement", "l0"])
def test_m11_what_is_hardened_computes_what_was_trained(method: str) -> None:
    model = classifier()
    extra = {"penalty": 30.0, "score_learning_rate": 0.3} if method == "soft_movement" else {}
    if method == "l0":
        extra = {"penalty": 30.0, "score_learning_rate": 0.2}
    if method in ("magnitude", "movement"):
        extra = {"density": 0.3}
    done = replaced(model, method=method, compact=False, **extra)
    before = {n: p.clone() for n, p in model.named_parameters() if "embeddings" in n}
    train(model, settings(40), training_data(), done)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    masks = {
        m: m.spread(m._score_group[0].mask(settled=True))
        for u in score_groups(done)
        for m in u.members
    }
    weights = {m: m.weight.detach().clone() for m in masks}
    given = {name: inputs("bert")[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        soft = model(**given).logits
        harden_all(model, done)
        assert torch.equal(model(**given).logits, soft)  # bit for bit
    assert not any("score" in name or "unit" in name for name in model.state_dict())
    assert model.state_dict().keys() == classifier().state_dict().keys()
    hard = [
        m
        for layer in model.bert.encoder.layer  # type: ignore[union-attr]
        for m in layer.modules()
        if isinstance(m, nn.Linear)
    ]
    assert len(hard) == len(masks) == 12
    for linear, (layer, mask) in zip(hard, masks.items(), strict=True):
        assert torch.equal(linear.weight, weights[layer] * mask)
        assert torch.equal(linear.weight == 0, mask == 0)
    density = sum(float((mask != 0).sum()) for mask in masks.values()) / (2 * (4 * 1024 + 2 * 2048))
    if method in ("magnitude", "movement"):
        assert density == pytest.approx(0.3, abs=0.001)
    elif method == "soft_movement":
        assert 0.0 < density < 0.9
    if method == "l0":
        assert any(bool(((mask > 0) & (mask < 1)).any()) for mask in masks.values())


def test_m15_movement_wins_at_high_sparsity_when_the_task_has_moved() -> None:
    """A trend: few weights, a shifted task. Magnitude keeps what was large before."""
    gains = [_transfer("movement", seed) - _transfer("magnitude", seed) for seed in range(5)]
    assert sum(gains) < 0, gains  # losses, so less is better


def _transfer(method: str, seed: int) -> float:
    """Loss of a pre-trained linear model on a shifted task with 8 % of its weights."""
    torch.manual_seed(seed)
    x = torch.randn(512, 40)
    old, new = torch.randn(6, 40), torch.zeros(6, 40)
    useful = torch.rand(6, 40).argsort(1)[:, :4]
    new.scatter_(1, useful, torch.randn(6, 4))
    linear = nn.Linear(40, 6, bias=False)
    linear.weight.data = old + 0.1 * new
    (layer,) = score_group_of(
        rules(method=method, density=0.08, warmup=0.1, cooldown=0.2),
        [linear],
        [ScoreLayout("each", (6, 40))],
    )
    state, steps = layer.score_group.state, 300
    state.steps = steps
    own = (
        []
        if layer.score_group.scores is None
        else [{"params": [layer.score_group.scores], "lr": 1e-2}]
    )
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": 3e-3}, *own])
    for step in range(steps):
        state.advance(step / steps)
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), x @ new.T).backward()
        optimizer.step()
    state.advance(1.0)
    with torch.no_grad():
        return float(nn.functional.mse_loss(layer(x), x @ new.T))


# --- refusals


@pytest.mark.parametrize("method", ["movement", "soft_movement", "l0"])
def test_scores_cannot_be_learned_without_training(method: str) -> None:
    with pytest.raises(PlmccError, match="are learned") as caught:
        plmcc.Pipeline([MovementPruning(method=method)])(tiny("bert"))
    assert "train" in caught.value.diagnostics[0].hint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"granularity": "head", "density": 0.2}, "less than one of the 4 groups"),
        ({"granularity": {"block": [64, 64]}, "density": 0.5}, "less than one of the 1 groups"),
    ],
)
def test_a_density_that_leaves_nothing_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlmccError, match=reason):
        match(tiny("bert"), [MovementPruning(method="magnitude", **options)])


def test_frozen_and_tied_linears_are_refused() -> None:
    frozen: Any = tiny("bert")
    for parameter in frozen.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    found = match(frozen, [MovementPruning()])
    assert [site.path for _, site in found.sites] == ["bert.encoder.layer.1"]
    assert "is frozen" in found.misses[0][1].reason
    match(frozen, [MovementPruning(method="magnitude")])  # needs no gradients
    tied: Any = tiny("bert")
    for layer in tied.bert.encoder.layer:
        layer.attention.self.query.weight = layer.attention.self.key.weight
        layer.intermediate.dense.weight = tied.bert.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(PlmccError, match="shares its weight with"):
        match(tied, [MovementPruning()])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "soft_movement", "density": 0.3, "threshold": 0.2}, "`threshold` has no"),
        ({"method": "refill", "density": 0.3}, "`density` has no effect"),
        ({"method": "magnitude", "penalty": 1.0}, "`penalty` has no effect"),
        ({"threshold": 0.2}, "`threshold` has no effect"),
        ({"granularity": "2:4", "density": 0.3}, "`density` has no effect"),
        ({"granularity": "2:4", "scope": "global"}, "`scope` has no effect"),
        ({"granularity": "2:4", "method": "l0"}, "`2:4` needs the method"),
        ({"compact": False, "uniform_heads": "remove"}, "`uniform_heads` has no effect"),
        ({"method": "refill", "granularity": "row"}, "`granularity` has no effect"),
        ({"method": "l0", "density": 0.5, "scope": "global"}, "`scope` has no effect"),
        ({"density": 0.3, "target": {"parameters": 0.5}}, "`density` has no effect"),
        ({"target": {"parameters": 0.5, "flops": 0.5}}, "one of `parameters`, `flops` and"),
        ({"target": {"flops": 0.5}}, "zeros save no FLOPs"),
        ({"granularity": {"block": [4, 4], "hybrid": [4, 4]}}, "either `block` or `hybrid`"),
        ({"warmup": 0.6, "cooldown": 0.5}, "leave no steps"),
        ({"method": "l0", "initialization": "sensitivity"}, "`initialization` has no effect"),
        ({"initialization": "sensitivity", "warmup": 0}, "is measured in warm-up"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        MovementPruning(**options)


def test_shared_layers_have_one_set_of_scores() -> None:
    done = replaced(tiny("albert"))
    assert len(done) == 1
    assert isinstance(done[0].soft, PrunableLayer)
    assert len(done[0].soft.score_groups()) == 6


def test_m10_what_is_scored_in_bert_base() -> None:
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    found = match(model, [MovementPruning()])
    paths = [f"{s.path}.{p}.weight" for _, s in found.sites for p in prunable(s).parts.paths()]
    weights = dict(model.named_parameters())
    assert len(paths) == 72
    assert sum(weights[path].numel() for path in paths) == 84_934_656
    encoder = sum(p.numel() for n, p in weights.items() if ".encoder." in n)
    assert encoder == 85_054_464
    assert encoder - 84_934_656 == 119_808
    for density, percent in {0.03: 3.1366, 0.10: 10.1268, 0.15: 15.1197}.items():
        kept = sum(scores.kept_of(density, weights[path].numel()) for path in paths)
        assert 100 * (kept + 119_808) / encoder == pytest.approx(percent, abs=1e-4)
