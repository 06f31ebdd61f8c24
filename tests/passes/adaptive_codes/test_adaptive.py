"""What is known of Kim et al. (2020): lengths that the task chooses, codes to the bit; and the
module against a dense table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from plmcc import rewrite
from plmcc.artifact.size import module_bytes
from plmcc.passes.adaptive_codes import (
    AdaptiveCodes,
    AdaptiveEmbedding,
    SoftAdaptive,
)
from plmcc.passes.adaptive_codes.lengths import (
    choose,
    pack_stream,
    ranks_in_groups,
    read_bits,
    selector_bits,
    unpack_stream,
)
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

OPTIONS = {"lengths": [4, 8, 16], "bits_per_word": 11, "epochs": 2}
"""For tiny models; `tests/test_contract.py` reads it."""


def adaptive(table_VD: Tensor, facts: dict[str, Any] | None = None, **options: Any) -> SoftAdaptive:
    chosen = AdaptiveCodes(**(OPTIONS | options))
    soft = chosen.replace(site(table_VD, **(facts or {})), PROGRAM).eval()
    assert isinstance(soft, SoftAdaptive)
    return soft


def with_choices(soft: SoftAdaptive, choice_V: Tensor) -> SoftAdaptive:
    """The same with lengths of the test's own."""
    soft.mean_budget = None
    soft.logits.data = nn.functional.one_hot(choice_V, len(soft.lengths)).float()
    return soft


def mixed(rows: int = 60, **facts: Any) -> SoftAdaptive:
    table = toy(rows, 20)
    table[3] = 0
    random = torch.Generator().manual_seed(5)
    soft = adaptive(table, facts, lengths=[3, 5, 12], bits_per_word=None)
    return with_choices(soft, torch.randint(0, 3, (rows,), generator=random))


# --- lengths


def test_weights_sum_to_one_and_are_one_hot_at_inference() -> None:
    soft = mixed()
    ids = torch.arange(60)
    soft.train()
    torch.manual_seed(0)
    weights = soft.selection(ids)
    torch.testing.assert_close(weights.sum(-1), torch.ones(60))
    assert float(weights.detach().max(-1).values.mean()) < 0.95
    assert not torch.equal(weights, soft.selection(ids)), "no noise"
    soft.eval()
    weights = soft.selection(ids)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weights.argmax(-1), soft.logits.argmax(-1))


def test_samples_follow_the_logits() -> None:
    """argmax(log α + G) is i in a share α_i/Σα of the draws."""
    soft = mixed().train()
    soft.logits.data[7] = torch.tensor([0.2, 0.5, 0.3]).log()
    torch.manual_seed(0)
    drawn = soft.selection(torch.full((20_000,), 7)).argmax(-1)
    shares = drawn.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.02)


def test_selection_is_frozen_in_the_second_phase() -> None:
    soft = mixed().train()
    before = soft.logits.argmax(-1)
    soft.select()
    soft.logits.data.normal_()
    assert torch.equal(soft.chosen(), before)
    ids = torch.arange(60)
    assert torch.equal(soft.selection(ids).argmax(-1), before)
    soft(ids).sum().backward()
    assert soft.logits.grad is not None  # data parallelism waits for one
    assert not soft.logits.grad.any()
    assert soft.codebooks.grad is not None
    assert torch.equal(soft(ids), soft.eval()(ids))


@pytest.mark.parametrize("budget", [5.0, 7.3, 10.0, 15.9, 16.0, None])
def test_lengths_stay_within_the_budget_and_use_it(budget: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    logits, lengths = torch.randn(3000, 3, generator=random), [4, 8, 16]
    found = torch.tensor(lengths)[choose(logits, lengths, budget)].float()
    assert set(found.tolist()) <= {4.0, 8.0, 16.0}
    free = torch.tensor(lengths)[logits.argmax(-1)].float().mean()
    if budget is None or budget >= free:
        assert torch.equal(found, torch.tensor(lengths)[logits.argmax(-1)].float())
    else:
        assert budget - 0.05 < float(found.mean()) <= budget


def test_under_a_budget_words_that_gain_most_get_the_bits() -> None:
    logits = torch.stack([torch.zeros(100), torch.arange(100) / 10], 1)
    assert choose(logits, [10, 20], 13.0).tolist() == [0] * 70 + [1] * 30
    assert choose(torch.zeros(5, 3), [1, 2, 3], None).tolist() == [0] * 5, "in doubt the shorter"


def test_a_budget_begins_with_the_reconstruction() -> None:
    table = toy(400)
    table[:200] *= 0.05  # rows whose errors matter little
    soft = adaptive(table, bits_per_word=10)
    lengths = torch.tensor(soft.lengths)[soft.chosen()].float()
    assert lengths[200:].mean() > lengths[:200].mean() + 2
    assert soft.mean_length() + 2 <= 10
    assert soft.statistics()["mean_length"] == pytest.approx(float(lengths.mean()))
    assert not adaptive(table, bits_per_word=None).logits.any()


def test_longer_codes_do_not_reconstruct_worse() -> None:
    table = toy(1000)
    errors = [
        adaptive(table, lengths=lengths, bits_per_word=None, epochs=8).statistics()[
            "relative_error"
        ]
        for lengths in ([8], [16], [64])
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[0]


def test_one_code_book_is_a_binary_code_of_fixed_length() -> None:
    soft = adaptive(toy(90), lengths=[11], bits_per_word=None)
    hard = soft.harden()
    assert isinstance(hard, AdaptiveEmbedding)
    assert [n for n, _ in hard.named_buffers()] == ["codes"]
    assert (hard.code_bits, hard.selector_bits) == (90 * 11, 0)
    bits = (soft.table @ soft.codebooks.T > 0).float()
    expected = (bits @ soft.codebooks + soft.bias) * soft.span
    torch.testing.assert_close(hard.weight, expected)


# --- codes


def test_codes_are_zero_or_one_with_the_gradient_of_the_sigmoid() -> None:
    soft = mixed()
    x_ND, book = torch.randn(50, 20), torch.randn(7, 20, requires_grad=True)
    codes = soft._codes(x_ND, book)
    assert set(codes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(codes.bool(), (x_ND @ book.T).sigmoid().round().bool())
    weights = torch.randn(50, 7)
    (ours,) = torch.autograd.grad((codes * weights).sum(), book)
    (theirs,) = torch.autograd.grad(((x_ND @ book.T).sigmoid() * weights).sum(), book)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", [False, True])
def test_code_books_that_a_word_does_not_use_get_no_gradient(head: bool) -> None:
    soft = mixed().train()
    soft.select()
    if head:
        (soft.attend(torch.randn(2, 20)) * (soft.choice == 1)).sum().backward()
    else:
        soft(torch.arange(60)[soft.choice == 1]).square().sum().backward()
    gradients = soft.codebooks.grad
    assert gradients is not None
    one, two, three = gradients.split(soft.lengths)
    assert two.any()
    assert not one.any()
    assert not three.any()


def test_words_that_are_absent_get_no_gradient_of_the_task() -> None:
    soft = mixed().train()
    soft(torch.tensor([5, 9])).square().sum().backward()
    gradients = soft.logits.grad
    assert gradients is not None
    assert gradients.any(1).nonzero()[:, 0].tolist() == [5, 9]
    soft.logits.grad = None
    soft.distance(torch.arange(60)).backward()
    assert soft.logits.grad is None, "the reconstruction does not choose lengths"


# --- storage


def test_the_stored_module_is_the_trained_one_and_its_size_is_exact() -> None:
    soft = mixed()
    hard, ids = soft.harden(), torch.arange(60)
    assert isinstance(hard, AdaptiveEmbedding)
    lengths = torch.tensor(soft.lengths)[soft.chosen()]
    assert int(lengths.min()) >= 3
    assert int(lengths.max()) <= 12
    assert hard.code_bits == int(lengths.sum())
    assert sorted(hard.counts) == sorted(lengths.unique(return_counts=True)[1].tolist())
    bits = int(lengths.sum()) + 60 * 2
    assert hard.ideal_bits() == bits + 32 * 20 * (3 + 5 + 12 + 3)
    size = -(-int(lengths.sum()) // 8) + 60 * 2 // 8 + 4 * 20 * 23
    assert module_bytes(hard) == size
    torch.testing.assert_close(hard(ids), soft(ids), rtol=1e-5, atol=1e-6)
    hidden = torch.randn(4, 20)
    torch.testing.assert_close(hard.attend(hidden), soft.attend(hidden), rtol=1e-4, atol=1e-5)


def test_code_books_without_words_are_dropped() -> None:
    soft = with_choices(mixed(), torch.arange(60) % 2 * 2)
    hard = soft.harden()
    assert isinstance(hard, AdaptiveEmbedding)
    assert (hard.lengths, hard.counts, hard.selector_bits) == ([3, 12], [30, 30], 1)
    torch.testing.assert_close(hard.weight, soft.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "facts", [{}, {"scale": 2.5}, {"padding_idx": 3}, {"padding_idx": 4}], ids=str
)
def test_lookup_and_head_are_those_of_the_dense_table(facts: dict[str, Any]) -> None:
    hard = mixed(**facts).harden()
    assert isinstance(hard, AdaptiveEmbedding)
    assert hard.zero_padding is (facts.get("padding_idx") == 3)
    books, biases = (nn.Parameter(p.detach().clone()) for p in (hard.codebooks, hard.bias))
    stream = "".join(f"{byte:08b}" for byte in hard.codes.tolist())
    picks = "".join(f"{byte:08b}" for byte in hard.selector.tolist())
    words = [int(picks[2 * word : 2 * word + 2], 2) for word in range(60)]
    rows: list[Tensor] = [torch.empty(0)] * 60
    at, first = 0, 0
    for index, length in enumerate(hard.lengths):
        for word in (w for w in range(60) if words[w] == index):
            bits = torch.tensor([float(bit) for bit in stream[at : at + length]])
            rows[word] = bits @ books[first : first + length] + biases[index]
            at += length
        first += length
    assert at == hard.code_bits
    check_calls(hard, torch.stack(rows), [books, biases])


def test_streams_of_bits() -> None:
    bits = torch.randint(0, 2, (77,))
    packed = pack_stream(bits)
    assert packed.shape == (10,)
    assert torch.equal(unpack_stream(packed, 77).long(), bits)
    locations = torch.tensor([[76, 0], [8, 15]])
    assert torch.equal(read_bits(packed, locations).long(), bits[locations])
    assert [selector_bits(n) for n in (1, 2, 3, 4, 5, 16)] == [0, 1, 2, 2, 3, 4]
    assert ranks_in_groups(torch.tensor([0, 1, 1, 0, 2, 1]), 3).tolist() == [0, 0, 1, 1, 0, 2]


def test_mixed_lengths_survive_an_artifact_and_compile(tmp_path: Any) -> None:
    model: Any = tiny("gpt2")
    hardened(model, AdaptiveCodes(**OPTIONS))
    hard: Any = model.get_input_embeddings()
    assert len(hard.counts) > 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        one, two = (m(**inputs("gpt2")).logits for m in (model, again))
        assert torch.equal(one, two)
        for function, given in ((hard.forward, torch.arange(9)), (hard.attend, torch.randn(2, 32))):
            compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(given), function(given))


# --- in models


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_table(name: str) -> None:
    """Factorized tables (ALBERT, ELECTRA) too; positions and token types are left alone."""
    model = tiny(name)
    ((_, found),) = rewrite.match(model, [AdaptiveCodes(**OPTIONS)]).sites
    assert ("head" in found.roles) == (name not in {"llama", "t5_gated"})
    assert model.get_input_embeddings() in found.modules


def test_scaled_embeddings_keep_their_scale() -> None:
    model: Any = gemma()
    replaced(model, AdaptiveCodes(**OPTIONS))
    soft = model.get_input_embeddings()
    assert soft.scale == pytest.approx(32**0.5)
    torch.testing.assert_close(soft(torch.arange(VOCAB)), soft.weight * 32**0.5)
    logits = model.lm_head(torch.ones(1, 32))
    torch.testing.assert_close(logits, torch.ones(1, 32) @ soft.weight.T, rtol=1e-4, atol=1e-5)


def test_three_tied_tables_stay_one() -> None:
    model: Any = tiny("t5")
    hardened(model, AdaptiveCodes(**OPTIONS))
    assert [n for n in model.state_dict() if n.endswith("codes")] == ["shared.codes"]
    ids = torch.arange(9)
    assert torch.equal(model.shared(ids), model.decoder.embed_tokens(ids))


def test_a_table_of_zeros() -> None:
    soft = adaptive(torch.zeros(50, 8), lengths=[2, 4], bits_per_word=4)
    assert soft(torch.arange(50)).isfinite().all()
    hard = soft.harden()
    assert isinstance(hard, AdaptiveEmbedding)
    assert hard(torch.arange(50)).isfinite().all()


# --- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model: Any = tiny("bert")
    model.get_input_embeddings().weight.data[3, 2] = value
    found = refused(model, AdaptiveCodes(**OPTIONS))
    assert found.code == "PLM203"
    assert "not finite" in found.message
    assert "bert.embeddings.word_embeddings" in f"{found.location}"


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([8, 128], "a codebook of 128 vectors for a table of only 99 rows"),
        ([40, 70], "the codes and codebooks would be larger than the 99 x 32 table"),
    ],
)
def test_code_books_that_do_not_fit_the_table(lengths: list[int], reason: str) -> None:
    found = refused(tiny("bert"), AdaptiveCodes(lengths=lengths))
    assert found.code == "PLM203"
    assert "bert.embeddings.word_embeddings" in found.got
    assert reason in found.got


def test_two_passes_cannot_have_one_table() -> None:
    other = AdaptiveCodes(**(OPTIONS | {"targets": "*word_embeddings"}))
    found = refused(tiny("bert"), AdaptiveCodes(**OPTIONS), other)
    assert found.code == "PLM204"
    assert "bert.embeddings.word_embeddings" in found.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": []},
        {"lengths": [0, 8]},
        {"lengths": [8, 4]},
        {"lengths": [8, 8]},
        {"lengths": [8, 16], "bits_per_word": 8.5},
        {"selection": 0.0},
        {"selection": 1.0},
        {"temperature": 0.0},
        {"reconstruction_weight": -1.0},
    ],
    ids=str,
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdaptiveCodes(**wrong)


def test_a_layout_whose_counts_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="counts"):
        AdaptiveEmbedding(50, 8, [2, 4], [30, 30])
