"""Kernels for 2:4 sparsity in compiled models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import plmcc
from plmcc.inference.compile import two_of_four
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.rewrite import harden_all, match, replace_all
from support.tiny_models import inputs, tiny


def test_the_pattern_is_seen() -> None:
    model = tiny("bert")
    linear = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert isinstance(linear, torch.nn.Linear)
    assert not two_of_four(linear.weight)
    passes = [MovementPruning(method="magnitude", granularity="2:4")]
    harden_all(model, replace_all(model, match(model, passes)))
    linear = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert isinstance(linear, torch.nn.Linear)
    assert two_of_four(linear.weight)
    # Two of the first four and one of the next would do too; three of four do not.
    linear.weight.data[3, 4:8] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert not two_of_four(linear.weight)
    assert not two_of_four(torch.zeros(4, 6))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with kernels for 2:4 sparsity",
)
def test_a_compiled_model_runs_through_them() -> None:
    linear = torch.nn.Linear(128, 64).to("cuda", torch.float16)
    weight = linear.weight.data.view(64, -1, 4)
    weight.scatter_(2, weight.abs().topk(2, dim=2, largest=False).indices, 0)
    model: Any = tiny("bert").half().cuda()
    model.bert.encoder.layer[0].extra = linear
    states = torch.randn(8, 128, device="cuda", dtype=torch.float16)
    expected = copy.deepcopy(linear)(states)
    plmcc.compile(model)
    assert type(linear.weight.data).__name__.startswith("SparseSemiStructured")
    assert torch.allclose(linear(states), expected, atol=1e-2)
    given = {name: value.to("cuda") for name, value in inputs("bert").items()}
    with torch.no_grad():
        assert torch.isfinite(model(**given).logits).all()
