"""The facts of Shu and Nakayama (2018), packing, sizes, and the module against a dense table.

The toy of the facts: 4000 rows X = Z·A + 0.2·noise of 32 dimensions and rank 10.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc import Pipeline, rewrite
from plmcc.artifact.size import module_bytes
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import CalibrationData
from plmcc.kit import LearningRate, Trainable
from plmcc.passes._shared.bits import bits_for, pack, row_bytes, unpack
from plmcc.passes.compositional_codes import CodedEmbedding, CompositionalCodes
from plmcc.passes.compositional_codes.autoencoder import CodeAutoencoder, fit_autoencoder
from plmcc.passes.compositional_codes.residual import decode, encode, residual_quantize
from plmcc.utils.progress import Progress
from support.embedding_tables import PROGRAM, site
from support.tiny_models import NAMES, VOCAB, inputs, tiny

OPTIONS = {"codebooks": 2, "codewords": 4, "beam": 2, "rounds": 1}
"""For tiny models; `tests/test_contract.py` reads it."""

PAPER: dict[str, Any] = {"initialization": "paper", "learning_rate": 5e-3, "batch_size": 128}


@functools.cache
def toy() -> Tensor:
    random = torch.Generator().manual_seed(0)
    latent, mix = torch.randn(4000, 10, generator=random), torch.randn(10, 32, generator=random)
    return latent @ mix / 10**0.5 + 0.2 * torch.randn(4000, 32, generator=random)


@functools.cache
def metrics(codebooks: int, codewords: int, **options: Any) -> dict[str, float]:
    """Reconstruction of the toy: `reconstruction_loss` is ½·mean ||x' - x||², the hard loss."""
    chosen = CompositionalCodes(codebooks=codebooks, codewords=codewords, **options)
    return chosen.replace(site(toy()), PROGRAM).statistics()


def paper(codebooks: int, codewords: int, epochs: int = 40) -> dict[str, float]:
    return metrics(codebooks, codewords, epochs=epochs, **PAPER)


def coded(rows: int = 50, codebooks: int = 3, codewords: int = 5, **layout: Any) -> CodedEmbedding:
    """Random codes and codebooks, D = 8."""
    random = torch.Generator().manual_seed(1)
    module = CodedEmbedding(rows, 8, codebooks, codewords, **layout)
    codes = torch.randint(0, codewords, (rows, codebooks), generator=random)
    module.codes.copy_(pack(codes, module.bits))
    module.codebooks.data = torch.randn(codebooks * codewords, 8, generator=random)
    return module


def naive_codes(module: CodedEmbedding) -> Tensor:
    """The codes by reading the bits one after the other."""
    rows = []
    for packed in module.codes.tolist():
        stream = "".join(f"{byte:08b}" for byte in packed)
        width = module.bits
        words = [stream[i * width : (i + 1) * width] for i in range(module.num_codebooks)]
        rows.append([int(word, 2) for word in words])
    return torch.tensor(rows)


def dense(module: CodedEmbedding, codebooks: Tensor) -> Tensor:
    """one-hot(codes) times the stacked codebooks."""
    hot = F.one_hot(naive_codes(module), module.codewords).flatten(1).to(codebooks.dtype)
    table_VD = hot @ codebooks
    if module.zero_padding and module.padding_idx is not None:
        keep_V = torch.arange(len(table_VD)) != module.padding_idx
        return table_VD * keep_V[:, None]
    return table_VD


# --- the facts of the paper


def test_a_row_is_the_sum_of_the_codebook_entries_its_code_names() -> None:
    module = coded()
    torch.testing.assert_close(module.weight, dense(module, module.codebooks))


def test_moving_a_vector_from_one_codebook_to_another_changes_nothing() -> None:
    module, shift_D = coded(), torch.randn(8)
    before = module.weight.detach().clone()
    books_MKD = module.codebooks.data.view(3, 5, 8)
    books_MKD[0] += shift_D
    assert not torch.allclose(module.weight, before)
    books_MKD[2] -= shift_D
    torch.testing.assert_close(module.weight, before)


def test_permuting_codebooks_with_their_codes_changes_nothing() -> None:
    module, order = coded(), [2, 0, 1]
    before = module.weight.detach().clone()
    module.codes.copy_(pack(naive_codes(module)[:, order], module.bits))
    assert not torch.allclose(module.weight, before)
    module.codebooks.data = module.codebooks.data.view(3, 5, 8)[order].flatten(0, 1)
    torch.testing.assert_close(module.weight, before)


def test_codes_are_sampled_in_proportion_to_softplus() -> None:
    """Without the log, frequencies would be softmax(softplus)."""
    torch.manual_seed(0)
    model, draws = CodeAutoencoder(6, 1, 4), 40_000
    nn.init.normal_(model.logit.weight, std=2.0)
    nn.init.normal_(model.hidden.weight, std=2.0)
    row_1D = torch.randn(1, 6)
    with torch.no_grad():
        alpha_K = F.softplus(model.logit(torch.tanh(model.hidden(row_1D))))[0]
        sampled = model.sample(model.logits(row_1D).expand(draws, 1, 4)).argmax(-1)
    frequency_K = sampled.flatten().bincount(minlength=4) / draws
    bound = 5 * 0.5 / draws**0.5
    torch.testing.assert_close(frequency_K, alpha_K / alpha_K.sum(), rtol=0, atol=bound)
    without_log = alpha_K.softmax(-1)
    assert float((frequency_K - without_log).abs().max()) > 4 * bound, "the test tells nothing"


def test_the_temperature_sharpens_samples() -> None:
    logits = torch.zeros(2000, 1, 4)
    sharp, smooth = (CodeAutoencoder(6, 1, 4, t).sample(logits).amax(-1).mean() for t in (0.1, 1))
    assert sharp > 0.9 > 0.7 > smooth


@pytest.mark.parametrize(("codebooks", "codewords"), [(8, 8), (16, 4), (1, 8)])
def test_the_first_loss_is_half_the_mean_square(codebooks: int, codewords: int) -> None:
    torch.manual_seed(0)
    expected = 0.5 * toy().square().sum(-1).mean()
    loss = CodeAutoencoder(32, codebooks, codewords).loss(toy())
    assert loss.item() == pytest.approx(float(expected), rel=0.02)


def test_the_autoencoder_is_the_papers() -> None:
    torch.manual_seed(0)
    model = CodeAutoencoder(32, 8, 4)
    assert (model.hidden.out_features, model.logit.out_features) == (16, 32)
    for kernel in (model.hidden.weight, model.logit.weight, model.codebooks):
        assert 0.009 < kernel.detach().abs().max() <= 0.01
    assert not model.hidden.bias.any()
    assert not model.logit.bias.any()


def test_export_takes_the_best_code_without_noise() -> None:
    torch.manual_seed(0)
    model = CodeAutoencoder(32, 4, 4)
    codes, books = model.export(toy())
    assert torch.equal(codes, model.logits(toy()).argmax(-1))
    assert torch.equal(codes, model.export(toy())[0])
    assert torch.equal(books.flatten(0, 1), model.codebooks)


def test_one_codeword_learns_the_mean() -> None:
    """K = 1 is no option of the pass: its best loss is half of the total variance."""
    with pytest.raises(ValidationError):
        CompositionalCodes(codewords=1)
    torch.manual_seed(0)
    model = CodeAutoencoder(32, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.loss(toy())
        loss.backward()
        optimizer.step()
    variance = float((toy() - toy().mean(0)).square().sum(-1).mean())
    assert loss.item() == pytest.approx(variance / 2, rel=1e-3)


def test_one_codebook_is_not_below_k_means() -> None:
    means = KMeans(8, n_init=5, random_state=0).fit(toy().numpy())
    bound = means.inertia_ / len(toy()) / 2
    assert paper(1, 8)["reconstruction_loss"] >= 0.999 * bound
    assert metrics(1, 8)["reconstruction_loss"] == pytest.approx(bound, rel=0.03)


@pytest.mark.parametrize("fit", [paper, metrics])
def test_the_hard_loss_falls_with_the_number_of_codebooks(fit: Any) -> None:
    losses = [fit(codebooks, 8)["reconstruction_loss"] for codebooks in (2, 4, 8)]
    assert losses[0] > 1.1 * losses[1] > 1.21 * losses[2]


@pytest.mark.parametrize("fit", [paper, metrics])
def test_half_the_squared_mean_distance_bounds_the_hard_loss(fit: Any) -> None:
    found = fit(8, 8)
    assert 0 < 0.5 * found["mean_distance"] ** 2 <= found["reconstruction_loss"]


@pytest.mark.parametrize("fit", [paper, metrics])
def test_every_codeword_is_used(fit: Any) -> None:
    assert fit(8, 8)["codewords_used"] == 1.0


def test_residual_codes_beat_the_autoencoder_at_equal_bits() -> None:
    assert metrics(8, 8)["reconstruction_loss"] < 0.8 * paper(8, 8)["reconstruction_loss"]
    assert metrics(8, 8)["reconstruction_loss"] < 1.7


def test_the_autoencoder_learns_and_gets_surer_with_steps() -> None:
    start = float(0.5 * toy().square().sum(-1).mean())
    losses, sure = [start], []
    for epochs in (3, 25):
        torch.manual_seed(0)
        model = CodeAutoencoder(32, 8, 8)
        options = CompositionalCodes(codebooks=8, codewords=8, epochs=epochs, **PAPER)
        with Progress("test") as progress:
            losses.append(fit_autoencoder(model, toy(), options, progress))
        sure.append(float(model.logits(toy()).detach().softmax(-1).amax(-1).mean()))
    assert losses == sorted(losses, reverse=True)
    assert 1 / 8 < sure[0] < sure[1] - 0.1


def test_the_figures_are_those_of_the_module() -> None:
    soft = CompositionalCodes(codebooks=4, codewords=8).replace(site(toy()), PROGRAM)
    assert isinstance(soft, Trainable)
    error_V = (soft.weight.detach() - toy()).square().sum(-1)
    spread = (toy() - toy().mean(0)).square().sum(-1).mean()
    expected = {
        "reconstruction_loss": float(error_V.mean() / 2),
        "mean_distance": float(error_V.sqrt().mean()),
        "relative_error": float(error_V.mean() / spread),
    }
    assert expected == pytest.approx({k: soft.statistics()[k] for k in expected}, rel=1e-4)


# --- residual quantization


def quantize(rounds: int = 0, beam: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    return residual_quantize(
        toy(), torch.ones(len(toy())), 6, 8, beam, rounds, seed, lambda *_: None
    )


def error(codes: Tensor, books: Tensor) -> float:
    return float((decode(codes, books) - toy()).square().sum())


def test_a_wider_beam_is_not_worse() -> None:
    _, books = quantize()
    errors = [error(encode(toy(), books, beam, lambda _: None), books) for beam in (1, 2, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.01 * errors[2]


def test_a_full_beam_finds_the_best_codes() -> None:
    rows, books = toy()[:200], torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    best = torch.cdist(rows, decode(every, books)).argmin(1)
    assert torch.equal(encode(rows, books, 64, lambda _: None), every[best])


def test_more_rounds_of_refinement_never_raise_the_error() -> None:
    errors = [error(*quantize(rounds)) for rounds in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.05 * errors[-1]


def test_a_table_that_is_a_sum_of_codewords_is_recovered() -> None:
    random = torch.Generator().manual_seed(3)
    books = torch.randn(2, 4, 16, generator=random) * torch.tensor([10.0, 1.0])[:, None, None]
    table = decode(torch.randint(0, 4, (500, 2), generator=random), books)
    codes, found = residual_quantize(table, torch.ones(len(table)), 2, 4, 4, 2, 0, lambda *_: None)
    torch.testing.assert_close(decode(codes, found), table, rtol=0, atol=1e-2)


def test_chunks_do_not_change_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, books = quantize()
    expected = encode(toy(), books, 4, lambda _: None)
    monkeypatch.setattr("plmcc.passes.compositional_codes.residual.CHUNK", 333)
    assert torch.equal(encode(toy(), books, 4, lambda _: None), expected)


def test_large_tables_are_fitted_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmcc.passes.compositional_codes.residual.SAMPLE", 500)
    codes, books = quantize(1)
    assert len(codes) == len(toy())
    assert error(codes, books) < 0.5 * float(toy().square().sum())


_PEAK = """
import resource, torch
from plmcc.passes.compositional_codes.residual import residual_quantize
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
residual_quantize(torch.randn(500, 256), torch.ones(500), 2, 4, 8, 1, 0, lambda *_: None)
table = torch.randn(50_000, 256)
before = peak()
residual_quantize(table, torch.ones(len(table)), 2, 16, 8, 1, 0, lambda *_: None)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_fitting_needs_little_memory_beyond_the_table() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50_000 * 256 * 4 / 2**20 + 300


# --- packing


@given(st.integers(1, 16), st.integers(1, 21), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_unpacking_undoes_packing(bits: int, codes: int, rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, codes), generator=random)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes(codes, bits)) == (rows, -(-codes * bits // 8))
    assert torch.equal(unpack(packed, codes, bits), values)


@given(st.integers(1, 16), st.integers(1, 21))
@settings(deadline=None)
def test_extreme_codes_survive_and_spare_bits_are_zero(bits: int, codes: int) -> None:
    largest = torch.full((1, codes), 2**bits - 1)
    packed = pack(largest, bits)
    assert torch.equal(unpack(packed, codes, bits), largest)
    stream = "".join(f"{byte:08b}" for byte in packed[0].tolist())
    assert stream == "1" * codes * bits + "0" * (-codes * bits % 8)


def test_the_first_code_is_in_the_highest_bits() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 3).tolist() == [[0b00101001, 0b10000000]]


@pytest.mark.parametrize(
    ("codewords", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (256, 8), (65536, 16)]
)
def test_bits_of_a_code(codewords: int, bits: int) -> None:
    assert bits_for(codewords) == bits


# --- sizes


@pytest.mark.parametrize(
    ("rows", "dims", "codebooks", "codewords", "size"),
    [
        (30522, 768, 16, 32, 1_878_084),
        (30522, 768, 32, 16, 2_061_216),
        (50257, 768, 16, 32, 2_075_434),
        (50257, 768, 32, 16, 2_376_976),
        (400_000, 300, 16, 32, 4_614_400),
        (400_000, 300, 32, 16, 7_014_400),
        (151_936, 1024, 16, 32, 3_616_512),
        (151_936, 1024, 32, 16, 4_528_128),
    ],
)
def test_exact_sizes(rows: int, dims: int, codebooks: int, codewords: int, size: int) -> None:
    with torch.device("meta"):
        module = CodedEmbedding(rows, dims, codebooks, codewords)
    assert module_bytes(module) == size
    assert module.ideal_bits() == 8 * size  # rows are whole bytes here


def test_ideal_bits_do_not_count_spare_bits_or_lower_precision() -> None:
    module = CodedEmbedding(100, 8, 3, 8).to(torch.bfloat16)
    assert module.ideal_bits() == 100 * 3 * 3 + 32 * 3 * 8 * 8
    assert module_bytes(module) == 100 * 2 + 2 * 3 * 8 * 8


# --- the module against a dense table

LAYOUTS = [
    {},
    {"codebooks": 2, "codewords": 16},
    {"codebooks": 1, "codewords": 300},
    {"codebooks": 5, "codewords": 2},
    {"padding_idx": 7},
    {"padding_idx": 7, "zero_padding": True},
    {"scale": 5.65},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lookup_is_indexing_of_the_table(layout: dict[str, Any]) -> None:
    module = coded(**layout)
    for ids in (torch.randint(0, 50, (2, 3, 4)), torch.tensor(7), torch.arange(50)):
        rows = module.weight[ids] * module.scale
        torch.testing.assert_close(module(ids), rows)
        torch.testing.assert_close(module(ids), dense(module, module.codebooks)[ids] * module.scale)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_tied_head_is_the_product_with_the_table(layout: dict[str, Any]) -> None:
    module = coded(**layout)
    hidden, other = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    other.data.copy_(hidden.data)
    codebooks = nn.Parameter(module.codebooks.detach().clone())
    weights = torch.randn(2, 3, 50)
    ours, theirs = module.attend(hidden), other @ dense(module, codebooks).T
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.codebooks.grad, codebooks.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_a_lookup_are_those_of_an_embedding(layout: dict[str, Any]) -> None:
    module, ids = coded(**layout), torch.randint(0, 50, (40,)).index_fill(0, torch.tensor(3), 7)
    codebooks = nn.Parameter(module.codebooks.detach().clone())
    weights = torch.randn(40, 8)
    (module(ids) * weights).sum().backward()
    rows = F.embedding(ids, dense(module, codebooks), padding_idx=module.padding_idx)
    (rows * module.scale * weights).sum().backward()
    torch.testing.assert_close(module.codebooks.grad, codebooks.grad, rtol=1e-4, atol=1e-4)


def test_a_zero_padding_row_stays_zero_while_codebooks_move() -> None:
    module = coded(padding_idx=7, zero_padding=True)
    module.codebooks.data += 3
    assert not module(torch.tensor([7])).any()
    assert not module.weight[7].any()
    assert not module.attend(torch.randn(2, 8))[:, 7].any()
    module(torch.tensor([7, 7])).sum().backward()
    assert not module.codebooks.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("zero", [True, False])
def test_the_padding_row_is_kept_as_it_was(zero: bool) -> None:
    table = toy().clone()
    table[5] *= 0.0 if zero else 1.0
    soft = CompositionalCodes(codebooks=4, codewords=8).replace(site(table, padding_idx=5), PROGRAM)
    assert isinstance(soft, Trainable)
    assert soft.hard.zero_padding is zero
    assert bool(soft(torch.tensor([5])).any()) is not zero
    soft(torch.tensor([5])).sum().backward()
    assert not soft.hard.codebooks.grad.any()


def test_embed_scale_is_kept() -> None:
    model = tiny("mbart")
    before = model.get_input_embeddings()(torch.arange(VOCAB)).abs().mean()
    soft = replaced(model, codebooks=4, codewords=16)
    assert soft.hard.scale == pytest.approx(32**0.5)
    after = soft(torch.arange(VOCAB)).abs().mean()
    assert after.item() == pytest.approx(before.item(), rel=0.25)
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(soft.attend(hidden), hidden @ soft.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("initialization", ["residual", "paper"])
def test_tables_of_lower_precision(dtype: torch.dtype, initialization: str) -> None:
    chosen = CompositionalCodes(
        codebooks=4,
        codewords=8,
        epochs=2,
        initialization=initialization,
    )
    half = chosen.replace(site(toy().to(dtype)), PROGRAM)
    single = chosen.replace(site(toy().to(dtype).float()), PROGRAM)
    assert isinstance(half, Trainable)
    assert isinstance(single, Trainable)
    ids = torch.arange(10)
    assert half(ids).dtype == half.attend(toy()[:2].to(dtype)).dtype == dtype
    assert torch.equal(half.hard.codes, single.hard.codes)
    torch.testing.assert_close(half(ids).float(), single(ids), rtol=2e-2, atol=2e-2)


def test_an_empty_lookup() -> None:
    assert coded()(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 8)


def test_saved_codebooks_have_the_usual_layout_in_memory() -> None:
    """Else kernels differ between the model in memory and the one that was loaded."""
    soft = CompositionalCodes(codebooks=4, codewords=8).replace(site(toy()), PROGRAM)
    assert all(value.is_contiguous() for value in soft.state_dict().values())


# --- fitting in models


def replaced(model: Any, **options: Any) -> Trainable[CodedEmbedding]:
    found = rewrite.match(model, [CompositionalCodes(**(OPTIONS | options))])
    (done,) = rewrite.replace_all(model, found)
    assert isinstance(done.soft, Trainable)
    return done.soft


def refused(model: Any, *passes: CompositionalCodes) -> Any:
    with pytest.raises(PlmccError) as caught:
        rewrite.replace_all(model, rewrite.match(model, passes))
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_table(name: str) -> None:
    model = tiny(name)
    ((_, found),) = rewrite.match(model, [CompositionalCodes(**OPTIONS)]).sites
    untied = {"llama", "t5_gated"}
    assert ("head" in found.roles) == (name not in untied)
    assert model.get_input_embeddings() in found.modules


@pytest.mark.parametrize("initialization", ["residual", "product"])
def test_words_that_the_data_has_often_are_nearer(initialization: str) -> None:
    counts = torch.zeros(60, dtype=torch.long)  # of 99: ids beyond do not occur
    counts[20:30] = 5000
    options: dict[str, Any] = {"codebooks": 4, "codewords": 4, "initialization": initialization}
    errors = []
    for power in (0.0, 1.0):
        model: Any = tiny("bert")
        table = model.get_input_embeddings().weight.detach().clone()
        chosen = CompositionalCodes(**(options | {"frequency_power": power}))
        (done,) = rewrite.replace_all(
            model, rewrite.match(model, [chosen], data=CalibrationData(counts=counts))
        )
        errors.append((done.soft(torch.arange(VOCAB)) - table).square().sum(1).detach())
    assert errors[1][20:30].sum() < 0.7 * errors[0][20:30].sum()
    assert errors[1].sum() > errors[0].sum()


@pytest.mark.parametrize("initialization", ["residual", "paper"])
def test_the_seed_decides(initialization: str) -> None:
    def codes(seed: int) -> Tensor:
        model = tiny("bert")
        return replaced(model, initialization=initialization, epochs=3, seed=seed).hard.weight

    torch.manual_seed(1)
    first = codes(3)
    torch.manual_seed(2)
    assert torch.equal(first, codes(3))
    assert not torch.equal(first, codes(4))


@pytest.mark.parametrize("initialization", ["residual", "paper"])
def test_fitting_leaves_the_random_state_alone(initialization: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    replaced(tiny("bert"), initialization=initialization, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model: Any = tiny("bert")
    model.get_input_embeddings().weight.data[3, 2] = value
    found = refused(model, CompositionalCodes(**OPTIONS))
    assert found.code == "PLM203"
    assert "not finite" in found.message
    assert "bert.embeddings.word_embeddings" in f"{found.location}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"codewords": 128}, "128 codewords for a table of only 99 rows"),
        ({"codebooks": 64, "codewords": 16}, "larger than the 99 x 32 table"),
    ],
)
def test_options_that_do_not_fit_the_table(options: dict[str, int], reason: str) -> None:
    found = refused(tiny("bert"), CompositionalCodes(**options))
    assert (found.code, "bert.embeddings.word_embeddings" in found.got) == ("PLM203", True)
    assert reason in found.got


def test_a_miss_does_not_stop_other_tables() -> None:
    chosen = CompositionalCodes(
        **(OPTIONS | {"targets": "embeddings", "codebooks": 1, "codewords": 60})
    )
    found = rewrite.match(tiny("bert"), [chosen])
    assert [s.path for _, s in found.sites] == ["bert.embeddings.word_embeddings"]
    assert any("60 codewords for a table of only 2 rows" in miss.reason for _, miss in found.misses)


def test_two_passes_cannot_have_one_table() -> None:
    two = CompositionalCodes(**(OPTIONS | {"targets": "*word_embeddings"}))
    found = refused(tiny("bert"), CompositionalCodes(**OPTIONS), two)
    assert found.code == "PLM204"
    assert "bert.embeddings.word_embeddings" in found.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"codebooks": 0},
        {"codewords": 65537},
        {"beam": 0},
        {"rounds": -1},
        {"epochs": 0},
        {"temperature": 0.0},
        {"initialization": "kmeans"},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompositionalCodes(**wrong)


def test_codes_are_frozen_and_codebooks_learn() -> None:
    soft = replaced(tiny("bert"))
    assert [name for name, _ in soft.named_parameters()] == ["hard.codebooks"]
    assert not soft.hard.codes.requires_grad


def test_codebooks_may_have_a_learning_rate_of_their_own() -> None:
    soft = replaced(tiny("bert"))
    own = CompositionalCodes(**OPTIONS, codebook_learning_rate=0.5).objective(site(toy()), soft)
    assert isinstance(own, LearningRate)
    (group,) = own.parameter_groups()
    assert (group["params"], group["lr"]) == ([soft.hard.codebooks], 0.5)
    assert CompositionalCodes(**OPTIONS).objective(site(toy()), soft) is None


def test_a_pipeline_in_python() -> None:
    model = tiny("gpt2")
    before = copy.deepcopy(model)
    after = Pipeline([CompositionalCodes(codebooks=4, codewords=16)])(model)
    assert after is model
    assert isinstance(model.get_input_embeddings(), CodedEmbedding)
    with torch.no_grad():
        one, two = (m(**inputs("gpt2")).logits for m in (before, model))
    assert 0 < float((one - two).norm() / one.norm()) < 0.9


def product(table: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """A table in product codes, and the soft module."""
    model = tiny("bert")
    holder: Any = model.get_input_embeddings()
    holder.weight = nn.Parameter(table)
    done = rewrite.replace_all(
        model, rewrite.match(model, [CompositionalCodes(initialization="product", **options)])
    )
    return done[0].soft.harden(), done[0].soft


def test_product_codes_are_the_nearest_means_of_each_part() -> None:
    torch.manual_seed(0)
    table = torch.randn(99, 32)
    hard, soft = product(table, codebooks=4, codewords=8)
    assert hard.codebooks.shape == (32, 8)
    rows = hard.rows(torch.arange(99)).detach()
    books = hard.codebooks.detach().view(4, 8, 8)
    nearest = torch.stack(
        [torch.cdist(table[:, 8 * m : 8 * m + 8], books[m]).argmin(1) for m in range(4)], 1
    )
    expected = torch.cat([books[m][nearest[:, m]] for m in range(4)], 1)
    assert torch.allclose(rows, expected, atol=1e-5)
    assert soft.statistics()["relative_error"] < 0.7
    stored = {name: value.nbytes for name, value in hard.state_dict().items()}
    assert stored == {"codes": 99 * 2, "codebooks": 4 * 8 * 32}
    assert hard.ideal_bits() == 99 * 4 * 3 + 32 * 8 * 32


def test_the_width_of_codewords_decides_on_the_number_of_codebooks() -> None:
    table = torch.randn(99, 32, generator=torch.Generator().manual_seed(0))
    one, two = (
        product(table, codewords=4, **given)[0] for given in ({"codebooks": 4}, {"width": 8})
    )
    assert one.layout == two.layout
    assert torch.equal(one.codes, two.codes)
    options: dict[str, Any] = {"initialization": "product", "codewords": 4, "width": 5}
    with pytest.raises(PlmccError, match="5 as `width` does not divide its 32 dimensions: 2 or 4"):
        rewrite.match(tiny("bert"), [CompositionalCodes(**options)])
    with pytest.raises(ValidationError, match="`width` has no effect"):
        CompositionalCodes(width=2)
    with pytest.raises(ValidationError, match="`codebooks` has no effect with `width`"):
        CompositionalCodes(**options, codebooks=4)


def test_product_codes_multiply_as_their_table_does() -> None:
    torch.manual_seed(0)
    hard, _ = product(torch.randn(99, 32), codebooks=8, codewords=4)
    hidden = torch.randn(3, 5, 32, requires_grad=True)
    ids = torch.arange(99)
    expected = hidden @ hard.rows(ids).T
    found = hard.attend(hidden)
    keep = torch.ones(99)
    if hard.zero_padding:
        keep[hard.padding_idx] = 0
    assert torch.allclose(found, expected * keep, atol=1e-4)
    ours = torch.autograd.grad(found.square().sum(), [hidden, hard.codebooks])
    theirs = torch.autograd.grad((expected * keep).square().sum(), [hidden, hard.codebooks])
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3)


def test_parts_that_do_not_divide_the_table_are_refused() -> None:
    with pytest.raises(PlmccError, match="5 codebooks do not divide its 32 dimensions"):
        rewrite.match(
            tiny("bert"), [CompositionalCodes(initialization="product", codebooks=5, codewords=4)]
        )
