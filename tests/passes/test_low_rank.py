"""Low-rank linears: the best approximation of outputs, and weights that cost nothing to ask for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import plmcc
from plmcc import rewrite
from plmcc.api import Soft
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import CalibrationData, observing
from plmcc.kit import HardLinear
from plmcc.kit.linear import LazyWeight
from plmcc.passes.low_rank import LowRank, LowRankLinear
from plmcc.planning.plan import plan
from plmcc.recipe import parse_recipe
from support.tiny_models import inputs, prompt, tiny

OPTIONS = {"rank": 6}
HALF = {"target": {"parameters": 0.5}}


def replaced(model: Any, batches: list[dict[str, Tensor]], **options: Any) -> list[Any]:
    data = CalibrationData(batches)
    return rewrite.replace_all(model, rewrite.match(model, [LowRank(**HALF | options)], data=data))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_each_weighting_is_best_at_what_it_minimizes(name: str) -> None:
    batches = [inputs(name, batch=8) for _ in range(2)]
    target = "*.1.*intermediate.dense" if name == "bert" else "*.1.*c_fc"
    wrong: dict[str, dict[str, float]] = {}
    for weighting in ("none", "diagonal", "covariance"):
        model: Any = tiny(name)
        seen: list[Tensor] = []
        (found,) = rewrite.match(model, [LowRank(**HALF, weighting="none", targets=target)]).sites
        with torch.no_grad(), observing(found[1].modules, lambda _, c: seen.append(c.input)):  # noqa: B023
            model(**batches[0])
        mask = batches[0]["attention_mask"].bool()
        x_NI = seen[0][mask]
        old = found[1].module.get_parameter("weight").detach()
        old_OI = old.T if name == "gpt2" else old
        (done,) = replaced(model, batches, weighting=weighting, targets=target)
        new_OI = done.soft.harden().dense().detach()
        wrong[weighting] = {
            "none": float((new_OI - old_OI).square().sum()),
            "covariance": float(F.linear(x_NI, new_OI - old_OI).square().sum()),
        }
        size = float(F.linear(x_NI, old_OI).square().sum())
        if weighting == "covariance":
            given = done.soft.statistics()["relative_error"]
            assert given**2 == pytest.approx(wrong[weighting]["covariance"] / size, rel=0.02)
    for kind in ("none", "covariance"):
        best = wrong[kind][kind]
        assert all(best <= 1.0001 * other[kind] for other in wrong.values())
    assert wrong["covariance"]["covariance"] < 0.98 * wrong["none"]["covariance"]


def test_the_options() -> None:
    with pytest.raises(ValueError, match="`rank` and `target` say the same"):
        LowRank(rank=4, **HALF)
    with pytest.raises(PlmccError, match="rank 99 does not make its 32 x 16 weight smaller"):
        rewrite.match(tiny("albert"), [LowRank(rank=99, weighting="none")])
    with pytest.raises(PlmccError, match="`weighting: covariance` measures the inputs"):
        plmcc.Pipeline([LowRank(rank=2)])(tiny("bert"))


def test_its_plan_needs_no_values(tmp_path: Path) -> None:
    text = "plmcc: 1\npasses: [{low_rank: {rank: 4}}]\ncalibrate: {data: synthetic}\n"
    tiny("bert").save_pretrained(tmp_path)
    made = plan(parse_recipe(text, load_torch=True), str(tmp_path))
    assert made.problems == []
    (stage,) = made.stages
    assert all(site.about == "" for site in stage.rules[0].sites)
    model = tiny("bert")
    replaced(model, [inputs("bert")], rank=4, target=None)
    assert stage.after is not None
    assert stage.after.parameters == sum(p.numel() for p in model.parameters())


# --- weights that are built only when they are used


def _note(built: list[str], dense: Any) -> Any:
    def noted(linear: HardLinear) -> Tensor:
        built.append(type(linear).__name__)
        return dense(linear)  # type: ignore[no-any-return]

    return noted


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
@pytest.mark.parametrize("chosen", ["low_rank", "quantized_linears"])
def test_generation_builds_no_dense_weight(
    name: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plmcc.passes.quantized_linears import QuantizedLinear, QuantizedLinears

    passes = [LowRank(rank=4, weighting="none") if chosen == "low_rank" else QuantizedLinears()]
    model: Any = tiny(name)
    plmcc.Pipeline(passes)(model)
    built: list[str] = []
    for kind in (LowRankLinear, QuantizedLinear):
        monkeypatch.setattr(kind, "dense", _note(built, kind.dense))
    model.generate(**prompt(name), max_new_tokens=3)
    assert built == []


def test_a_lazy_weight_is_a_weight_to_whoever_uses_it() -> None:
    linear = LowRankLinear(6, 4, True, rank=2).double()
    nn.init.normal_(linear.left)
    nn.init.normal_(linear.right)
    weight: Any = linear.weight
    assert type(weight) is LazyWeight
    used: Any = linear.weight
    dense = used * 1
    assert torch.equal(used[0], dense[0])
    assert torch.equal(2 - used, 2 - dense)
    assert torch.equal(used @ dense.T, dense @ dense.T)
    assert len(used) == len(dense)
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float64, "cpu", (4, 6))
    assert (weight.dim(), weight.size(1), weight.numel()) == (2, 6, 24)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = x @ linear.left.T.new_tensor(linear.dense().detach().T.tolist())
    by_function: Any = F.linear
    for made in (by_function(x, weight), x @ weight.T, torch.matmul(x, weight.t())):
        torch.testing.assert_close(made, expected)
    torch.testing.assert_close(linear.merged()(x), linear(x))


@pytest.mark.parametrize("chosen", ["low_rank", "quantized_linears"])
def test_a_layer_that_t5_keeps_in_float32_takes_half_precision(chosen: str) -> None:
    from plmcc.passes.quantized_linears import QuantizedLinears

    model: Any = tiny("t5").half()
    kept = [path for path, _ in model.named_modules() if path.endswith(".wo")]
    for path in kept:
        model.get_submodule(path).float()
    first: Any = LowRank(rank=12, weighting="none", targets="*.wo")
    plmcc.Pipeline([first if chosen == "low_rank" else QuantizedLinears(targets="*.wo")])(model)
    found = model(**inputs("t5")).logits.float()
    for path in kept:  # ordinary layers, to which T5 casts
        model.set_submodule(path, model.get_submodule(path).merged())
    expected = model(**inputs("t5")).logits.float()
    assert len(kept) == 4
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-2)


def test_a_lazy_weight_can_be_copied_and_says_what_it_lacks() -> None:
    linear = LowRankLinear(6, 4, False, rank=2)
    copied: Any = copy.deepcopy(linear.weight)
    assert copied.shape == (4, 6)
    weight: Any = linear.weight
    with pytest.raises(AttributeError):
        _ = weight.no_such_attribute


class Plain(LowRank):
    """Replaces a linear map by a form that cannot be shared."""

    def replace(self, site: Any, program: Any) -> Any:
        class Other(Soft):
            """Has no `product`."""

        return Other()


def test_a_form_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    monkeypatch.setattr(catalog, "name_of", lambda kind: "plain")
    chosen = Plain(rank=2, weighting="none", targets="*.intermediate.dense")
    with pytest.raises(PlmccError, match=r"it shares its weight with bert\.encoder\.layer\.1"):
        rewrite.replace_all(model, rewrite.match(model, [chosen]))


def test_a_tied_weight_is_one_site_with_its_own_biases(tmp_path: Path) -> None:
    model: Any = tiny("bert")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    nn.init.normal_(layers[1].intermediate.dense.bias)
    expected = model(**inputs("bert")).logits
    plmcc.Pipeline([LowRank(rank=20, weighting="none", targets="*.intermediate.dense")])(model)
    first, second = (layer.intermediate.dense for layer in layers)
    assert isinstance(first, HardLinear)
    assert dict(second.named_parameters()).keys() == {"bias"}
    x = torch.randn(2, 32)
    torch.testing.assert_close(second(x) - second.bias, first(x) - first.bias)
    found = model.eval()(**inputs("bert")).logits
    assert (found - expected).norm() < 0.3 * expected.norm()
    model.save_pretrained(tmp_path)
    again = plmcc.load(tmp_path)
    assert torch.allclose(again(**inputs("bert")).logits, found, atol=1e-6)
