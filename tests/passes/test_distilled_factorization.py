"""The facts of Lioutas et al. (2020), storage, sizes, and the module against a dense table."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from torch import Tensor, nn

from plmcc import rewrite
from plmcc.artifact.size import module_bytes
from plmcc.passes.distilled_factorization import (
    DistilledFactorization,
    DistilledTable,
    FactorizedEmbedding,
    SoftFactors,
)
from plmcc.passes.distilled_factorization.factors import (
    fit_factors,
    from_bitmask,
    shifted_factors,
    to_bitmask,
)
from plmcc.recipe.sections import Train
from plmcc.training.loop import TrainingData, train
from support.embedding_tables import (
    PROGRAM,
    check_calls,
    gemma,
    hardened,
    refused,
    replaced,
    site,
    toy,
)
from support.tiny_models import NAMES, VOCAB, inputs, tiny

OPTIONS = {"rank": 6, "fit_steps": 10}
"""For tiny models; `tests/test_contract.py` reads it."""

STARTS = ["paper", "shifted_svd", "random"]
STORAGES = ["dense", "sparse", "uint8"]


def factored(table_VD: Tensor, rank: int = 6, **options: Any) -> SoftFactors:
    soft = DistilledFactorization(rank=rank, **options).replace(site(table_VD), PROGRAM)
    assert isinstance(soft, SoftFactors)
    return soft


def error(soft: SoftFactors, table_VD: Tensor) -> float:
    return float((soft.weight.detach().double() - table_VD.double()).square().sum())


def svd_error(table_VD: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(table_VD.double())[rank:].square().sum())


# --- the facts of the paper


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("steps", [0, 150])
def test_the_rank_and_the_bound_of_the_svd(start: str, steps: int) -> None:
    table = toy(500, 40) + torch.randn(40)
    soft = factored(table, 8, initialization=start, fit_steps=steps)
    assert int(torch.linalg.matrix_rank(soft.weight.detach(), rtol=1e-5)) <= 8
    assert error(soft, table) >= svd_error(table, 8) * (1 - 1e-6)
    loss = soft.statistics()["reconstruction_loss"] * 2 * len(table)
    assert loss == pytest.approx(error(soft, table), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_shifted_start_is_the_svd_of_one_rank_less(rank: int) -> None:
    """Exactly, without a mean to hold; with one it is never worse, and better here."""
    table = toy(500, 40)
    centered = table - table.mean(0)
    soft = factored(centered, rank, fit_steps=0)
    assert error(soft, centered) == pytest.approx(svd_error(centered, rank - 1), rel=1e-4)
    assert float(soft.factor.detach().min()) >= 0
    moved = table + 3 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    soft = factored(moved, rank, fit_steps=0)
    assert error(soft, moved) < 0.9 * svd_error(moved, rank - 1)


def test_the_clamped_start_loses_and_kills_half() -> None:
    table = toy(500, 40)
    clamped, shifted = (factored(table, 8, initialization=s, fit_steps=0) for s in STARTS[:2])
    assert error(clamped, table) > 2 * error(shifted, table)
    assert clamped.dead_entries() / (500 * 8) == pytest.approx(0.5, abs=0.06)
    assert shifted.dead_entries() <= 8


@pytest.mark.parametrize("start", STARTS)
def test_fitting_improves_and_never_worsens(start: str) -> None:
    table = toy(500, 40)
    before = factored(table, 8, initialization=start, fit_steps=0)
    after = factored(table, 8, initialization=start, fit_steps=150)
    # An SVD is a stationary point: from its shifted form there is next to nothing to gain.
    bound = 1.0001 if start == "shifted_svd" else 0.98
    assert error(after, table) < bound * error(before, table)
    wild = factored(table, 8, initialization=start, fit_steps=3, fit_learning_rate=1e4)
    assert error(wild, table) <= error(before, table) * 1.0001


def test_the_scale_of_the_table_does_not_matter_to_the_fit() -> None:
    table = toy(300, 20)
    errors = [
        factored(table * scale, fit_steps=40).statistics()["relative_error"]
        for scale in (1.0, 0.01, 30)
    ]
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-2)


@pytest.mark.parametrize("start", STARTS)
def test_folding_the_relu_changes_no_bit(start: str) -> None:
    soft = factored(toy(200, 20), initialization=start)
    hard, hidden = soft.harden(), torch.randn(3, 20)
    assert isinstance(hard, FactorizedEmbedding)
    assert torch.equal(hard(torch.arange(200)), soft(torch.arange(200)))
    assert torch.equal(hard.attend(hidden), soft.attend(hidden))
    assert torch.equal(hard.weight, soft.weight)


def test_columns_may_be_rescaled_by_positive_numbers_only() -> None:
    soft = factored(toy(200, 20), initialization="random")
    before = soft.weight.detach().clone()
    with torch.no_grad():
        soft.factor[:, 2] *= 4
        soft.basis[2] /= 4
        torch.testing.assert_close(soft.weight, before)
        soft.factor[:, 2] *= -1
        soft.basis[2] *= -1
    assert not torch.allclose(soft.weight, before)


def test_entries_that_are_not_positive_have_no_gradient() -> None:
    soft = factored(toy(200, 20), initialization="paper")
    dead = soft.factor <= 0
    soft(torch.arange(200)).square().sum().backward()
    gradient = soft.factor.grad
    assert gradient is not None
    assert not gradient[dead].any()
    assert gradient[~dead].ne(0).float().mean() > 0.99
    assert soft.dead_entries() == soft.statistics()["dead_entries"] == int(dead.sum()) > 0


@pytest.mark.parametrize(
    ("rows", "dims", "parameters"),
    [
        (30522, 768, 2_002_560),
        (50257, 768, 3_265_600),
        (400_000, 300, 25_619_200),
        (151_936, 1024, 9_789_440),
    ],
)
def test_exact_sizes(rows: int, dims: int, parameters: int) -> None:
    with torch.device("meta"):
        dense, small = (FactorizedEmbedding(rows, dims, 64, s) for s in ("dense", "uint8"))
    assert parameters == 64 * (rows + dims)
    assert module_bytes(dense) == 4 * parameters
    assert dense.ideal_bits() == 32 * parameters
    assert module_bytes(small) == 64 * rows + 4 * 64 * dims


# --- training


def training_data() -> TrainingData:
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB, (16, 8), generator=random).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    return TrainingData("text-generation", data, collate)


def trained(alpha: float) -> tuple[Any, Any, SoftFactors, list[dict[str, float]]]:
    model: Any = tiny("llama")  # the head has a weight of its own
    chosen = DistilledFactorization(rank=6, alpha=alpha, initialization="random", fit_steps=0)
    (done,) = replaced(model, chosen)
    before = copy.deepcopy(model)
    arguments = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": 8,
    }
    settings = Train.model_validate({"data": {"train": "x.txt"}, "arguments": arguments})
    log = train(model, settings, training_data(), [done])
    assert isinstance(done.soft, SoftFactors)
    return before, model, done.soft, log


def moved(before: Any, after: Any) -> set[str]:
    first, second = dict(before.named_parameters()), dict(after.named_parameters())
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_alpha_of_zero_only_fits_the_table_and_one_only_trains() -> None:
    before, after, soft, log = trained(0.0)
    assert moved(before, after) == {"model.embed_tokens.factor", "model.embed_tokens.basis"}
    losses = [entry["loss"] for entry in log if "loss" in entry]
    distances = [entry["table_distance"] for entry in log if "table_distance" in entry]
    assert losses == pytest.approx(distances, rel=1e-3)
    assert losses[-1] < losses[0]
    dead = [entry["dead_entries"] for entry in log if "dead_entries" in entry]
    assert dead[-1] == soft.dead_entries()
    before, after, _, log = trained(1.0)
    assert len(moved(before, after)) > 10
    assert not any("table_distance" in entry for entry in log)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_the_loss_is_the_weighted_average() -> None:
    first = [trained(alpha)[3][0]["loss"] for alpha in (1.0, 0.25, 0.0)]
    assert first[1] == pytest.approx(0.25 * first[0] + 0.75 * first[2], rel=1e-3)
    assert abs(first[0] - first[2]) > 0.1


def test_the_objective_is_the_mean_square_over_the_vocabulary() -> None:
    table = toy(200, 20)
    soft = factored(table)
    objective = DistilledFactorization(rank=6, alpha=0.25).objective(site(table), soft)
    assert isinstance(objective, DistilledTable)
    assert objective.loss_weight == 0.75
    loss = objective.loss({}, {}, None)
    assert loss is not None
    expected = 0.75 * (soft.weight - table).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert objective.metrics()["table_distance"] == pytest.approx(float(expected.detach()) / 0.75)


# --- storage


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("layout", [{}, {"padding_idx": 3}, {"scale": 2.5}], ids=str)
def test_lookup_and_head_are_those_of_the_dense_table(storage: str, layout: Any) -> None:
    table = toy(60, 20)
    table[3] = 0
    chosen = DistilledFactorization(rank=6, storage=storage, initialization="paper")
    hard = chosen.replace(site(table, **layout), PROGRAM).harden()
    assert isinstance(hard, FactorizedEmbedding)
    assert hard.zero_padding is bool(layout.get("padding_idx"))
    basis = nn.Parameter(hard.basis.detach().clone())
    parameters = [basis]
    if storage == "uint8":
        factor: Tensor = hard.factor.float()
    elif storage == "dense":
        factor = nn.Parameter(hard.factor.detach().clone())
        parameters = [p for p in (factor, basis) if isinstance(p, nn.Parameter)]
    else:
        values = nn.Parameter(hard.values.detach().clone())
        marks = ["".join(f"{byte:08b}" for byte in row)[:6] for row in hard.mask.tolist()]
        locations = torch.tensor([[bit == "1" for bit in row] for row in marks])
        assert hard.starts.tolist() == [
            sum("".join(marks[:n]).count("1") for _ in [0]) for n in range(60)
        ]
        factor = torch.zeros(60, 6).masked_scatter(locations, values)
        parameters = [values, basis]
    check_calls(hard, factor @ basis, parameters)


def test_sparse_storage_keeps_the_bits_and_saves_the_zeros() -> None:
    soft = factored(toy(300, 40), 16, initialization="paper", storage="sparse")
    hard, zeros = soft.harden(), soft.dead_entries()
    assert torch.equal(hard(torch.arange(300)), soft(torch.arange(300)))
    assert zeros > 300 * 16 // 3
    size = 300 * 2 + 4 * 300 + 4 * (300 * 16 - zeros) + 4 * 16 * 40
    assert module_bytes(hard) == size < 4 * 16 * 340


@pytest.mark.parametrize("empty", [True, False])
def test_a_bitmask_comes_back(empty: bool) -> None:
    factor = torch.randn(9, 11).relu() * (not empty)
    factor[4] = 0
    mask, starts, values = to_bitmask(factor)
    assert torch.equal(from_bitmask(mask, starts, values, 11), factor)
    some = torch.tensor([8, 4, 0])
    assert torch.equal(from_bitmask(mask[some], starts[some], values, 11), factor[some])


def test_eight_bits_are_rounded_while_training_and_steps_are_in_the_basis() -> None:
    soft = factored(toy(300, 40), 8, storage="uint8")
    hard = soft.harden()
    assert isinstance(hard, FactorizedEmbedding)
    assert hard.factor.dtype == torch.uint8
    assert int(hard.factor.max()) == 255
    torch.testing.assert_close(hard(torch.arange(300)), soft(torch.arange(300)))
    exact = soft.factor.relu() @ soft.basis
    assert 0 < float(((exact - soft.weight).norm() / exact.norm()).detach()) < 0.01
    soft(torch.arange(300)).sum().backward()
    gradient = soft.factor.grad
    assert gradient is not None
    assert gradient[soft.factor > 0].ne(0).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_survives_an_artifact(storage: str, tmp_path: Any) -> None:
    model = tiny("gpt2")
    hardened(model, DistilledFactorization(**OPTIONS, storage=storage, initialization="paper"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        one, two = (m(**inputs("gpt2")).logits for m in (model, again))
    assert torch.equal(one, two)
    hard: Any = again.get_input_embeddings()
    compiled: Any = torch.compile(hard.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.arange(9)), hard(torch.arange(9)))


# --- in models


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_table(name: str) -> None:
    """Factorized tables (ALBERT, ELECTRA) too; positions and token types are left alone."""
    model = tiny(name)
    ((_, found),) = rewrite.match(model, [DistilledFactorization(**OPTIONS)]).sites
    assert ("head" in found.roles) == (name not in {"llama", "t5_gated"})
    assert model.get_input_embeddings() in found.modules


def test_scaled_embeddings_keep_their_scale() -> None:
    model: Any = gemma()
    before = model.get_input_embeddings()(torch.arange(VOCAB))
    replaced(model, DistilledFactorization(rank=20))
    soft = model.get_input_embeddings()
    assert soft.scale == pytest.approx(32**0.5)
    after = soft(torch.arange(VOCAB))
    assert float(((after - before).norm() / before.norm()).detach()) < 0.7
    logits = model.lm_head(torch.ones(1, 32))
    torch.testing.assert_close(logits, torch.ones(1, 32) @ soft.weight.T, rtol=1e-4, atol=1e-5)


def test_three_tied_tables_stay_one() -> None:
    model: Any = tiny("t5")
    hardened(model, DistilledFactorization(**OPTIONS))
    stored = [n for n in model.state_dict() if n.endswith(("factor", "basis"))]
    assert stored == ["shared.factor", "shared.basis"]
    ids = torch.arange(9)
    assert torch.equal(model.shared(ids), model.decoder.embed_tokens(ids))


def test_the_seed_decides_a_random_start() -> None:
    torch.manual_seed(1)
    first = factored(toy(100), initialization="random", seed=3).weight
    torch.manual_seed(2)
    assert torch.equal(first, factored(toy(100), initialization="random", seed=3).weight)
    assert not torch.equal(first, factored(toy(100), initialization="random", seed=4).weight)


def test_a_table_of_zeros() -> None:
    for start in STARTS:
        soft = factored(torch.zeros(50, 8), 3, initialization=start, fit_steps=2)
        assert soft(torch.arange(50)).isfinite().all()
    zeros = torch.zeros(5, 4)
    factor, basis = fit_factors(zeros, shifted_factors(zeros, 2), 1, 0.1, lambda _: None)
    assert not (factor.relu() @ basis).any()


# --- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model: Any = tiny("bert")
    model.get_input_embeddings().weight.data[3, 2] = value
    found = refused(model, DistilledFactorization(**OPTIONS))
    assert found.code == "PLM203"
    assert "not finite" in found.message
    assert "bert.embeddings.word_embeddings" in f"{found.location}"


@pytest.mark.parametrize("storage", ["dense", "uint8"])
def test_a_rank_above_break_even_is_a_warning_with_the_number(storage: str) -> None:
    """99·32/(99 + 32) = 24.2; in 8 bits more than there are dimensions."""
    for rank in (24, 25, 32):
        chosen = DistilledFactorization(rank=rank, storage=storage)
        (found,) = [site for _, site in rewrite.match(tiny("bert"), [chosen]).sites]
        told = "rank {} is above 24, the largest that makes the 99 x 32 table smaller"
        expected = told.format(rank) if storage == "dense" and rank > 24 else ""
        assert found.warning == expected
    refusal = refused(tiny("bert"), DistilledFactorization(rank=33, storage=storage))
    assert refusal.code == "PLM203"
    assert "bert.embeddings.word_embeddings: rank 33 is above 32" in refusal.got


def test_two_passes_cannot_have_one_table() -> None:
    other = DistilledFactorization(**(OPTIONS | {"targets": "*word_embeddings"}))
    found = refused(tiny("bert"), DistilledFactorization(**OPTIONS), other)
    assert found.code == "PLM204"
    assert "bert.embeddings.word_embeddings" in found.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"fit_steps": -1},
        {"fit_learning_rate": 0.0},
        {"initialization": "svd"},
        {"storage": "csr"},
        {"seed": 1},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DistilledFactorization(**wrong)


def test_an_unknown_storage_in_a_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="csr"):
        FactorizedEmbedding(50, 8, 3, "csr")
