"""Compiled encoder-decoders: the tokens of transformers' `generate`, whatever is asked for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import plmcc
from plmcc.diagnostics import PlmccError
from plmcc.export.exporter import export_model
from plmcc.inference import aoti as compiled
from plmcc.inference.aoti import CompiledPrograms, cache_shapes, step_program
from plmcc.inference.cuda_graphs import CudaGraphStep, load
from plmcc.inference.generate import Generate
from plmcc.inference.programs import topk_log_probs
from support.programs import Uncompiled
from support.tiny_models import EOS, PAD, VOCAB, prompt, tiny, varied

NAMES = ("marian", "bart", "mbart", "t5", "t5_gated")


def same(model: PreTrainedModel, generate: Any, given: dict[str, Tensor], **options: Any) -> None:
    kind: Any = type(model)
    expected = kind.generate(model, **given, **options)
    found = generate(**given, **options)
    assert torch.equal(expected, found), (options, expected.tolist(), found.tolist())


SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 1, "forced_bos_token_id": 5},
    {"num_beams": 4, "forced_bos_token_id": 5, "forced_eos_token_id": 7},
    {"num_beams": 1, "eos_token_id": [2, 11, 12, 13, 14, 15, 16]},
    {"num_beams": 2, "eos_token_id": [2, 11, 12, 13, 14, 15, 16]},
    {"num_beams": 2, "pad_token_id": 9},
]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_searches_give_the_tokens_of_transformers(name: str, attention: str) -> None:
    model = varied(name, attention)
    programs = Uncompiled(model)
    generate = Generate(model, programs)
    for options, (batch, length, longest) in itertools.product(
        SEARCHES, [(1, 6, 20), (5, 9, 12), (2, 1, 2), (3, 4, 1)]
    ):
        given = {k: v[:, :length] for k, v in prompt(name, batch, max(length, 6)).items()}
        given["attention_mask"][:, 0] = 1
        before = programs.steps
        same(model, generate, given, max_new_tokens=longest, **options)
        assert programs.steps > before
        assert programs.steps <= before + longest


@pytest.mark.parametrize("beams", [1, 4])
def test_a_sentence_that_ends_at_once(beams: int) -> None:
    model: Any = varied("bart")
    model.final_logits_bias[0, EOS] = 1e4
    generate = Generate(model, Uncompiled(model))
    same(model, generate, prompt("bart"), num_beams=beams, max_new_tokens=10)


def test_rows_that_have_ended_are_dropped() -> None:
    model = varied("bart")
    programs = Uncompiled(model)
    sizes: list[int] = []
    step = programs.step

    def counted(candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        sizes.append(len(inputs[0]))
        return step(candidates, inputs)

    programs.step = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    given = {"input_ids": torch.randint(EOS + 1, VOCAB, (12, 8), generator=generator)}
    ends = list(range(2, 16))
    same(model, Generate(model, programs), given, max_new_tokens=30, eos_token_id=ends)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 12
    assert 1 <= min(sizes) < 6


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [7]},
        {"bad_words_ids": [[7]]},
        {"min_new_tokens": 4},
        {"return_dict_in_generate": True, "output_scores": True},
        {"decoder_input_ids": torch.tensor([[2, 5, 6]] * 3)},
        {"use_cache": False},
        {"max_new_tokens": 60},  # more than the position table: transformers' own error
    ],
    ids=lambda options: next(iter(options)),
)
def test_everything_else_is_left_to_transformers(options: dict[str, Any]) -> None:
    model: Any = tiny("bart")
    programs = Uncompiled(model)
    results = []
    for generate in (model.generate, Generate(model, programs)):
        torch.manual_seed(0)
        try:
            given: dict[str, Any] = {**prompt("bart"), "max_new_tokens": 6, **options}
            found: Any = generate(**given)
            results.append(getattr(found, "sequences", found))
        except (IndexError, RuntimeError) as problem:
            results.append(type(problem))
    assert programs.steps == 0
    if isinstance(results[0], Tensor):
        assert torch.equal(*results)
    else:
        assert results[0] is results[1]


def test_without_a_length_transformers_default_and_its_warning_hold() -> None:
    model: Any = tiny("bart")
    generate: Any = Generate(model, Uncompiled(model))
    with pytest.warns(UserWarning, match="max_new_tokens"):
        found = generate(**prompt("bart"))
    with pytest.warns(UserWarning, match="max_new_tokens"):
        assert torch.equal(found, model.generate(**prompt("bart")))


def test_padding_without_a_mask_is_left_to_transformers() -> None:
    model = tiny("bart")
    ids = torch.tensor([[5, 6, 7, PAD]])
    same(model, Generate(model, Uncompiled(model)), {"input_ids": ids}, max_new_tokens=5)


@pytest.mark.filterwarnings("ignore:.*")
def test_ids_of_any_whole_numbers_and_ids_out_of_range() -> None:
    model = varied("bart")
    programs = Uncompiled(model)
    generate = Generate(model, programs)
    narrow = {key: value.int() for key, value in prompt("bart").items()}
    seen: list[torch.dtype] = []
    encode = programs.encode
    programs.encode = lambda ids, mask: seen.append(ids.dtype) or encode(ids, mask)  # type: ignore
    same(model, generate, narrow, max_new_tokens=5)
    assert set(seen) == {torch.long}
    for wrong in (-1, VOCAB):  # compiled code would end the process
        with pytest.raises(IndexError):
            generate(torch.tensor([[5, wrong, 2]]), max_new_tokens=5)
    with pytest.raises(ZeroDivisionError):  # transformers' own, as the next
        generate(narrow["input_ids"], num_beams=0)
    with pytest.raises(RuntimeError):
        generate(torch.zeros(0, 4, dtype=torch.long), max_new_tokens=5)
    assert len(seen) == 1


def test_keys_and_values_of_other_widths() -> None:
    from plmcc import Pipeline
    from plmcc.passes.compressed_attention import CompressedAttention

    model = varied("mbart")
    Pipeline([CompressedAttention(initialization="random")])(model)
    model.eval()
    assert len(set(cache_shapes(model))) > 1
    generate = Generate(model, Uncompiled(model))
    for beams in (1, 4):
        same(model, generate, prompt("mbart"), num_beams=beams, max_new_tokens=20)


@pytest.fixture(scope="module")
def t5() -> PreTrainedModel:
    return plmcc.compile(varied("t5"))


@pytest.mark.exhaustive  # it compiles four programs
def test_a_compiled_model_compiles_nothing_after_its_first_use(
    t5: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for beams in (1, 4):
        same(t5, t5.generate, prompt("t5"), num_beams=beams, max_new_tokens=4)

    def refuse(*_: Any) -> None:
        raise AssertionError("a program is compiled again")

    monkeypatch.setattr(compiled, "package", refuse)
    generator = torch.Generator().manual_seed(1)
    for batch, length, beams, longest in itertools.product((1, 7), (1, 33), (1, 4), (40,)):
        ids = torch.randint(EOS + 1, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, 2:] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        same(t5, t5.generate, given, num_beams=beams, max_new_tokens=longest)


def test_a_compiled_model_stays_a_model(t5: PreTrainedModel) -> None:
    given = prompt("t5") | {"decoder_input_ids": torch.tensor([[PAD, 5]] * 3)}
    plain = varied("t5")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(t5(**given).logits, plain(**given).logits)
    assert set(t5.state_dict()) == set(plain.state_dict())


def test_a_copy_has_programs_of_its_own(t5: PreTrainedModel) -> None:
    copied: Any = copy.deepcopy(t5)
    assert isinstance(copied.generate, Generate)
    assert copied.generate.model is copied
    assert isinstance(copied.generate.programs, CompiledPrograms)
    assert copied.generate.programs.model is copied


@pytest.mark.parametrize("size", [8000, 8011, 4096, 99])  # one has no divisors
@pytest.mark.parametrize("candidates", [1, 8, 16])
def test_the_best_tokens_are_those_of_topk(size: int, candidates: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(2, 3, size, generator=generator)
    scores, tokens = topk_log_probs(logits, candidates)
    wanted = logits.log_softmax(-1).topk(candidates, dim=-1)
    assert torch.equal(tokens, wanted.indices)
    if candidates > 1:
        torch.testing.assert_close(scores, wanted.values)


def test_the_encoder_reads_sentences_of_like_length_together() -> None:
    model = varied("bart")
    programs = Uncompiled(model)
    read: list[tuple[int, ...]] = []
    encode = programs.encode

    def noted(source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        read.append(tuple(source_BS.shape))
        return encode(source_BS, mask_BS)

    programs.encode = noted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 3, 38, 5, 4, 3, 39, 4]
    ids = torch.randint(EOS + 1, VOCAB, (len(lengths), 40), generator=generator)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    given = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    for beams in (1, 3):
        same(model, Generate(model, programs), given, num_beams=beams, max_new_tokens=12)
    assert len(read) > 2
    assert sum(rows * length for rows, length in read) < 2 * len(lengths) * 40 / 1.5
    left = {"input_ids": given["input_ids"].flip(1), "attention_mask": mask.flip(1)}
    same(model, Generate(model, programs), left, num_beams=3, max_new_tokens=12)


def led() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "d_model": 32,
        "vocab_size": VOCAB,
        "attention_window": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**sizes))


def pair() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": VOCAB,
    }
    parts = [transformers.BertConfig(**sizes) for _ in range(2)]
    kind: Any = transformers.EncoderDecoderConfig
    config = kind.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 5, PAD
    return transformers.EncoderDecoderModel(config)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("make", [led, pair])
def test_a_model_that_has_no_programs_is_left_to_transformers(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = make().eval()
    plmcc.compile(model)
    assert "generate" not in vars(model)
    with pytest.raises(PlmccError, match="cannot be exported: it has its own attention or cache"):
        export_model(model, None, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


# --- banned tokens


def often(model: PreTrainedModel) -> list[int]:
    """Tokens that the model likes to write."""
    given = prompt("marian")
    found = model.generate(**given, max_new_tokens=12, num_beams=4)  # type: ignore[operator]
    counts = found.flatten().bincount(minlength=VOCAB)
    counts[: EOS + 1] = 0
    return list(map(int, counts.topk(3).indices))


@pytest.mark.parametrize("renormalized", [False, True])
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 3}])
def test_banned_tokens_are_not_written(search: dict[str, Any], renormalized: bool) -> None:
    model = varied("marian")
    banned = often(model)
    config: Any = model.generation_config
    config.bad_words_ids = [[EOS], *([token] for token in banned)]
    config.renormalize_logits = renormalized
    programs = Uncompiled(model)
    same(model, Generate(model, programs), prompt("marian"), max_new_tokens=12, **search)
    assert programs.steps > 0
    generate: Any = Generate(model, programs)
    found = generate(**prompt("marian"), max_new_tokens=12, **search)
    assert not torch.isin(found, torch.tensor(banned)).any()


def test_other_banned_tokens_are_left_to_transformers() -> None:
    model = varied("marian")
    programs = Uncompiled(model)
    generate = Generate(model, programs)
    for words in ([[token] for token in often(model)], [[7, 8]]):
        same(model, generate, prompt("marian"), max_new_tokens=12, bad_words_ids=words)
    assert programs.steps == 0


def test_banned_tokens_are_part_of_the_program() -> None:
    """As a constant of the graph they would be copied from the CPU in each step."""
    module, inputs, shapes = step_program(tiny("marian"), 4, ((0, 7), False))
    with torch.no_grad():
        traced = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    assert not traced.constants.keys() & set(traced.graph_signature.lifted_tensor_constants)
    assert "banned" in traced.graph_signature.buffers


@pytest.mark.parametrize("size", [40, 4096])
@pytest.mark.parametrize("renormalized", [False, True])
def test_the_best_tokens_are_none_that_are_banned(size: int, renormalized: bool) -> None:
    logits = torch.randn(5, size)
    banned = logits[0].topk(4).indices.tolist()
    wanted = logits.log_softmax(-1)
    wanted[:, banned] = -torch.inf
    wanted = wanted.log_softmax(-1) if renormalized else wanted
    scores, tokens = topk_log_probs(logits, 8, torch.tensor(banned), renormalized)
    expected = wanted.topk(8, dim=-1)
    assert torch.equal(tokens, expected.indices)
    assert torch.allclose(scores, expected.values, atol=1e-5)


# --- CUDA graphs


class Graphed(Uncompiled):
    """Steps that are replayed, by Python in the place of a CUDA graph."""

    def __init__(self, model: PreTrainedModel, capturable: bool = True) -> None:
        super().__init__(model)
        self.captures, self.capturable = 0, capturable
        self.replayed: dict[int, CudaGraphStep] = {}

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        def run(given: list[Tensor]) -> list[Tensor]:
            return Uncompiled.step(self, candidates, given)

        if candidates not in self.replayed:
            self.replayed[candidates] = CudaGraphStep(run, self.capture)
        return self.replayed[candidates](inputs)

    def capture(self, run: Any, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.captures += 1
        outputs: list[Tensor] = []

        def replay() -> None:  # reads and writes where the graph would: nothing else is given
            found = run(list(inputs))
            for old, new in zip(outputs, found, strict=False):
                old.copy_(new)
            outputs[len(outputs) :] = found[len(outputs) :]

        return replay, outputs


@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}])
def test_steps_are_replayed_while_the_caches_stay_in_place(search: dict[str, Any]) -> None:
    model = varied("marian")
    programs = Graphed(model)
    same(model, Generate(model, programs), prompt("marian"), max_new_tokens=30, **search)
    # One more of them only where the cache has grown or sentences have ended.
    assert 0 < programs.captures < programs.steps / 3


def test_what_cannot_be_captured_runs_without_graphs() -> None:
    model = varied("marian")
    programs = Graphed(model, capturable=False)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted when st"):
        same(model, Generate(model, programs), prompt("marian"), max_new_tokens=12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}])
def test_cuda_graphs_write_the_tokens_of_generate(search: dict[str, Any]) -> None:
    model: Any = varied("marian")
    model.cuda()
    given = {name: value.to("cuda") for name, value in prompt("marian").items()}
    programs = CompiledPrograms(model)
    same(model, Generate(model, programs), given, max_new_tokens=30, **search)
    graphs = [step for step in programs._steps.values() if isinstance(step, CudaGraphStep)]
    assert graphs
    assert all(step._replay is not None for step in graphs)


@pytest.mark.parametrize(("device", "index"), [("cpu", -1), ("cuda", -1), ("cuda:1", 1)])
def test_a_program_is_loaded_where_its_model_is(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def load_package(_: str, __: bool, device_index: int) -> Any:
        given.append(device_index)
        return SimpleNamespace(loader=SimpleNamespace(boxed_run=lambda inputs: inputs))

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load_package)
    load(Path("program.pt2"), device)
    assert given == [index]
