from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

import plmcc
from plmcc.api import Pass
from plmcc.artifact.verify import outputs
from plmcc.ir.program import Program
from plmcc.passes.compressed_attention import CompressedAttention
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.passes.quantized_linears import QuantizedLinears
from plmcc.passes.share_layers import ShareLayers
from support.tiny_models import inputs, tiny

OPTIONS = {"initialize_from": "mean"}


def bert(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = BertModel(config)
    model.eval()
    return model


def values(model: nn.Module, layer: int) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.get_submodule(f"encoder.layer.{layer}").parameters()]


@pytest.mark.parametrize(
    ("groups", "owners"), [(1, [0, 0, 0, 0, 0]), (2, [0, 0, 0, 3, 3]), (4, [0, 0, 2, 3, 4])]
)
def test_groups_are_consecutive_and_begin_with_the_mean(groups: int, owners: list[int]) -> None:
    model = bert(5)
    before = [values(model, layer) for layer in range(5)]
    plmcc.Pipeline([ShareLayers(groups=groups, initialize_from="mean")])(model)
    for layer, owner in enumerate(owners):
        own = values(model, layer)
        assert bool(own) == (layer == owner)
        members = [before[i] for i, first in enumerate(owners) if first == owner]
        for value, *each in zip(own, *members, strict=False):
            torch.testing.assert_close(value, torch.stack(each).mean(0))


def test_it_computes_what_a_model_with_equal_layers_does() -> None:
    model, equal = bert(3), bert(3)
    plmcc.Pipeline([ShareLayers()])(model)
    for layer in (1, 2):
        equal.get_submodule(f"encoder.layer.{layer}").load_state_dict(
            equal.get_submodule("encoder.layer.0").state_dict()
        )
    given = {"input_ids": torch.arange(12).view(2, 6)}
    one, two = (outputs(m, given)["output"] for m in (model, equal))
    torch.testing.assert_close(one, two)


def test_gradients_of_all_layers_add_up() -> None:
    model, equal = bert(2), bert(2)
    plmcc.Pipeline([ShareLayers()])(model)
    first, second = (equal.get_submodule(f"encoder.layer.{i}") for i in (0, 1))
    second.load_state_dict(first.state_dict())
    given = {"input_ids": torch.arange(12).view(2, 6)}
    for one in (model, equal):
        one(**given).last_hidden_state.square().sum().backward()
    shared = dict(model.get_submodule("encoder.layer.0").named_parameters())
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(shared[name].grad, a.grad + b.grad)


LATER = {
    "quantized": QuantizedLinears(),
    "pruned": MovementPruning(method="magnitude", granularity="structured", density=0.5),
    "sparse": MovementPruning(method="magnitude", density=0.5, storage="bitmask"),
}


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
@pytest.mark.parametrize("later", LATER)
def test_shared_layers_are_one_site_of_later_passes(name: str, later: str, tmp_path: Path) -> None:
    model, given = tiny(name), inputs(name)
    plmcc.Pipeline([ShareLayers(initialize_from="mean")])(model)
    plmcc.Pipeline([LATER[later]])(model)
    model.save_pretrained(tmp_path)
    again = plmcc.load(tmp_path)
    one, two = (outputs(m, given) for m in (model, again))
    assert torch.allclose(one["output"], two["output"], atol=1e-5)
    assert again.state_dict().keys() == model.state_dict().keys()
    stored = {n: v for n, v in load_file(tmp_path / "model.safetensors").items() if v.numel()}
    members = Program(model).sharing()
    assert members
    assert not [n for n in stored if any(n.startswith(f"{path}.") for path in members)]


@pytest.mark.parametrize(
    "later", [DropLayers(targets="layers", keep=1), CompressedAttention(initialization="random")]
)
def test_what_needs_layers_of_their_own_is_refused(later: Pass) -> None:
    model = tiny("marian")
    plmcc.Pipeline([ShareLayers()])(model)
    with pytest.raises(plmcc.PlmccError, match=r"shares? (its )?tensors"):
        plmcc.Pipeline([later])(model)


def test_other_layers_are_refused() -> None:
    model = bert(3)
    odd = model.get_submodule("encoder.layer.2.output")
    odd.dense = nn.Linear(16, 16)
    with pytest.raises(
        plmcc.PlmccError, match=r"layers 0 and 2 are not alike: output\.dense\.weight"
    ):
        plmcc.Pipeline([ShareLayers()])(model)
    with pytest.raises(plmcc.PlmccError, match="it has 3 layers, not more"):
        plmcc.Pipeline([ShareLayers(groups=3)])(bert(3))
    quantized = bert(3)
    plmcc.Pipeline([QuantizedLinears()])(quantized)
    with pytest.raises(plmcc.PlmccError, match="share them in an earlier stage"):
        plmcc.Pipeline([ShareLayers(initialize_from="mean")])(quantized)


def test_layers_of_one_module_are_refused() -> None:
    with pytest.raises(plmcc.PlmccError, match="it has 1 layers"):
        plmcc.Pipeline([ShareLayers()])(tiny("albert"))
