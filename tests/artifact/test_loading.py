"""Every way of loading an artifact gives the model that was saved, or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import plmcc
from plmcc.artifact.verify import first_output
from plmcc.ir.probes import probe_inputs
from plmcc.models.source import Source
from plmcc.pipeline.expected import on_meta
from plmcc.planning.plan import plan
from plmcc.recipe.load import parse_recipe
from plmcc.utils.numerics import relative_difference

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 4,
}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # fused experts: the file of the original has a tensor for each
    "mixtral": ("MixtralForCausalLM", SMALL | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        SMALL
        | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"num_experts_per_tok": 2},
    ),
    # renamed tensors
    "esm": ("EsmForMaskedLM", SMALL | {"vocab_size": 33, "mask_token_id": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    # buffers that no file holds
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gptj": ("GPTJForCausalLM", GPT),
    "openai_gpt": ("OpenAIGPTLMHeadModel", GPT),
    "codegen": ("CodeGenForCausalLM", GPT),
}
PASSES = {
    "codes": "compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}",
    "sparse": "movement_pruning: {method: magnitude, density: 0.5, storage: bitmask}",
    "structured": "movement_pruning: {method: magnitude, granularity: structured, density: 0.5}",
    "dropped": "drop_layers: {keep: 1, select: even}",
    "int8": "quantized_linears: {scheme: int8}",
}


def original(family: str) -> PreTrainedModel:
    name, options = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(3)
    model: Any = kind(kind.config_class(**options))
    model.eval()
    return model  # type: ignore[no-any-return]


@functools.cache
def refusal(family: str, entry: str) -> str:
    """Why the pass refuses the family when it matches; empty if it does not."""
    recipe = parse_recipe(f"plmcc: 1\npasses: [{entry}]\n", load_torch=True)
    made = plan(recipe, Source.of(on_meta(original(family))))
    return made.problems[0].message if made.problems else ""


@pytest.fixture(scope="module", params=[f"{f}-{p}" for f in FAMILIES for p in PASSES])
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    family, _, name = request.param.partition("-")
    if reason := refusal(family, PASSES[name]):
        pytest.skip(f"refused by `plan`: {reason}")
    folder, model = tmp_path_factory.mktemp(family), original(family)
    recipe = parse_recipe(f"plmcc: 1\npasses: [{PASSES[name]}]\n", load_torch=True)
    plmcc.Pipeline(recipe.passes)(model)
    model.save_pretrained(folder)
    return folder, model


def same(found: Any, model: PreTrainedModel) -> None:
    inputs = probe_inputs(model)
    difference = relative_difference(
        first_output(found.eval(), inputs), first_output(model, inputs)
    )
    assert difference <= 1e-5


def by_class(folder: Path, kind: Any) -> Any:
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found


def explicit(folder: Path, kind: Any) -> Any:
    return kind.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))


def own_config(folder: Path, kind: Any) -> Any:
    return kind.from_pretrained(folder, config=kind.config_class.from_pretrained(folder))


def auto(folder: Path, kind: Any) -> Any:
    if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM.from_pretrained(folder)
    return transformers.AutoModelForMaskedLM.from_pretrained(folder)


def saved_again(folder: Path, kind: Any) -> Any:
    again = folder.with_name(f"{folder.name}-again")
    kind.from_pretrained(folder).save_pretrained(again)
    return kind.from_pretrained(again)


@pytest.mark.parametrize("way", [by_class, explicit, own_config, auto, saved_again])
def test_the_same_model_comes_back(
    way: Callable[[Path, Any], Any], artifact: tuple[Path, PreTrainedModel]
) -> None:
    folder, model = artifact
    kind: Any = type(model)
    found = way(folder, kind)
    assert found.config.model_type == kind.config_class.model_type
    same(found, model)


def test_a_base_model_has_the_same_states(artifact: tuple[Path, PreTrainedModel]) -> None:
    folder, model = artifact
    inputs = probe_inputs(model)
    base: Any = model.base_model
    found = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        one, two = (m(**inputs)[0] for m in (base, found))
    assert relative_difference(two, one) <= 1e-5


def test_a_dense_model_takes_no_tensor_of_it(artifact: tuple[Path, PreTrainedModel]) -> None:
    """`from_config` and `load_state_dict`: what a pass changed has other shapes."""
    folder, model = artifact
    config = AutoConfig.from_pretrained(folder)
    modules = getattr(config, "quantization_config", {}).get("modules", [])
    if not any("int8" in str(m) or "codes" in str(m) for m in modules):
        pytest.skip("a pass that leaves ordinary layers")
    kind: Any = type(model)
    dense = kind(kind.config_class(**FAMILIES_OF[kind.__name__]))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        dense.load_state_dict(load_file(folder / "model.safetensors"))


FAMILIES_OF = dict(FAMILIES.values())


def test_a_tied_table_works_where_it_is_offloaded(tmp_path: Path) -> None:
    """The head multiplies by a table that accelerate keeps on disk."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1
    )
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    recipe = parse_recipe(f"plmcc: 1\npasses: [{PASSES['codes']}]\n", load_torch=True)
    plmcc.Pipeline(recipe.passes)(model)
    model.save_pretrained(tmp_path / "out")
    ids = torch.arange(5, 12)[None]
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-6)
