"""Structured pruning: copies go at no cost, the refit is the best one, results are ordinary."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import plmcc
from plmcc import rewrite
from plmcc.artifact.stock import needs_plmcc
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import Calibration, CalibrationData, Call, observing
from plmcc.ir.program import Program
from plmcc.kit import Replay
from plmcc.kit.configured import sizes_for
from plmcc.kit.parts import Attention, Network, by_path, matrix, read
from plmcc.passes.structured_pruning import StructuredPruning
from plmcc.passes.structured_pruning.cuts import reader_of, taylor
from plmcc.passes.structured_pruning.elimination import Reader
from plmcc.planning.plan import load_outline, plan
from plmcc.recipe import parse_recipe
from support.tiny_models import inputs, tiny
from support.tokenizers import words

HALF = {"target": {"parameters": 0.75}}
LLAMAS = ["llama", "qwen2", "gemma2"]


def batches(name: str, count: int = 4) -> list[dict[str, Tensor]]:
    return [inputs(name, batch=8) for _ in range(count)]


def pruned(model: Any, data: list[dict[str, Tensor]], **options: Any) -> list[Any]:
    chosen = StructuredPruning(**options)
    matched = rewrite.match(model, [chosen], data=CalibrationData(data))
    done = rewrite.replace_all(model, matched)
    rewrite.harden_all(model, done)
    return done


def llama(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    return model.eval()


def text_batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (count, 8, 24), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


@torch.no_grad()
def double_neurons(model: Any) -> None:
    """Let every second neuron of a Llama be a copy of the one before it."""
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[1::2] = linear.weight[::2]


@torch.no_grad()
def double_heads(model: Any) -> None:
    """Let every second key-value group of a Llama be a copy of the one before it."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            groups = linear.weight.view(4, -1, linear.in_features)
            groups[1::2] = groups[::2]


def logits(model: Any, data: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        found: Tensor = torch.cat([model(**batch).logits for batch in data])
    return found


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_copies_of_others_go_without_a_trace(kind: str) -> None:
    model, data = llama(), text_batches()
    (double_neurons if kind == "neurons" else double_heads)(model)
    before = logits(model, data)
    share = 0.7 if kind == "neurons" else 0.84
    options: dict[str, Any] = {"target": {"parameters": share}, "remove": [kind]}
    options |= {"multiple_of": 1} if kind == "neurons" else {}
    kept, plainly = copy.deepcopy(model), copy.deepcopy(model)
    done = pruned(kept, data, **options)
    pruned(plainly, data, **options, reconstruct=False)
    layer = kept.model.layers[0]
    if kind == "neurons":
        assert 64 <= layer.mlp.down_proj.in_features < 128
    else:
        assert layer.self_attn.k_proj.out_features < 32
    # The ridge draws towards the weights before, so that the refit is not exact.
    assert difference(logits(kept, data), before) < 0.03
    assert difference(logits(plainly, data), before) > 0.1
    errors = [v for one in done for n, v in one.soft.statistics().items() if n.endswith("error")]
    assert len(errors) == 3
    assert max(errors) < 0.03


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_the_ridge_optimum(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 5, bias=bias)
    x_TN = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    reader = Reader.of(linear, 3)
    reader.see(x_TN + 1, torch.ones(200, 5))
    kept, _ = reader.eliminated(2)
    refit = reader.refitted(kept, reconstruct=True)
    weight = refit.weight_OK.clone().requires_grad_()
    shift = None if refit.bias_O is None else refit.bias_O.clone().requires_grad_()
    inputs_K = (kept[:, None] * 3 + torch.arange(3)).flatten()

    def objective() -> Tensor:
        x = (x_TN + 1).double()
        wanted = x @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        made = x[:, inputs_K] @ weight.T
        made = made if shift is None else made + shift
        ridge = 0.01 * reader.second_moment_NN.diagonal().mean()
        away = (weight - linear.weight.double()[:, inputs_K]).square().sum()
        if shift is not None:
            away = away + (shift - linear.bias.double()).square().sum()
        return (made - wanted).square().sum() + ridge * away

    objective().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-6 * float(reader.second_moment_NN.abs().max())
    x = (x_TN + 1).double()
    wanted = x @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    made = x[:, inputs_K] @ refit.weight_OK.T
    made = made if refit.bias_O is None else made + refit.bias_O
    wanted, made = wanted.detach(), made.detach()
    assert refit.error == pytest.approx(float((made - wanted).norm() / wanted.norm()), rel=1e-6)


def cost_of(reader: Reader, kept: Tensor, x_TN: Tensor, states_TD: Tensor) -> float:
    """What keeping only some groups costs after the refit, written out: the mean square of the
    error relative to the hidden states, and the ridge."""
    refit = reader.refitted(kept, reconstruct=True)
    inputs_K = (kept[:, None] * 3 + torch.arange(3)).flatten()
    change_ON = -reader.weight_ON
    change_ON[:, inputs_K] += refit.weight_OK
    assert refit.bias_O is not None
    change_ON[:, -1] += refit.bias_O
    lost_TO = x_TN.double() @ change_ON[:, :-1].T + change_ON[:, -1]
    scaled = lost_TO.square().mean(1) / states_TD.double().square().mean(1)
    ridge = 0.01 * reader.second_moment_NN.diagonal().mean() * change_ON.square().sum()
    return float(scaled.mean() + ridge / lost_TO.numel())


@pytest.mark.parametrize("seed", range(5))
def test_elimination_finds_the_cheapest_group(seed: int) -> None:
    """Of all ways to leave out one group, the chosen one costs least after the refit."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(15, 4)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    reader = Reader.of(linear, 3)
    x_TN = torch.randn(300, 15, generator=generator) @ torch.randn(15, 15, generator=generator)
    states_TD = torch.rand(300, 4, generator=generator) + 0.1
    reader.see(x_TN, states_TD)
    others = [torch.tensor([g for g in range(5) if g != out]) for out in range(5)]
    costs = [cost_of(reader, kept, x_TN, states_TD) for kept in others]
    kept, rounds = reader.eliminated(4)
    assert kept.tolist() == others[costs.index(min(costs))].tolist()
    ((count, cost),) = rounds
    assert count == 1
    assert cost == pytest.approx(min(costs), rel=1e-4)


def test_layers_are_fitted_on_what_the_cut_ones_give() -> None:
    model, data = llama(), text_batches(2)
    program = Program(model, CalibrationData(data))
    layers = list(model.model.layers)
    replay = Replay(program.data, layers)
    assert replay.chained
    with torch.no_grad():
        layers[0].mlp.down_proj.weight.mul_(0.5)
    replay.advance(0)
    seen: list[Tensor] = []
    with torch.no_grad(), observing([layers[1]], lambda _, call: seen.append(call.input)):
        for batch in data:
            model(**batch)
    for state, wanted in zip(replay.states, seen, strict=True):
        torch.testing.assert_close(state, wanted)


def test_a_stack_that_is_no_chain_is_run_whole() -> None:
    """Layers between which the model changes states are run with the model."""

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x * 2)
            return made + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = Scaled(layer)(x)
            return x

    model: Any = Model()
    model.device = torch.device("cpu")
    data = Calibration(model, CalibrationData([{"x": torch.randn(2, 3, 4)}]))
    replay = Replay(data, list(model.layers))
    assert not replay.chained
    seen: list[Call] = []
    replay.observe(2, [model.layers[2]], lambda _, call: seen.append(call))
    assert len(seen) == 1


def test_taylor_scores_are_gradient_times_activation() -> None:
    model, data = llama(), text_batches(1)
    data[0]["labels"] = data[0]["input_ids"]
    program = Program(model, CalibrationData(data))
    found = rewrite.match(model, [StructuredPruning(importance="taylor", multiple_of=8)])
    sites: Any = [site for _, site in found.sites]
    scores = taylor(program, sites)
    linear = model.model.layers[1].mlp.down_proj
    gate = torch.ones(8, 128, requires_grad=True)  # one for each row and neuron
    hook = linear.register_forward_pre_hook(lambda _, given: (given[0] * gate[:, None],))
    model(**data[0]).loss.backward()
    hook.remove()
    assert gate.grad is not None
    torch.testing.assert_close(scores[linear], gate.grad.square().sum(0), rtol=1e-4, atol=1e-9)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("importance", ["elimination", "activations", "taylor"])
@pytest.mark.parametrize("remove", [["neurons"], ["heads"], ["neurons", "heads"]])
def test_results_of_llamas_are_ordinary_checkpoints(
    importance: str, remove: list[str], tmp_path: Path
) -> None:
    model, data = llama(), text_batches(2)
    options: dict[str, Any] = {"importance": importance, "remove": remove}
    if "neurons" in remove:
        options["multiple_of"] = 4
    target = {"parameters": 0.7 if len(remove) > 1 else 0.84}
    pruned(model, data, target=target, **options)
    assert needs_plmcc(model) == ""
    if "neurons" in remove:
        assert model.config.intermediate_size < 128
    if "heads" in remove:
        assert model.config.num_key_value_heads < 4
        assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    model.save_pretrained(tmp_path / "small")
    torch.save({"batch": data[0], "logits": logits(model, data[:1])}, tmp_path / "wanted")
    code = (
        "import sys, torch, transformers\n"
        f"wanted = torch.load({str(tmp_path / 'wanted')!r})\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r})\n"
        "made = model(**wanted['batch']).logits\n"
        "torch.testing.assert_close(made, wanted['logits'])\n"
        "assert not any(name.startswith('plmcc') for name in sys.modules)\n"
        "out = model.generate(wanted['batch']['input_ids'][:1, :4], max_new_tokens=5)\n"
        "assert out.shape[1] > 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "marian", "bart", "t5", "bert"])
def test_sizes_are_as_planned(name: str) -> None:
    """Of each family: what is planned on the meta device is what is made."""
    model = tiny(name)
    chosen = StructuredPruning(multiple_of=4, uniform=False, target={"parameters": 0.9})
    matched = rewrite.match(model, [chosen], data=CalibrationData(batches(name, 2)))
    planned: list[Any] = [chosen.plan(site) for _, site in matched.sites]
    assert not matched.misses
    done = rewrite.replace_all(model, matched)
    for one, shape in zip(done, planned, strict=True):
        made: Any = one.soft.harden()
        for key in ("linears", "rows", "columns", "counts"):
            assert made.layout[key] == shape.module.layout[key]
    assert torch.isfinite(model(**inputs(name))[0]).all()


def test_layers_lose_more_where_it_costs_less() -> None:
    model, data = llama(), text_batches()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.05)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    done = pruned(model, data, scope="global", multiple_of=4)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[1] < min(widths[0], widths[2]) - 40
    assert [one.soft.statistics()["neurons"] for one in done] == widths
    left = sum(p.numel() for p in model.model.layers.parameters()) / layers
    assert left == pytest.approx(0.8, abs=0.02)
    assert "in this shape" in needs_plmcc(model)


def test_the_target_is_met() -> None:
    for target in ({"parameters": 0.8}, {"flops": 0.8, "length": 16}):
        model = llama()
        layers = sum(p.numel() for p in model.model.layers.parameters())
        pruned(model, text_batches(1), target=target, multiple_of=1, remove=["neurons", "heads"])
        left = sum(p.numel() for p in model.model.layers.parameters()) / layers
        assert left == pytest.approx(0.8, abs=0.02 if "parameters" in target else 0.05)


def test_flops_are_counted_of_all_parts() -> None:
    """Also where only neurons are removed: attention counts in what is to be left."""
    model, length = llama(), 64
    attention = 2 * (2 * 32 * 64 + 2 * 32 * 32) + 4 * length * 64
    network = 2 * 3 * 32 * 128
    target = {"flops": 0.8, "length": length}
    pruned(model, text_batches(1), target=target, multiple_of=1)
    left = attention + network * model.config.intermediate_size / 128
    assert left / (attention + network) == pytest.approx(0.8, abs=0.01)


def test_a_target_between_whole_heads_names_the_nearest() -> None:
    with pytest.raises(PlmccError) as caught:
        rewrite.match(llama(), [StructuredPruning(target={"parameters": 0.9}, remove=["heads"])])
    assert "the nearest to 0.9 that can be kept is 0.83" in str(caught.value)


def test_padding_is_left_out_where_layers_flatten_it() -> None:
    """OPT gives its feed-forward network all tokens of a batch as rows."""
    sizes: Any = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)).eval()
    (batch,) = text_batches(1)
    batch["attention_mask"][2:, 15:] = 0
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][2:, 15:] = 7
    made = []
    for data in ([batch], [other]):
        copied = copy.deepcopy(model)
        done = pruned(copied, data, multiple_of=8)
        made.append(copied.model.decoder.layers[1].fc2.weight)
        assert copied.config.ffn_dim < 64
        assert all(one.soft.statistics()["feed_forward_error"] > 0 for one in done)
    torch.testing.assert_close(made[0], made[1])


def test_an_entry_is_found_by_trying() -> None:
    model = llama()
    shapes = {
        f"model.layers.{i}.mlp.{name}.weight": (96, 32) if name != "down_proj" else (32, 96)
        for i in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert sizes_for(model, shapes, [("", 128, 96)]) == {"intermediate_size": 96}
    del shapes["model.layers.1.mlp.down_proj.weight"]
    assert sizes_for(model, shapes, [("", 128, 96)]) is None


def test_what_cannot_be_uniform_says_so() -> None:
    model = llama()
    pruned(model, text_batches(1), uniform=False, targets="*.1", multiple_of=8)
    with pytest.raises(PlmccError) as caught:
        rewrite.match(model, [StructuredPruning(multiple_of=8)])
    assert "its layers differ" in str(caught.value)
    assert "`uniform: false`" in str(caught.value)
    with pytest.raises(PlmccError) as caught:
        rewrite.match(llama(), [StructuredPruning(targets="*.0", multiple_of=8)])
    assert "no entry" in str(caught.value)


def test_targets_out_of_reach_are_refused() -> None:
    with pytest.raises(PlmccError) as caught:
        rewrite.match(llama(), [StructuredPruning(target={"parameters": 0.1})])
    assert "without neurons 0." in str(caught.value)
    with pytest.raises(PlmccError) as caught:
        rewrite.match(llama(), [StructuredPruning(target={"parameters": 0.99}, remove=["heads"])])
    assert "all of them" in str(caught.value)


RECIPE = """
plmcc: 1
task: text-generation
passes:
  - structured_pruning: {{target: {{parameters: 0.8}}, multiple_of: 8, text: [{text}]}}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    tokenizer = words()
    llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_recipe_names_its_text(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("\n".join(f"word{i % 50} word{i % 7} word{i % 31}" for i in range(1200)))
    recipe = parse_recipe(RECIPE.format(text=text), load_torch=True)
    outline = plan(recipe, load_outline(recipe, str(model_dir)))
    assert outline.ok
    assert not outline.needs_plmcc
    result = plmcc.apply(recipe, str(model_dir), output=tmp_path / "small")
    assert result.model.config.intermediate_size < 128
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(made).__module__.startswith("transformers.")
    assert made.config.intermediate_size == result.model.config.intermediate_size


def test_too_little_text_is_refused(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("word1 word2\n")
    recipe = parse_recipe(RECIPE.format(text=text), load_torch=True)
    with pytest.raises(PlmccError) as caught:
        plmcc.apply(recipe, str(model_dir), output=tmp_path / "small")
    assert "shorter than one window" in str(caught.value)
    assert not (tmp_path / "small").exists()


def test_text_and_calibrate_exclude_each_other(tmp_path: Path) -> None:
    text = RECIPE.format(text="a.txt") + "calibrate: {data: b.txt}\n"
    with pytest.raises(PlmccError) as caught:
        parse_recipe(text)
    assert "`calibrate`" in str(caught.value)


def test_without_text_the_recipe_is_refused() -> None:
    from plmcc.recipe.needs import check_calibrated

    recipe = parse_recipe("plmcc: 1\ntask: text-generation\npasses: [structured_pruning]\n")
    with pytest.raises(PlmccError) as caught:
        check_calibrated(recipe)
    assert "measured on text" in str(caught.value)


def test_a_part_is_read_by_one_linear() -> None:
    model = tiny("gpt2")
    program = Program(model)
    parts: Any = read(program, program.layer_paths()[0], by_path(program))
    kinds = {type(part) for part in parts.every()}
    assert kinds == {Attention, Network}
    for part in parts.every():
        linear = program.layer(program.layer_paths()[0])
        assert linear is not None
        module = model.get_submodule(program.layer_paths()[0]).get_submodule(reader_of(part))
        assert matrix(module).shape[0] == model.config.hidden_size
