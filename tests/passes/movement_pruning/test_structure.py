"""Movement pruning: what is removed as a whole, how the rest is stored, and that it loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import plmcc
from plmcc.artifact.size import module_bytes
from plmcc.artifact.verify import check_cache, outputs
from plmcc.ir.calibration import CalibrationData
from plmcc.kit.parts import Attention, Parts, matrix
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.passes.movement_pruning.deployed import Constant, Zeros
from plmcc.passes.movement_pruning.masks import Masked
from plmcc.passes.movement_pruning.storage import FORMS, SparseLinear, index_type, stored_bytes
from plmcc.rewrite import Replacement, harden_all, match, replace_all
from support.pruning import prunable
from support.tiny_models import NAMES, inputs, tiny

# Nothing is masked: what is removed was empty before.
NOTHING = MovementPruning(method="magnitude", density=1.0)


def replaced(model: PreTrainedModel, chosen: MovementPruning = NOTHING) -> list[Replacement]:
    return replace_all(model, match(model, [chosen], data=CalibrationData.random(model)))


def parts_of(model: PreTrainedModel) -> dict[str, Parts]:
    found = match(model, [NOTHING])
    return {site.path: prunable(site).parts for _, site in found.sites}


def part(model: PreTrainedModel, layer: str, path: str) -> nn.Module:
    return model.get_submodule(f"{layer}.{path}")


@torch.no_grad()
def silence_heads(model: PreTrainedModel, layer: str, block: Attention, groups: list[int]) -> None:
    """Zero the columns of the output projection that read some groups of heads."""
    output = matrix(part(model, layer, block.linears["o"]))
    output.unflatten(1, (block.kv_heads, -1))[:, groups] = 0


def metrics(done: list[Replacement]) -> dict[str, float]:
    found = [one.soft.statistics() for one in done]
    return {name: sum(facts[name] for facts in found) for name in found[0]}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    scale = float(one["output"].abs().max())
    torch.testing.assert_close(one["output"], two["output"], atol=2e-5 * scale, rtol=1e-5)
    if "tokens" in one:
        assert torch.equal(one["tokens"], two["tokens"])


# --- removal


def test_m14_a_head_goes_when_its_values_or_its_output_are_zero_and_not_for_its_queries() -> None:
    model: Any = tiny("bert")
    before = model.bert.encoder.layer[0]
    with torch.no_grad():
        own, out = before.attention.self, before.attention.output.dense
        own.value.weight[0:8] = 0  # head 0: a constant, folded into the bias
        assert own.value.bias[0:8].abs().min() > 0
        out.weight[:, 8:16] = 0  # head 1: nobody reads it
        own.query.weight[16:24], own.query.bias[16:24] = 0, 0  # head 2 attends evenly
    expected = outputs(model, inputs("bert"))
    done = replaced(model)
    harden_all(model, done)
    assert_same(expected, outputs(model, inputs("bert")))
    facts = done[0].soft.statistics()
    assert (facts["heads"], facts["heads_kept"], facts["uniform_heads"]) == (4, 2, 1)
    attention = model.bert.encoder.layer[0].attention
    assert attention.self.query.weight.shape == attention.self.value.weight.shape == (16, 32)
    assert attention.output.dense.weight.shape == (32, 16)
    assert attention.self.num_attention_heads == 2
    assert attention.self.all_head_size == 16
    with torch.no_grad():  # and taking head 2 away would have changed the outputs
        attention.output.dense.weight[:, 0:8] = 0
    changed = outputs(model, inputs("bert"))["output"]
    assert (changed - expected["output"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_m14_heads_without_queries_go_on_request_and_the_change_is_measured(name: str) -> None:
    options: dict[str, Any] = {"method": "magnitude", "density": 1.0}
    kept, removed = tiny(name), tiny(name)
    for model in (kept, removed):
        layer, parts = next(iter(parts_of(model).items()))
        block = parts.attention[0]
        with torch.no_grad():
            query = matrix(part(model, layer, block.linears.get("q", block.linears.get("qkv", ""))))
            query[: block.heads * block.head_dim // block.kv_heads] = 0  # of the first group
    done = [
        replaced(model, MovementPruning(uniform_heads=choice, **options))
        for model, choice in ((kept, "keep"), (removed, "remove"))
    ]
    soft = outputs(removed, inputs(name))
    for model, replacements in zip((kept, removed), done, strict=True):
        harden_all(model, replacements)
    facts = [replacements[0].soft.statistics() for replacements in done]
    ratio = block.heads // block.kv_heads
    assert facts[0]["heads_kept"] - facts[1]["heads_kept"] == ratio
    assert_same(soft, outputs(removed, inputs(name)))  # evaluation knew before
    one, two = (outputs(m, inputs(name))["output"] for m in (kept, removed))
    assert float((one - two).norm() / one.norm()) > 1e-3  # it is not exact
    assert "uniform_heads_gap" not in facts[0]
    assert facts[1]["uniform_heads_gap"] > 1e-3
    assert done[1][1].soft.statistics()["uniform_heads_gap"] == 0  # the next layer has lost nothing


def test_m14_a_neuron_goes_when_its_row_or_its_column_is_zero() -> None:
    model: Any = tiny("bert")
    layer = model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense, layer.output.dense
    with torch.no_grad():
        up.weight[:10] = 0
        up.bias[:5] = 0  # gelu(0) = 0: no trace
        assert up.bias[5:10].abs().min() > 0  # gelu(b): folded
        down.weight[:, 20:30] = 0
    bias = down.bias.clone()
    expected = outputs(model, inputs("bert"))
    done = replaced(model)
    harden_all(model, done)
    assert_same(expected, outputs(model, inputs("bert")))
    assert done[1].soft.statistics()["neurons_kept"] == 44
    assert layer.intermediate.dense.weight.shape == (44, 32)
    assert not torch.equal(layer.output.dense.bias, bias)


def test_without_a_bias_to_fold_into_only_zeros_go() -> None:
    model: Any = tiny("qwen3")
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.up_proj.weight[:3] = 0
        layer.gate_proj.weight[3:5] = 0  # silu(0) * x = 0
    expected = outputs(model, inputs("qwen3"))
    done = replaced(model)
    harden_all(model, done)
    assert_same(expected, outputs(model, inputs("qwen3")))
    assert layer.up_proj.weight.shape == layer.gate_proj.weight.shape == (59, 32)
    whisper: Any = tiny("whisper")
    with torch.no_grad():  # T5, Llama: no bias at all; here fc2 is made one without
        fc = whisper.model.encoder.layers[0]
        fc.fc1.weight[:4] = 0
        fc.fc2.bias = None
    harden_all(whisper, replaced(whisper))
    assert whisper.model.encoder.layers[0].fc1.out_features == 64


@pytest.mark.parametrize("name", NAMES)
def test_layers_lose_different_heads_and_neurons(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    for index, (layer, parts) in enumerate(parts_of(model).items()):
        for number, block in enumerate(parts.attention):
            kept = (index + number) % block.kv_heads
            gone = [g for g in range(block.kv_heads) if g != kept][: 1 + index]
            silence_heads(model, layer, block, gone)
        for network in parts.networks:
            with torch.no_grad():
                matrix(part(model, layer, network.linears["fc2"]))[:, : 5 + 7 * index] = 0
    expected = outputs(model, inputs(name))
    before = sum(p.numel() for p in model.parameters())
    plmcc.Pipeline([NOTHING])(model)
    assert sum(p.numel() for p in model.parameters()) < before
    assert_same(expected, outputs(model, inputs(name)))
    check_cache(model, inputs(name))
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(outputs(model, inputs(name)), outputs(again, inputs(name)))
    for attention in ("sdpa",):
        other: Any = type(model).from_pretrained(tmp_path, attn_implementation=attention)
        assert_same(expected, outputs(other, inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_lost_everything_hands_on_its_input(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    first, parts = next(iter(parts_of(model).items()))
    with torch.no_grad():
        for block in parts.attention:
            matrix(part(model, first, block.linears["o"])).zero_()
        for network in parts.networks:
            matrix(part(model, first, network.linears["fc2"])).zero_()
    expected = outputs(model, inputs(name))
    plmcc.Pipeline([NOTHING])(model)
    assert_same(expected, outputs(model, inputs(name)))
    inside = [m for m in model.get_submodule(first).modules() if isinstance(m, Zeros | Constant)]
    assert len(inside) == len(parts.paths())
    left = dict(model.get_submodule(first).named_parameters())
    assert all(p.dim() == 1 for n, p in left.items() if "relative_attention_bias" not in n)
    check_cache(model, inputs(name))
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(expected, outputs(again, inputs(name)))
    again.save_pretrained(tmp_path / "again")
    twice: Any = type(model).from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert_same(expected, outputs(twice, inputs(name)))


def test_t5_layers_share_the_position_bias_of_heads_that_one_of_them_has_not(
    tmp_path: Path,
) -> None:
    model: Any = tiny("t5")
    chosen = MovementPruning(method="magnitude", granularity="head", density=0.5)
    plmcc.Pipeline([chosen])(model)
    stacks = (model.encoder.block, model.decoder.block)
    kept = [
        block.layer[0].SelfAttention._plmcc_kept_heads.index.tolist() for s in stacks for block in s
    ]
    assert len({tuple(heads) for heads in kept}) > 1  # else nothing is shown
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.weight.shape == (8, 4)
    plmcc.Pipeline([MovementPruning(method="magnitude", granularity="head", density=0.5)])(model)
    again = [
        block.layer[0].SelfAttention._plmcc_kept_heads.index.tolist() for s in stacks for block in s
    ]
    for two, one in zip(kept, again, strict=True):
        assert len(one) == 1
        assert set(one) < set(two)  # numbered as the table is
    expected = outputs(model, inputs("t5"))
    model.save_pretrained(tmp_path)
    loaded: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(expected, outputs(loaded, inputs("t5")))


def test_grouped_heads_go_with_their_keys_and_values() -> None:
    model: Any = tiny("llama")
    silence = parts_of(model)["model.layers.0"].attention[0]
    assert (silence.heads, silence.kv_heads) == (4, 2)
    with torch.no_grad():  # one of the two query heads of a group: it stays
        model.model.layers[0].self_attn.o_proj.weight[:, :8] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, :16] = 0
    expected = outputs(model, inputs("llama"))
    harden_all(model, replaced(model))
    assert_same(expected, outputs(model, inputs("llama")))
    first, second = (layer.self_attn for layer in model.model.layers)
    assert (first.q_proj.out_features, first.k_proj.out_features) == (32, 16)
    assert (second.q_proj.out_features, second.k_proj.out_features) == (16, 8)


def test_pruned_models_are_smaller_by_the_parameters_of_their_heads_and_neurons() -> None:
    model: Any = tiny("bert")
    before = sum(p.numel() for p in model.parameters())
    chosen = MovementPruning(method="magnitude", granularity="structured", density=0.25)
    done = replaced(model, chosen)
    harden_all(model, done)
    gone = before - sum(p.numel() for p in model.parameters())
    heads, neurons = 3 * (4 * 8 * 32 + 3 * 8), 48 * (2 * 32 + 1)
    assert gone == 2 * (heads + neurons)
    facts = metrics(done)
    assert (facts["heads_kept"], facts["neurons_kept"]) == (2, 32)
    assert facts["stored_weights"] == facts["nonzero_weights"] == facts["weights"] / 4


def test_keeping_all_shapes_gives_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model: Any = tiny("bert")
    chosen = MovementPruning(method="magnitude", granularity="head", density=0.5, compact=False)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    done = replaced(model, chosen)
    harden_all(model, done)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert metrics(done)["heads_kept"] == 8
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(outputs(model, inputs("bert")), outputs(again, inputs("bert")))


# --- storage


def sparse(rows: int = 24, columns: int = 35, density: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    weight = values * (torch.rand(rows, columns, generator=generator) < density)
    weight[3] = 0
    return weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.2, 0.0, 1.0])
def test_m13_what_is_stored_comes_back_bit_for_bit(
    form: str, dtype: torch.dtype, density: float
) -> None:
    weight, bias = sparse(density=density).to(dtype), torch.randn(24).to(dtype)
    stored = SparseLinear.of(weight, bias, form)
    back = stored.weight
    assert back.dtype == dtype
    assert torch.equal(back == 0, weight == 0) or form == "int8_csr"
    assert torch.equal(back[weight == 0], weight[weight == 0])  # zeros stay zeros
    if form == "int8_csr":
        step = float(weight.float().abs().max()) / 127
        rounding = float(weight.float().abs().max()) * torch.finfo(dtype).eps * 2
        assert float((back - weight).float().abs().max()) <= step / 2 + rounding
    else:
        assert torch.equal(back, weight)
    assert torch.equal(SparseLinear.of(back, bias, form).weight, back)
    x = torch.randn(2, 3, 35).to(dtype)
    assert torch.equal(stored(x), nn.functional.linear(x, back, bias))
    values = len(stored.values)
    expected = stored_bytes(form, (24, 35), values, dtype.itemsize)
    assert module_bytes(stored) == expected + bias.nbytes


def test_m13_the_formula_gives_the_published_size() -> None:
    shapes = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
    kept = {shape: int(0.06 * shape[0] * shape[1]) for shape in shapes}
    total = sum(stored_bytes("int8_csr", shape, kept[shape], 4) for shape in shapes)
    values = sum(3 * kept[shape] for shape in shapes)
    assert values / 1e6 == pytest.approx(15.3, abs=0.05)
    assert (total - values) / 1e6 == pytest.approx(0.33, abs=0.01)


def test_wide_matrices_have_wider_indices() -> None:
    assert index_type(65_536) == torch.uint16
    assert index_type(65_537) == torch.int32
    assert stored_bytes("csr", (1, 70_000), 10, 4) - stored_bytes("csr", (1, 60_000), 10, 4) == 20
    weight = torch.zeros(2, 70_000)
    weight[1, 69_999] = 3
    assert torch.equal(SparseLinear.of(weight, None, "csr").weight, weight)


@pytest.mark.parametrize("form", ["csr", "int8_csr"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_sparse_layers_are_saved_and_loaded(form: str, name: str, tmp_path: Path) -> None:
    model, plain = tiny(name), tiny(name)
    options: dict[str, Any] = {"method": "magnitude", "density": 0.25}
    plmcc.Pipeline([MovementPruning(**options)])(plain)
    plmcc.Pipeline([MovementPruning(**options, storage=form)])(model)
    one, two = (outputs(m, inputs(name))["output"] for m in (plain, model))
    if form == "csr":
        assert torch.allclose(one, two, atol=1e-5)
    else:  # 8 bits change a little, and not more
        assert 0 < float((one - two).norm() / one.norm()) < 0.1
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(v.float(), found[n].float()) for n, v in expected.items())
    assert_same(outputs(model, inputs(name)), outputs(again, inputs(name)))


def test_int8_is_what_evaluation_sees_before_it_is_stored() -> None:
    model = tiny("bert")
    chosen = MovementPruning(method="magnitude", density=0.5, storage="int8_csr")
    done = replaced(model, chosen)
    soft = outputs(model, inputs("bert"))
    harden_all(model, done)
    assert_same(soft, outputs(model, inputs("bert")))
    assert not any(isinstance(module, Masked) for module in model.modules())
