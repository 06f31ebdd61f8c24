from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plmcc
from plmcc.api import LinearSite
from plmcc.artifact.size import parameter_count
from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.passes.quantized_linears import FakeQuantized, QuantizedLinear, QuantizedLinears
from plmcc.recipe.load import parse_recipe
from plmcc.rewrite import harden_all, match, replace_all
from support.tiny_models import inputs, tiny
from support.tokenizers import words

torchao = pytest.importorskip("torchao", reason="the extra `quantize` is not installed")

SCHEMES = ("int8", "int4", "int8_dynamic")
HEAD = "plmcc: 1\nname: small\npasses:\n  - compositional_codes: {codebooks: 4, codewords: 8}\n"


def quantized(name: str, **options: Any) -> Any:
    model = tiny(name)
    return harden_all(model, replace_all(model, match(model, [QuantizedLinears(**options)]))), model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_within_half_a_step(scheme: str) -> None:
    """Every weight is one of the levels, and the nearest one."""
    original: Any = tiny("bert")
    _, model = quantized("bert", scheme=scheme)
    path = "bert.encoder.layer.0.intermediate.dense"
    before, after = original.get_submodule(path), model.get_submodule(path)
    assert isinstance(after, QuantizedLinear)
    groups = after.scales.shape[1]
    difference = (after.weight - before.weight).abs().reshape(before.out_features, groups, -1)
    assert bool((difference <= after.scales[..., None] * 0.5001 + 1e-7).all())
    assert int(after.levels.unique().numel()) > 8
    assert after.bias is not None
    assert torch.equal(after.bias, before.bias)


def test_bytes_are_those_of_the_formula() -> None:
    for scheme, width in (("int8", 32), ("int4", 16), ("int8_dynamic", 32)):
        _, model = quantized("bert", scheme=scheme)
        layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
        stored = {name: value.nbytes for name, value in layer.state_dict().items()}
        assert stored == {"levels": 64 * width, "scales": 4 * 64, "bias": 4 * 64}


def test_conv1d_is_read_the_other_way_round() -> None:
    original: Any = tiny("gpt2")
    _, model = quantized("gpt2")
    weight = original.transformer.h[0].mlp.c_fc.weight.detach()
    found = model.transformer.h[0].mlp.c_fc.weight
    assert found.shape == weight.T.shape
    assert torch.allclose(found, weight.T, atol=float(weight.abs().max()) / 200)


def test_a_dynamic_layer_multiplies_integers_exactly() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(64, 24, "int8_dynamic", 1, True)
    layer.levels.copy_(torch.randint(-127, 128, (24, 64)))
    layer.scales.uniform_(0.01, 0.02)
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        exact = layer(x)
    assert torch.allclose(layer(x), exact, rtol=1e-6, atol=1e-6)  # with gradients: in floats
    step = x.abs().amax(-1, keepdim=True) / 127
    assert layer.bias is not None
    expected = ((x / step).round() @ layer.levels.float().T) * step * layer.scales[:, 0]
    assert torch.allclose(exact, expected + layer.bias, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        exact = nn.functional.linear(x, layer.weight, layer.bias)
        assert float((layer(x) - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_a_tied_head_stays_with_its_table() -> None:
    records, model = quantized("bert")
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert not any("decoder" in record.paths[0] for record in records)


def test_groups_that_do_not_fit_are_refused_with_the_number() -> None:
    with pytest.raises(PlmccError, match="32 inputs are not a multiple of the group size 24"):
        match(tiny("bert"), [QuantizedLinears(scheme="int4", group=24)])


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = tiny("bert")
    with pytest.raises(PlmccError, match="pip install torchao"):
        replace_all(model, match(model, [QuantizedLinears()]))


@pytest.mark.parametrize(
    "scheme", ["int8", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in SCHEMES[1:])]
)
def test_a_recipe_ends_with_it_and_the_result_loads_without_torchao(
    scheme: str, tmp_path: Path
) -> None:
    tiny("bert").save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    recipe = parse_recipe(HEAD + f"lower: {{quantize: {scheme}}}\n", load_torch=True)
    result = plmcc.apply(recipe, tmp_path / "m", tmp_path / "out")
    kinds = {site["pass"] for site in result.sites}
    assert kinds == {"compositional_codes", "quantized_linears"}
    given = inputs("bert")
    with torch.no_grad():
        expected = result.model(**given).logits
    torch.save({"given": given, "expected": expected}, tmp_path / "case.pt")
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        "import plmcc, torch\nfrom transformers import AutoModelForMaskedLM as A\n"
        f"case = torch.load({str(tmp_path / 'case.pt')!r})\n"
        f"model = A.from_pretrained({str(tmp_path / 'out')!r}).eval()\n"
        "with torch.no_grad(): found = model(**case['given']).logits\n"
        "print(float((found - case['expected']).abs().max()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
    assert "quantize" in (tmp_path / "out/recipe.yaml").read_text()
    compiled = plmcc.compile(copy.deepcopy(result.model))
    with torch.no_grad():
        difference = (compiled(**given).logits - expected).abs().max()
    assert float(difference) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantization_is_torchaos_mapping(scheme: str) -> None:
    """The trainable form computes what torchao's integers do, up to ties, and hardens to that."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 40)
    model = nn.ModuleDict({"linear": linear})
    site = LinearSite(
        "linear", ("linear",), ("module",), (linear,),
        in_features=64, out_features=40, bias=True, transposed=False,
    )  # fmt: skip
    program: Any = Program(model)  # type: ignore[arg-type]
    fixed: Any = QuantizedLinears(scheme=scheme).replace(site, program).harden()
    soft: Any = QuantizedLinears(scheme=scheme, trainable=True).replace(site, program)
    x = torch.randn(5, 7, 64)
    with torch.no_grad():
        allowed = 0.2 if scheme == "int4" else 0.02  # a tie is a whole step
        torch.testing.assert_close(soft(x), fixed(x), atol=allowed, rtol=0.02)
        trainable = soft(x)
        made = soft.harden()
        torch.testing.assert_close(made(x), trainable, atol=1e-5, rtol=1e-5)
    same = (made.dense() - fixed.dense()).abs() < 1e-6
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_as_if_nothing_was_quantized(scheme: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    soft = FakeQuantized(QuantizedLinear(64, 8, scheme, 2 if scheme == "int4" else 1, False),
                         linear.weight.detach())  # fmt: skip
    x = torch.randn(9, 64)
    soft(x).sum().backward()
    assert soft.weight.grad is not None
    allowed = 0.05 if scheme == "int8_dynamic" else 1e-4  # of the inputs, which are quantized too
    wanted = x.sum(0).expand(8, -1)
    assert (soft.weight.grad - wanted).abs().max() <= allowed * wanted.abs().max()


def test_training_learns_the_errors_of_the_integers_away(tmp_path: Path) -> None:
    """Training brings a model in 4 bits nearer to the original than rounding its weights does."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(" ".join(f"w{(i * j) % 90}" for j in range(1, 14)) for i in range(99))
    )
    model: Any = tiny("bert")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    train = (
        f"train:\n  data: {{train: {text}}}\n  dropout: false\n"
        "  distill: {logits: 1.0, temperature: 1.0, task: 0}\n"
        "  arguments: {max_steps: 60, learning_rate: 2.0e-3, per_device_train_batch_size: 16}\n"
    )
    found: list[float] = []
    for more in ("", train):
        recipe = parse_recipe(
            "plmcc: 1\ntask: fill-mask\n"
            f"passes: [quantized_linears: {{scheme: int4, trainable: {str(bool(more)).lower()}}}]\n"
            f"{more}evaluate: [{{metric: kl_divergence, data: {text}}}]\n",
            load_torch=True,
        )
        result = plmcc.apply(recipe, tmp_path / "model", output=tmp_path / f"out{len(found)}")
        found.append(result.metrics[0]["after"])
    assert found[1] < 0.6 * found[0]
    kinds = {type(part).__name__ for part in result.model.modules()}
    assert "QuantizedLinear" in kinds
    assert "FakeQuantized" not in kinds


def test_what_is_lowered_is_trained_in_a_last_stage() -> None:
    text = "plmcc: 1\npasses: [drop_layers]\nlower:\n  quantize: int8\n"
    recipe = parse_recipe(f"{text}  train: {{data: {{train: a.txt}}}}\n")
    last = recipe.steps()[-1]
    assert last.name == "quantize"
    assert last.train is not None
    wanted = QuantizedLinears(scheme="int8", trainable=True).model_dump()
    assert [one.model_dump() for one in last.passes] == [wanted]
    assert not parse_recipe(text).steps()[-1].passes[0].model_dump()["trainable"]
    with pytest.raises(PlmccError, match="`train` has no effect without `quantize`"):
        parse_recipe(text.replace("quantize: int8", "to: [compile]\n  train: {data: {train: a}}"))


def test_trainable_integers_need_a_training() -> None:
    from plmcc.recipe.needs import check_trained

    recipe = parse_recipe("plmcc: 1\npasses: [{quantized_linears: {trainable: true}}]\n")
    with pytest.raises(PlmccError, match="trains the weights"):
        check_trained(recipe)


def test_nothing_is_rounded_twice() -> None:
    text = "plmcc: 1\npasses: [quantized_linears]\nlower: {quantize: int8}\n"
    with pytest.raises(PlmccError, match=r":3:19: error PLM303: .*nothing is left"):
        plmcc.apply(parse_recipe(text, load_torch=True), tiny("bert"))
    some = text.replace("[quantized_linears]", "[quantized_linears: {targets: '*query'}]")
    found = plmcc.apply(parse_recipe(some, load_torch=True), tiny("bert"))
    assert len(found.sites) == 13


def test_the_report_counts_the_smaller_layers(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "m")
    recipe = parse_recipe("plmcc: 1\npasses: [quantized_linears]\n", load_torch=True)
    plmcc.apply(recipe, tmp_path / "m", tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    path = "bert.encoder.layer.0.output.dense"
    assert report["bytes_before"][path] == 4 * (32 * 64 + 32)
    assert report["bytes_after"][path] == 32 * 64 + 4 * 32 + 4 * 32


@pytest.mark.parametrize(("scheme", "weights"), [("int8", 64 * 32), ("int4", 64 * 32)])
def test_integers_count_as_parameters(scheme: str, weights: int) -> None:
    made = QuantizedLinear(64, 32, scheme, groups=2 if scheme == "int4" else 1, bias=True)
    scales = 32 * (2 if scheme == "int4" else 1)
    assert parameter_count(nn.Sequential(made, nn.Linear(3, 2))) == weights + scales + 32 + 8
