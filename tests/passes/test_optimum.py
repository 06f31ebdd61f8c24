from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plmcc
from plmcc.api import Miss
from plmcc.artifact.verify import outputs
from plmcc.passes.optimum import Optimum
from support.tiny_models import inputs, tiny

OPTIONS = {"transformation": "MergeLinears"}


def test_merging_gate_and_up_keeps_the_function_and_removes_two_linears() -> None:
    model = tiny("llama")
    before = outputs(model, inputs("llama"))
    plmcc.Pipeline([Optimum()])(model)
    after = outputs(model, inputs("llama"))
    assert torch.allclose(before["output"], after["output"], atol=1e-5)
    assert torch.equal(before["tokens"], after["tokens"])
    names = {name.split("mlp.")[1] for name in model.state_dict() if "mlp." in name}
    assert not {"gate_proj.weight", "up_proj.weight"} & names
    assert any("merged" in name for name in names)


@pytest.mark.parametrize("name", ["bert", "marian", "whisper"])
def test_fusing_biases_keeps_the_function_after_a_reload(name: str, tmp_path: Path) -> None:
    model, batch = tiny(name), inputs(name)
    before = outputs(model, batch)["output"]
    plmcc.Pipeline([Optimum(transformation="FuseBiasInLinear")])(model)
    model.save_pretrained(tmp_path)
    again = plmcc.load(tmp_path)
    assert torch.allclose(before, outputs(again, batch)["output"], atol=1e-5)


def test_layers_without_anything_to_do_are_misses_with_a_reason() -> None:
    found = list(Optimum().match(plmcc.Program(tiny("gpt2"))))
    assert found
    for miss in found:
        assert isinstance(miss, Miss)
        assert "applies nowhere" in miss.reason


def test_an_unknown_transformation_names_the_nearest() -> None:
    with pytest.raises(plmcc.PlmccError, match="MergeLinears"):
        plmcc.Pipeline([Optimum(transformation="MergeLinear")])(tiny("llama"))


def test_only_targeted_layers_change() -> None:
    model = tiny("llama")
    plmcc.Pipeline([Optimum(targets="model.layers.1", expect=1)])(model)
    names = [name for name in model.state_dict() if "merged" in name]
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
