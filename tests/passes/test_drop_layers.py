from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import plmcc
from plmcc import rewrite
from plmcc.artifact.verify import outputs
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.program import Program
from plmcc.passes.compressed_attention import CompressedAttention
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.low_rank import LowRank
from plmcc.passes.quantized_linears import QuantizedLinears
from plmcc.recipe import Calibrate
from plmcc.recipe.sections import Synthetic
from support.tiny_models import BOS, EOS, GENERATIVE, PAD, inputs, prompt, tiny

OPTIONS = {"targets": "layers", "keep": 1}

RANDOM = Calibrate(data="synthetic", synthetic=Synthetic(sequences=48, length=12))


def deep(kind: str = "MBart", layers: int = 5) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers,
        init_std=0.3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        forced_eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"MBart": "MBartForConditionalGeneration", "Marian": "MarianMTModel"}
        model: PreTrainedModel = getattr(transformers, names[kind])(config)
    model.train(False)
    return model


def decoder(model: PreTrainedModel) -> nn.ModuleList:
    stack = model.get_submodule("model.decoder.layers")
    assert isinstance(stack, nn.ModuleList)
    return stack


def test_evenly_spaced_keeps_the_first_and_the_last() -> None:
    model = deep()
    kept = [decoder(model)[0], decoder(model)[2], decoder(model)[4]]
    plmcc.Pipeline([DropLayers(keep=3)])(model)
    assert all(a is b for a, b in zip(decoder(model), kept, strict=True))
    assert model.config.decoder_layers == 3
    assert model.config.encoder_layers == 5


def test_layers_are_numbered_anew_and_the_old_numbers_would_go_wrong() -> None:
    model, given = deep(), prompt("mbart")
    plmcc.Pipeline([DropLayers(keep=[1, 4])])(model)
    indices = {m.layer_idx for m in decoder(model).modules() if hasattr(m, "layer_idx")}
    assert indices == {0, 1}
    options = {"max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(**given, **options, use_cache=c) for c in (True, False))  # type: ignore[operator]
    assert torch.equal(cached, plain)
    for part in decoder(model)[1].modules():  # what forgetting it does
        if hasattr(part, "layer_idx"):
            part.layer_idx = 0  # type: ignore[assignment]
    wrong = model.generate(**given, **options)  # type: ignore[operator]
    assert not torch.equal(wrong, plain)


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_shorter_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batch = tiny(name), inputs(name)
    plmcc.Pipeline([DropLayers(targets="layers", keep=1, select="even")])(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    first, second = (outputs(m, batch) for m in (model, again))
    assert torch.allclose(first["output"], second["output"], atol=1e-5)
    assert torch.equal(first["tokens"], second["tokens"])


def test_importance_keeps_the_layers_that_change_states_most() -> None:
    model = deep()
    with torch.no_grad():
        for index in (0, 3):  # these do nothing
            for name in ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"):
                for parameter in decoder(model)[index].get_submodule(name).parameters():
                    parameter.zero_()
    kept = [decoder(model)[i] for i in (1, 2, 4)]
    plmcc.Pipeline([DropLayers(keep=3, select="importance")], calibrate=RANDOM)(model)
    assert all(a is b for a, b in zip(decoder(model), kept, strict=True))


def test_t5_keeps_the_layer_that_holds_the_positions() -> None:
    with pytest.raises(plmcc.PlmccError, match=r"layer 0 alone has .*relative_attention_bias"):
        plmcc.Pipeline([DropLayers(keep=[1])])(tiny("t5"))
    model = tiny("t5")
    plmcc.Pipeline([DropLayers(keep=1, select="importance")], calibrate=RANDOM)(model)
    assert model.config.num_decoder_layers == 1
    assert model.config.num_layers == 2
    assert "relative_attention_bias" in str(list(model.get_decoder().state_dict()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": [0, 5]}, "its layers are 0 to 4"),
        ({"keep": [1, 1]}, "each once"),
        ({"keep": 5}, "it has 5 layers, not more than are to be kept"),
        ({"keep": 2, "expect": 3}, "expected 3"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(options: dict[str, object], reason: str) -> None:
    model = deep()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((plmcc.PlmccError, ValueError), match=reason):
        plmcc.Pipeline([DropLayers(**options)])(model)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_the_only_stack_is_the_default(name: str) -> None:
    model = tiny(name)
    plmcc.Pipeline([DropLayers(keep=1, select="even")])(model)
    assert model.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("name", "target"),
    [("gpt2", "decoder"), ("llama", "decoder"), ("distilbert", "encoder"), ("bert", "encoder")],
)
def test_encoder_and_decoder_name_the_only_stack(name: str, target: str) -> None:
    found = Program(tiny(name)).resolve(target, "layer", expect=2)
    assert len(found.sites) == 2
    other = "encoder" if target == "decoder" else "decoder"
    with pytest.raises(plmcc.PlmccError) as caught:
        Program(tiny(name)).resolve(other, "layer")
    (said,) = caught.value.diagnostics
    assert said.code == "PLM201"
    assert other not in said.hint.removeprefix("nearest: ").split(", ")


def test_shared_layers_cannot_be_dropped() -> None:
    with pytest.raises(plmcc.PlmccError, match="it has 1 layers"):
        plmcc.Pipeline([DropLayers(targets="layers", keep=1)])(tiny("albert"))


def test_dropping_and_merging_in_one_stage_is_refused_and_in_two_stages_works(
    tmp_path: Path,
) -> None:
    passes = [DropLayers(keep=2), CompressedAttention(warm_start_steps=5)]
    with pytest.raises(plmcc.PlmccError, match="stages"):
        plmcc.Pipeline(passes, calibrate=RANDOM)(deep("Marian"))
    model, batch = deep("Marian"), inputs("marian")
    for chosen in passes:
        plmcc.Pipeline([chosen], calibrate=RANDOM)(model)
    assert len(decoder(model)) == 2
    model.save_pretrained(tmp_path)
    again = plmcc.load(tmp_path)
    assert torch.allclose(model(**batch).logits, again(**batch).logits, atol=1e-5)


def test_layers_go_without_which_the_loss_is_least() -> None:
    """Of the pairs that greedy search looks at, the best goes; the loss is that of the result."""
    model: Any = tiny_llama(4)
    rows = [inputs("llama", batch=4) for _ in range(3)]
    data = CalibrationData([row | {"labels": row["input_ids"]} for row in rows])
    chosen = DropLayers(keep=2, importance="perplexity")

    def loss(without: tuple[int, ...]) -> float:
        shorter = copy.deepcopy(model)
        kept = [layer for i, layer in enumerate(shorter.model.layers) if i not in without]
        shorter.model.layers = nn.ModuleList(kept)
        with torch.no_grad():
            found = [shorter(**batch, use_cache=False).loss for batch in data.batches]
        return float(sum(found)) / len(found)

    first = min(range(4), key=lambda i: loss((i,)))
    second = min({0, 1, 2, 3} - {first}, key=lambda i: loss((first, i)))
    work = copy.deepcopy(model)
    (done,) = rewrite.replace_all(work, rewrite.match(work, [chosen], data=data))
    assert done.soft.harden().layout["kept"] == sorted({0, 1, 2, 3} - {first, second})
    measured = done.soft.statistics()
    assert measured["loss"] == pytest.approx(loss(()))
    assert measured[f"loss_without_{second}"] == pytest.approx(loss((first, second)), rel=1e-5)


def tiny_llama(layers: int) -> PreTrainedModel:
    config: Any = copy.deepcopy(tiny("llama").config)
    config.num_hidden_layers = layers
    config.initializer_range = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = transformers.LlamaForCausalLM(config)
    model.eval()
    return model


def test_layers_of_a_language_model_are_measured_by_default() -> None:
    model = tiny_llama(3)
    with pytest.raises(plmcc.PlmccError, match="has to be measured: add `text"):
        rewrite.match(model, [DropLayers(keep=2)])
    data = CalibrationData([inputs("llama", batch=4)])
    (done,) = rewrite.replace_all(model, rewrite.match(model, [DropLayers(keep=2)], data=data))
    assert "influence_2" in done.soft.statistics()
    with pytest.raises(ValueError, match="`importance` has no effect with `select: even`"):
        DropLayers(keep=1, select="even", importance="perplexity")
    with pytest.raises(ValueError, match="`importance` has no effect with a list"):
        DropLayers(keep=[0, 1], importance="perplexity")


def test_a_loss_needs_labels() -> None:
    model = tiny_llama(3)
    data = CalibrationData([inputs("llama", batch=4)])
    matched = rewrite.match(model, [DropLayers(keep=2, importance="perplexity")], data=data)
    with pytest.raises(plmcc.PlmccError, match="has no loss on the calibration data"):
        rewrite.replace_all(model, matched)


def test_importance_is_not_measured_on_made_up_data_unasked() -> None:
    model = deep()
    with pytest.raises(plmcc.PlmccError, match="`select: importance` measures") as caught:
        plmcc.Pipeline([DropLayers(keep=3, select="importance")])(model)
    assert "or `calibrate: {data: FILE}`" in str(caught.value)
    assert len(decoder(model)) == 5


@pytest.mark.parametrize("chosen", [LowRank(rank=4, weighting="none"), QuantizedLinears()])
def test_layers_that_are_rewritten_already_are_not_dropped(chosen: Any) -> None:
    """Their modules are known by the numbers of their layers."""
    model = tiny("bert")
    plmcc.Pipeline([chosen])(model)
    with pytest.raises(plmcc.PlmccError, match="drop layers before other passes"):
        plmcc.Pipeline([DropLayers(targets="encoder", keep=1)])(model)


def test_text_is_measured_on_also_in_an_encoder(tmp_path: Path) -> None:
    """It was left unused there, where layers are evenly spaced by default."""
    model, text = tiny("bert"), tmp_path / "text.txt"
    text.write_text("w1 w2 w3\nw4 w5 w6\n")
    given = DropLayers(keep=1, text=str(text))
    assert given.needs_data()
    assert given._measures(model)
    assert not DropLayers(keep=1)._measures(model)
