"""The facts of Tissier et al. (2019), the authors' program step by step, sizes, and the module
against a dense table."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc import rewrite
from plmcc.api import TableSite
from plmcc.artifact.size import module_bytes
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.program import Program
from plmcc.kit import Trainable
from plmcc.passes._shared.binarize import (
    Binarizer,
    codes_of,
    glibc_rand,
    gradients,
    official_start,
    orthogonality_gradient,
    sokal_michener,
)
from plmcc.passes._shared.bits import pack, unpack
from plmcc.passes.binary_embedding import BinaryCodedEmbedding, BinaryEmbedding
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

OPTIONS = {"bits": 12, "epochs": 3}
"""For tiny models; `tests/test_contract.py` reads it."""


def binarizer(**options: Any) -> Binarizer:
    known: dict[str, Any] = {
        "bits": 64,
        "activation": "hard_tanh",
        "official": True,
        "epochs": 1,
        "batch_size": 75,
        "learning_rate": 0.001,
        "regularization": 1.0,
    }
    return Binarizer(**(known | options))


def fitted(x_VD: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return binarizer(**options).fit(x_VD, lambda _: None)


def clipped(rows: int = 2000, dims: int = 32) -> Tensor:
    return (toy(rows, dims) / 3).clamp(-1, 1)


def test_steps_of_large_tables_take_a_thousandth_of_them() -> None:
    sizes = [BinaryEmbedding()._binarizer(rows).batch_size for rows in (2000, 75_999, 400_000)]
    assert sizes == [75, 75, 400]
    assert BinaryEmbedding(preset="official")._binarizer(400_000).batch_size == 75
    assert BinaryEmbedding(batch_size=10)._binarizer(400_000).batch_size == 10


@functools.cache
def soft(bits: int, preset: str = "paper") -> Trainable[BinaryCodedEmbedding]:
    made = BinaryEmbedding(bits=bits, preset=preset, epochs=8).replace(site(toy() * 0.05), PROGRAM)
    assert isinstance(made, Trainable)
    return made


def coded(rows: int = 50, bits: int = 21, **layout: Any) -> BinaryCodedEmbedding:
    """Random codes and decoder, D = 8."""
    random = torch.Generator().manual_seed(1)
    known: dict[str, Any] = {"activation": "tanh", "span": 0.7} | layout
    module = BinaryCodedEmbedding(rows, 8, bits, **known)
    module.codes.copy_(pack(torch.randint(0, 2, (rows, bits), generator=random), 1))
    module.decoder.data = torch.randn(bits, 8, generator=random) / 4
    module.bias.data = torch.randn(8, generator=random)
    return module


# --- the facts of the paper


def test_the_gradient_of_orthogonality() -> None:
    for shape in ((6, 4), (4, 6)):
        weight = torch.randn(shape, requires_grad=True)
        loss = 0.5 * (weight.T @ weight - torch.eye(shape[1])).square().sum()
        (expected,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(orthogonality_gradient(weight.detach()), expected)


def test_without_reconstruction_singular_values_follow_the_programs() -> None:
    """Measured with the authors' program: 256 x 100, 5 epochs of 134 batches."""
    weight, _ = official_start(256, 100)
    first = torch.linalg.svdvals(weight)
    assert float(first[0]) == pytest.approx(0.159135, abs=1e-6)
    assert float(first[-1]) == pytest.approx(0.038554, abs=1e-6)
    expected, rate = first, 0.001
    for _ in range(5):
        for _ in range(134):
            expected = expected - 2 * rate * expected * (expected.square() - 1)
        rate *= 0.95
    x_VD = torch.zeros(134 * 75, 100, dtype=torch.float64)  # no bit is set: nothing to reconstruct
    last, _ = fitted(x_VD, bits=256, epochs=5)
    found = torch.linalg.svdvals(last)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert float(found[0]) == pytest.approx(0.476159, abs=1e-6)
    assert float(found[-1]) == pytest.approx(0.128500, abs=1e-6)


@pytest.mark.parametrize(("bits", "loss"), [(256, 49.0069), (64, 49.0128)])
def test_orthogonality_at_the_start(bits: int, loss: float) -> None:
    weight, bias = official_start(bits, 100)
    assert float(weight.norm()) == pytest.approx(1)
    assert float(bias.norm()) == pytest.approx(1)
    gram = weight.T @ weight
    found = float(0.5 * (gram - torch.eye(100, dtype=gram.dtype)).square().sum())
    assert found == pytest.approx(50 - 1 + 0.5 * float(gram.square().sum()))
    assert found == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(("bits", "floor"), [(6, 2.0), (10, 0.0), (16, 0.0)])
def test_the_floor_of_orthogonality(bits: int, floor: float) -> None:
    weight, _ = official_start(bits, 10)
    for _ in range(400):
        weight = weight - 0.1 * orthogonality_gradient(weight)
    gram = weight.T @ weight
    assert float(0.5 * (gram - torch.eye(10, dtype=gram.dtype)).square().sum()) == pytest.approx(
        floor, abs=1e-9
    )


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_the_weight_learns_through_the_decoder_only(activation: str) -> None:
    x_ND = clipped(20)
    weight, bias = (part.float().requires_grad_() for part in official_start(12, 32))
    bits = (x_ND @ weight.detach().T > 0).float()  # the encoder's copy has no gradient
    inner = bits @ weight + bias
    made = inner.tanh() if activation == "tanh" else inner
    expected = torch.autograd.grad(0.5 * (x_ND - made).square().sum(), [weight, bias])
    found = gradients(x_ND, weight.detach(), bias.detach(), activation)
    torch.testing.assert_close(found, expected)
    assert found[0].any()


def test_the_random_numbers_of_the_c_library() -> None:
    assert glibc_rand(3) == [1804289383, 846930886, 1681692777]
    assert max(glibc_rand(2000)) <= 2**31 - 1


def test_a_short_run_is_the_authors_program() -> None:
    """Written out word by word from the description of the program."""
    x_VD, rate = clipped(190).double(), 0.001
    weight, bias = (part.numpy().copy() for part in official_start(40, 32))
    for _ in range(2):
        for first in (0, 75, 150):
            weight -= 2 * rate * weight @ (weight.T @ weight - np.eye(32))
            to_weight, to_bias = np.zeros_like(weight), np.zeros_like(bias)
            for x in x_VD[first : first + 75].numpy():
                bits = (weight @ x > 0).astype(float)
                made = np.clip(weight.T @ bits + bias, -1, 1)
                delta = (made - x) * (1 - made**2)
                to_weight += np.outer(bits, delta)
                to_bias += delta
            weight -= rate * to_weight
            bias -= rate * to_bias
        rate *= 0.95
    found = fitted(x_VD, bits=40, epochs=2)
    np.testing.assert_allclose(found[0].numpy(), weight, atol=1e-10)
    np.testing.assert_allclose(found[1].numpy(), bias, atol=1e-10)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_similarity_is_kept_better_with_more_bits_and_than_by_random_planes(preset: str) -> None:
    kept, table = [], toy()
    for bits in (64, 128, 256):
        made = soft(bits, preset)
        codes = unpack(made.hard.codes, bits, 1).bool()
        torch.manual_seed(0)
        planes = codes_of(table, torch.randn(bits, 32))
        one, two = torch.randint(0, len(table), (2, 5000))
        cosine = F.cosine_similarity(table[one], table[two])
        ours, theirs = (
            spearmanr(cosine, sokal_michener(c[one], c[two])).statistic for c in (codes, planes)
        )
        assert ours > theirs
        assert made.statistics()["similarity"] == pytest.approx(ours, abs=0.02)
        assert made.statistics()["ones"] == pytest.approx(0.5, abs=0.05)
        assert made.statistics()["distinct_codes"] == 1.0
        kept.append(ours)
    assert kept == sorted(kept)


def test_more_bits_reconstruct_better_and_small_tables_need_their_scale() -> None:
    errors = [soft(bits).statistics()["relative_error"] for bits in (16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8
    assert errors[-1] < 0.3
    table = toy()
    expected = (
        BinaryEmbedding(bits=64, epochs=8)
        .replace(site(table), PROGRAM)
        .statistics()["relative_error"]
    )
    assert errors[1] == pytest.approx(expected, rel=0.05)


def test_sokal_michener() -> None:
    one, two = torch.rand(2, 30, 77) > 0.5
    found = sokal_michener(one, two)
    torch.testing.assert_close(found, 1 - (one ^ two).float().sum(-1) / 77)
    assert torch.equal(found, sokal_michener(two, one))
    assert torch.equal(found, sokal_michener(~one, ~two))


def test_packed_codes_are_the_words_of_the_programs_files() -> None:
    """Its u64 integers hold the first bit in their highest place."""
    codes = torch.randint(0, 2, (5, 128))
    words = pack(codes, 1).numpy().view(">u8")
    assert words.shape == (5, 2)
    for row, pair in zip(codes.tolist(), words.tolist(), strict=True):
        stream = "".join(map(str, row))
        assert [int(stream[:64], 2), int(stream[64:], 2)] == pair
    again = torch.from_numpy(words.astype(">u8").view(np.uint8).reshape(5, 16).copy())
    assert torch.equal(unpack(again, 128, 1), codes)


@pytest.mark.parametrize("bits", [1, 7, 64, 65, 100])
def test_any_number_of_bits_is_kept(bits: int) -> None:
    made = BinaryEmbedding(bits=bits, epochs=1).replace(site(toy(500)), PROGRAM)
    assert isinstance(made, Trainable)
    codes = unpack(made.hard.codes, bits, 1)
    assert made.hard.codes.shape == (500, -(-bits // 8))
    varied = (codes.float().mean(0) > 0) & (codes.float().mean(0) < 1)
    assert varied.float().mean() > 0.9


def test_rows_are_what_the_decoder_makes_of_the_encoders_bits() -> None:
    """Tied: the stored decoder is the weight whose sign of W·x the codes are."""
    table = toy(300) * 0.05
    made = BinaryEmbedding(bits=48, epochs=2).replace(site(table), PROGRAM)
    assert isinstance(made, Trainable)
    coded = made.hard
    x_VD = (table / coded.span).clamp(-1, 1)
    assert float(table.std() / coded.span) == pytest.approx(1 / 3, rel=0.02)
    bits = x_VD @ coded.decoder.T > 0
    assert torch.equal(bits.long(), unpack(coded.codes, 48, 1))
    expected = torch.tanh(bits.float() @ coded.decoder + coded.bias) * coded.span
    torch.testing.assert_close(made(torch.arange(300)), expected)
    assert float(expected.detach().abs().max()) <= coded.span


# --- sizes


@pytest.mark.parametrize(
    ("rows", "dims", "size"),
    [
        (30522, 768, 1_766_208),
        (50257, 768, 2_397_728),
        (400_000, 300, 13_108_400),
        (151_936, 1024, 5_914_624),
    ],
)
def test_exact_sizes(rows: int, dims: int, size: int) -> None:
    with torch.device("meta"):
        module = BinaryCodedEmbedding(rows, dims, 256, "tanh", 1.0)
    assert module_bytes(module) == size == rows * 256 // 8 + 4 * dims * 257
    assert module.ideal_bits() == 8 * size


# --- the module against a dense table


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"activation": "hard_tanh"},
        {"activation": "none"},
        {"activation": "none", "padding_idx": 7, "zero_padding": True},
        {"padding_idx": 7},
        {"padding_idx": 7, "zero_padding": True},
        {"scale": 5.65},
        {"bits": 64},
    ],
    ids=str,
)
def test_lookup_and_head_are_those_of_the_dense_table(
    layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plmcc.passes.binary_embedding._TILE", 16)
    module = coded(**layout)
    decoder, bias = (nn.Parameter(p.detach().clone()) for p in (module.decoder, module.bias))
    stream = [
        "".join(f"{byte:08b}" for byte in row)[: module.bits] for row in module.codes.tolist()
    ]
    bits = torch.tensor([[float(bit) for bit in row] for row in stream])
    inner = bits @ decoder + bias
    made = {"tanh": inner.tanh(), "none": inner, "hard_tanh": inner.clamp(-1, 1)}
    check_calls(module, made[module.activation] * 0.7, [decoder, bias])


# --- in models


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_table(name: str) -> None:
    """Factorized tables (ALBERT, ELECTRA) too; positions and token types are left alone."""
    model = tiny(name)
    ((_, found),) = rewrite.match(model, [BinaryEmbedding(**OPTIONS)]).sites
    assert ("head" in found.roles) == (name not in {"llama", "t5_gated"})
    assert model.get_input_embeddings() in found.modules
    assert len(found.paths) == {"t5": 4, "t5_gated": 3}.get(name, len(found.paths))


def test_scaled_embeddings_keep_their_scale() -> None:
    model: Any = gemma()
    before = model.get_input_embeddings()(torch.arange(VOCAB)).abs().mean()
    (done,) = replaced(model, BinaryEmbedding(bits=24, epochs=20, batch_size=16))
    soft = model.get_input_embeddings()
    assert soft.hard.scale == pytest.approx(32**0.5)
    torch.testing.assert_close(soft(torch.arange(VOCAB)), soft.weight * 32**0.5)
    after = soft(torch.arange(VOCAB)).abs().mean()
    assert 0.25 * before < after < before
    logits = model.lm_head(torch.ones(1, 32))
    torch.testing.assert_close(logits, torch.ones(1, 32) @ soft.weight.T, rtol=1e-4, atol=1e-5)
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
    assert done.site.roles == ("embedding", "head")


def test_three_tied_tables_stay_one() -> None:
    model: Any = tiny("t5")
    hardened(model, BinaryEmbedding(**OPTIONS))
    stored = [name for name in model.state_dict() if name.endswith("codes")]
    assert stored == ["shared.codes"]
    ids = torch.arange(9)
    rows = [table(ids) for table in (model.shared, model.encoder.embed_tokens)]
    assert torch.equal(*rows)
    assert model(**inputs("t5")).logits.isfinite().all()


def test_codes_are_frozen_and_the_decoder_learns() -> None:
    (done,) = replaced(tiny("bert"), BinaryEmbedding(**OPTIONS, decoder_learning_rate=0.5))
    assert [n for n, _ in done.soft.named_parameters()] == ["hard.decoder", "hard.bias"]
    assert done.objective is not None
    (group,) = done.objective.parameter_groups()
    assert (group["params"], group["lr"]) == (list(done.soft.parameters()), 0.5)
    assert BinaryEmbedding().objective(done.site, done.soft) is None


def test_words_that_the_data_has_often_are_nearer() -> None:
    counts, errors = torch.zeros(60, dtype=torch.long), []
    counts[20:30] = 5000
    for power in (0.0, 1.0):
        model: Any = tiny("bert")
        table = model.get_input_embeddings().weight.detach().clone()
        chosen = BinaryEmbedding(bits=12, epochs=60, frequency_power=power)
        (done,) = rewrite.replace_all(
            model, rewrite.match(model, [chosen], data=CalibrationData(counts=counts))
        )
        errors.append((done.soft(torch.arange(VOCAB)) - table).square().sum(1).detach())
    assert errors[1][20:30].sum() < 0.9 * errors[0][20:30].sum()


def test_the_seed_decides_and_the_random_state_is_left_alone() -> None:
    def made(seed: int) -> Tensor:
        made = BinaryEmbedding(bits=20, epochs=1, seed=seed).replace(site(toy(300)), PROGRAM)
        assert isinstance(made, Trainable)
        rows: Tensor = made(torch.arange(9))
        return rows

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = made(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, made(3))
    assert not torch.equal(first, made(4))


def test_a_table_of_zeros() -> None:
    made = BinaryEmbedding(bits=4, epochs=1).replace(site(torch.zeros(50, 8)), PROGRAM)
    assert made(torch.arange(50)).isfinite().all()
    assert all(np.isfinite(value) for value in made.statistics().values())


# --- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model: Any = tiny("bert")
    model.get_input_embeddings().weight.data[3, 2] = value
    found = refused(model, BinaryEmbedding(**OPTIONS))
    assert found.code == "PLM203"
    assert "not finite" in found.message
    assert "bert.embeddings.word_embeddings" in f"{found.location}"


def test_codes_and_decoder_larger_than_the_table_are_refused() -> None:
    found = refused(tiny("bert"), BinaryEmbedding(bits=200))
    assert found.code == "PLM203"
    assert "bert.embeddings.word_embeddings" in found.got
    assert "200 bits a row and the decoder would be larger than the 99 x 32 table" in found.got


def test_two_passes_cannot_have_one_table() -> None:
    other = BinaryEmbedding(**(OPTIONS | {"targets": "*word_embeddings"}))
    found = refused(tiny("bert"), BinaryEmbedding(**OPTIONS), other)
    assert found.code == "PLM204"
    assert "bert.embeddings.word_embeddings" in found.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": -8},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"regularization": -1.0},
        {"preset": "thesis"},
        {"activation": "relu"},
        {"preset": "official", "seed": 1},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BinaryEmbedding(**wrong)


def test_an_unknown_activation_in_a_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="relu"):
        coded(activation="relu")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_table_whose_rows_are_the_same_is_told(rows: int) -> None:
    model = tiny("bert")
    table = model.get_input_embeddings().get_parameter("weight")
    with torch.no_grad():
        table.copy_(table[:rows].repeat(table.shape[0], 1)[: table.shape[0]])
    [found] = BinaryEmbedding(bits=16, targets="input_embeddings").match(Program(model))
    assert isinstance(found, TableSite)
    assert ("all rows of the table are the same" in found.warning) == (rows == 1)
    soft = BinaryEmbedding(bits=16).replace(found, Program(model))
    assert soft.statistics()["relative_error"] < 10  # it was 1e33
