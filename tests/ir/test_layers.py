"""Layers traced to graphs and put back: the model has to behave exactly as before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from optimum.fx.optimization import (
    ChangeTrueDivToMulByInverse,
    FuseBiasInLinear,
    MergeLinears,
    Transformation,
    compose,
)
from torch import Tensor, fx, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from plmcc.api import Miss
from plmcc.diagnostics import PlmccError
from plmcc.ir.branches import residual_branches
from plmcc.ir.layers import Layer, original_class, trace_layer
from plmcc.ir.modules import checkpoint_activations
from plmcc.ir.probes import probe_inputs
from plmcc.ir.program import Program
from plmcc.passes.optimum.transform import apply_transformation, transformation_named
from support.tiny_models import GENERATIVE, NAMES, inputs, prompt, tiny


def put_back(model: PreTrainedModel) -> PreTrainedModel:
    layers = Program(model).layers()
    assert layers
    for layer in layers:
        assert isinstance(layer, Layer), layer
        layer.put_back()
        assert type(layer.module) is not original_class(layer.module)
    return model


def leaves(output: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        yield from ((name, part) for part in values if isinstance(part, Tensor))


def assert_same(expected: Any, actual: Any) -> None:
    one, two = list(leaves(expected)), list(leaves(actual))
    assert [name for name, _ in one] == [name for name, _ in two]
    for (name, a), (_, b) in zip(one, two, strict=True):
        assert torch.equal(a, b), name


def generate(model: Any, **options: Any) -> Any:
    return model.generate(**options)


def gradients(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    given = inputs(name)
    labels = given.get("decoder_input_ids", given.get("input_ids"))
    torch.manual_seed(1)
    model.train()(**given, labels=labels).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def assert_same_gradients(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert torch.equal(gradient, two[name]), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_bit_identical(name: str, attention: str) -> None:
    if attention == "sdpa" and name == "t5":
        pytest.skip("covered by t5_gated")
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    before = tiny(name, attention=attention)
    after = put_back(tiny(name, attention=attention))
    with torch.no_grad():
        assert_same(before(**inputs(name), **options), after(**inputs(name), **options))


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("DebertaV2", "MaskedLM", {}),  # decides by `output_attentions`
        ("OPT", "CausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # reshapes inside
        ("GPTNeoX", "CausalLM", {}),  # parallel attention and feed-forward
        ("Gemma2", "CausalLM", {"head_dim": 8, "num_key_value_heads": 2}),  # four norms
        ("Mixtral", "CausalLM", {"num_local_experts": 2, "num_key_value_heads": 2}),
        ("Phi3", "CausalLM", {"pad_token_id": 0}),  # fused gate and up projection
    ],
)
def test_other_architectures_are_exact(name: str, head: str, options: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**_SMALL, **options)
    model = getattr(transformers, f"{name}For{head}")(config).train(False)
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False)
        assert_same(expected, put_back(model)(ids, output_hidden_states=True, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", GENERATIVE)
def test_generate_gives_the_same_tokens(name: str, options: dict[str, Any]) -> None:
    # Tiny models repeat one token; forbidding that makes the tokens depend on small differences.
    settings = {"max_length": None, "max_new_tokens": 5, "no_repeat_ngram_size": 1, **options}
    settings |= {"min_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    expected, actual = (
        generate(model, **prompt(name), **settings) for model in (tiny(name), put_back(tiny(name)))
    )
    assert expected.sequences.unique().numel() > 4
    assert torch.equal(expected.sequences, actual.sequences)
    for one, two in zip(expected.scores, actual.scores, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(name: str) -> None:
    assert_same_gradients(gradients(tiny(name), name), gradients(put_back(tiny(name)), name))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_works(name: str) -> None:
    before, after = tiny(name), put_back(tiny(name))
    if not after.supports_gradient_checkpointing:
        pytest.skip("not a feature of this model")
    for model in (before, after):
        checkpoint_activations(model)
    calls = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    layer = Program(after).layer(Program(after).layer_paths()[0])
    assert isinstance(layer, Layer)
    linear = next(m for m in layer.module.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    linear.register_forward_hook(count)
    assert_same_gradients(gradients(before, name), gradients(after, name))
    # ALBERT's blocks are not checkpointed by transformers, and it runs its one block twice.
    assert calls == 2, "the block has to be computed again in the backward pass"


@pytest.mark.parametrize("name", NAMES)
def test_dropout_follows_the_mode(name: str) -> None:
    before, after = tiny(name, dropout=0.3), put_back(tiny(name, dropout=0.3))
    for model in (before, after):
        model.train()
    outputs: list[Any] = []
    with torch.no_grad():
        for model in (before, after):
            torch.manual_seed(3)
            outputs.append(model(**inputs(name)))
        assert_same(*outputs)
        expected = before.train(False)(**inputs(name))
        assert not torch.equal(outputs[0].logits, expected.logits)
        assert_same(expected, after.train(False)(**inputs(name)))


@pytest.mark.parametrize("name", ["bart", "marian", "whisper"])
def test_modules_that_a_graph_adds_take_over_the_mode(name: str) -> None:
    with torch.no_grad():
        expected = tiny(name, dropout=0.3)(**inputs(name))
        assert_same(expected, put_back(tiny(name, dropout=0.3))(**inputs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_classes_stay(name: str) -> None:
    before, after = tiny(name), put_back(tiny(name))
    assert list(before.state_dict()) == list(after.state_dict())
    for path in Program(after).layer_paths():
        old, new = before.get_submodule(path), after.get_submodule(path)
        assert isinstance(new, type(old))
        assert type(new).__name__ == type(old).__name__
        assert type(new).__qualname__ == type(old).__qualname__


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_other_dtypes_work(name: str) -> None:
    before, after = tiny(name), copy.deepcopy(put_back(tiny(name)))
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(name).items()}
    with torch.no_grad():
        assert_same(before(**inputs(name)), after(**inputs(name)))
        assert_same(before.bfloat16()(**given), after.bfloat16()(**given))


@pytest.mark.parametrize("name", ["t5", "t5_gated", "mbart", "whisper", "llama"])
def test_half_precision_takes_its_own_path(name: str) -> None:
    before, after = tiny(name), put_back(tiny(name))
    for module in (before, after):
        nn.Module.to(module, torch.float16)
    given = {k: v.half() if v.is_floating_point() else v for k, v in inputs(name).items()}
    with torch.no_grad():
        assert_same(before(**given), after(**given))


def test_save_and_load(tmp_path: Path) -> None:
    model = put_back(tiny("bert"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert_same(model(**inputs("bert")), loaded(**inputs("bert")))
    put_back(tiny("bert")).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "marian"])
def test_torch_compile_without_graph_breaks(name: str) -> None:
    before, after = tiny(name, attention="sdpa"), put_back(tiny(name, attention="sdpa"))
    options = {} if name == "bert" else {"use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(after, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = before(**inputs(name), **options).logits
        assert torch.allclose(expected, compiled(**inputs(name), **options).logits, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_undo_restores_the_class(name: str) -> None:
    model = tiny(name)
    layers = [layer for layer in Program(model).layers() if isinstance(layer, Layer)]
    modules = [path for path, _ in model.named_modules()]
    for undo in [layer.put_back() for layer in layers]:
        undo()
    assert [path for path, _ in model.named_modules()] == modules
    assert all(type(layer.module) is original_class(layer.module) for layer in layers)


def test_a_layer_that_was_put_back_can_be_traced_again() -> None:
    model = put_back(put_back(tiny("t5")))
    again = Program(copy.deepcopy(model)).layers()
    first = again[0]
    assert isinstance(first, Layer)
    assert len(first.variants) == 2
    assert first.graph_module.get_submodule("layer.0.SelfAttention") is (
        first.module.get_submodule("layer.0.SelfAttention")
    )
    with torch.no_grad():
        assert_same(tiny("t5")(**inputs("t5")), model(**inputs("t5")))


def test_a_rewritten_graph_runs_and_its_module_is_part_of_the_model() -> None:
    model = tiny("marian")
    program = Program(model)
    path = "model.decoder.layers.1"
    layer = program.layer(path)
    assert isinstance(layer, Layer)
    graph_module = layer.copy().graph_module
    cross = next(b for b in residual_branches(graph_module) if b.kind == "cross_attention")
    graph_module.add_submodule("shortcut", nn.Linear(32, 32))
    with graph_module.graph.inserting_before(cross.output):
        new = graph_module.graph.call_module("shortcut", (cross.input,))
    cross.output.replace_all_uses_with(new)
    for node in (cross.output, *reversed(cross.nodes)):
        graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
    undo = layer.only(graph_module).put_back()
    assert f"{path}.shortcut.weight" in model.state_dict()
    assert not any(key.startswith(f"{path}.encoder_attn.") for key in model.state_dict())
    model(**inputs("marian"))
    with pytest.raises(PlmccError, match=r"no code for this kind of call[\s\S]*=None"):
        model.get_submodule(path)(torch.zeros(1, 2, 32))
    undo()
    with torch.no_grad():
        assert_same(tiny("marian")(**inputs("marian")), model(**inputs("marian")))


def test_hooks_of_modules_inside_a_layer_still_fire() -> None:
    model = tiny("bert")
    seen: list[str] = []
    inner = model.get_submodule("bert.encoder.layer.0.intermediate")
    inner.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    put_back(model)(**inputs("bert"))
    assert seen == ["BertIntermediate"]


def test_a_hook_that_changes_an_output_inside_a_layer_is_an_error() -> None:
    model = put_back(tiny("t5"))
    inner = model.get_submodule("encoder.block.0.layer.0")
    inner.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(
        RuntimeError, match="a forward hook changes the output of T5LayerSelfAttention"
    ):
        model(**inputs("t5"))


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def linear(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class _ReadsKwargs(_Base):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x if kwargs.get("skip") else self.linear(x)


class _LooksAtValues(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class _TrainsDifferently(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.training else x


class _TakesAnything(_Base):
    def forward(self, *x: Tensor) -> Tensor:
        return self.linear(x[0])


class _LooksAtOtherDtype(_Base):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) if mask.dtype == torch.bool else x


class _Expert(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class _HoldsUntraceable(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.expert = _Expert()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.expert(self.linear(x))
        return result


class _BranchesOnNone(_Base):
    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        x = self.linear(x) if y is None else x + y
        return x if z is None else x * z


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_ReadsKwargs(), r"_ReadsKwargs.forward looks into `\*\*kwargs`"),
        (_LooksAtValues(), "decides by the value of `gt`"),
        (_TrainsDifferently(), "another path in training"),
        (_TakesAnything(), "a graph cannot express"),
        (_LooksAtOtherDtype(), "looks at the dtype of `mask`, not of `x`"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_traced_says_why(module: nn.Module, reason: str) -> None:
    found = trace_layer(module, "model.layers.3")
    assert isinstance(found, Miss), found
    assert found.path == "model.layers.3"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_a_forward_replaced_on_the_instance_is_a_miss() -> None:
    module = _BranchesOnNone()
    module.forward = lambda x: x  # type: ignore[method-assign,assignment,misc]
    found = trace_layer(module)
    assert isinstance(found, Miss)
    assert "replaced on the instance" in found.reason


def test_a_module_inside_that_cannot_be_traced_is_a_leaf() -> None:
    plain, module = _HoldsUntraceable(), _HoldsUntraceable()
    module.load_state_dict(plain.state_dict())
    layer = trace_layer(module)
    assert isinstance(layer, Layer)
    assert [n.target for n in layer.graph_module.graph.nodes if n.op == "call_module"] == [
        "inner",
        "expert",
    ]
    layer.put_back()
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        assert torch.equal(plain(x), module(x))


def test_every_combination_of_absent_arguments_has_its_graph() -> None:
    plain, module = _BranchesOnNone(), _BranchesOnNone()
    module.load_state_dict(plain.state_dict())
    layer = trace_layer(module)
    assert isinstance(layer, Layer)
    assert layer.branches == ("y", "z")
    assert len(layer.variants) == 4
    layer.put_back()
    x = torch.randn(2, 4)
    for y in (None, x):
        for z in (None, x + 1):
            assert torch.equal(plain(x, y, z=z), module(x, y, z=z))


class _BranchesInBranches(_Base):
    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        if y is not None:
            return x + y
        return self.linear(x) if z is None else x * z


class _Switches(_Base):
    def forward(self, x: Tensor, twice: bool = False, y: Tensor | None = None) -> Tensor:
        x = self.linear(self.linear(x)) if twice else self.linear(x)
        return x if y is None else x + y


def test_an_argument_that_matters_only_without_another_is_found() -> None:
    plain, module = _BranchesInBranches(), _BranchesInBranches()
    module.load_state_dict(plain.state_dict())
    layer = trace_layer(module)
    assert isinstance(layer, Layer)
    layer.put_back()
    x = torch.randn(2, 4)
    for y in (None, x):
        for z in (None, x + 1):
            assert torch.equal(plain(x, y, z), module(x, y, z))


def test_switches_have_a_graph_for_each_value() -> None:
    plain, module = _Switches(), _Switches()
    module.load_state_dict(plain.state_dict())
    layer = trace_layer(module)
    assert isinstance(layer, Layer)
    assert len(layer.variants) == 4
    layer.put_back()
    x = torch.randn(2, 4)
    assert torch.equal(plain(x), module(x))
    assert torch.equal(plain(x, True), module(x, True))
    assert torch.equal(plain(x, twice=True, y=x), module(x, twice=True, y=x))


def test_a_call_that_the_layer_itself_refuses_stays_an_error() -> None:
    model = put_back(tiny("gpt2"))
    with pytest.raises(PlmccError, match=r"encoder_hidden_states.*GPT2Block"):
        model(**inputs("gpt2"), encoder_hidden_states=torch.zeros(3, 4, 32))


MERGED, FUSED = ("llama", "qwen3", "t5_gated"), ("bert", "albert", "marian", "whisper")


@pytest.mark.parametrize("name", MERGED)
def test_merge_linears_in_gated_networks(name: str) -> None:
    model, expected = tiny(name), tiny(name)
    done = apply_transformation(Program(model), MergeLinears())
    assert done == Program(model).layer_paths()
    keys = list(model.state_dict())
    assert any("merged" in key for key in keys)
    assert not any(part in key for key in keys for part in ("up_proj.", "gate_proj.", "wi_0."))
    with torch.no_grad():
        a, b = expected(**inputs(name)).logits, model(**inputs(name)).logits
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    given = {**prompt(name), "max_new_tokens": 5, "max_length": None}
    assert torch.equal(generate(expected, **given), generate(model, **given))


@pytest.mark.parametrize("name", FUSED)
def test_fuse_bias_and_compositions(name: str) -> None:
    model, expected = tiny(name), tiny(name)
    both = compose(ChangeTrueDivToMulByInverse(), FuseBiasInLinear())
    done = apply_transformation(Program(model), both, paths=Program(model).layer_paths()[:1])
    assert done == Program(model).layer_paths()[:1]
    with torch.no_grad():
        a, b = expected(**inputs(name)).logits, model(**inputs(name)).logits
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    fused = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None]
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in fused)
    layer = Program(model).layer(done[0])
    assert isinstance(layer, Layer)
    layer.graph_module.graph.lint()


class _Doubles(Transformation):  # type: ignore[misc]
    """Wrong on purpose, and only in the second of the layers it sees."""

    def __init__(self, attribute: str = "") -> None:
        self.seen = 0
        self.attribute = attribute

    def transform(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        self.seen += 1
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        with graph_module.graph.inserting_before(output):
            factor = 2 if self.seen == 2 else 1
            (value,) = output.args
            node = graph_module.graph.call_method("mul", (value, factor))
            if self.attribute:
                node = graph_module.graph.call_method(self.attribute, (node,))
        output.args = (node,)
        return graph_module


@pytest.mark.parametrize(
    ("attribute", "words"),
    [("", r"outputs differ by .* of their scale"), ("missing", "no attribute 'missing'")],
)
def test_a_transformation_that_changes_results_is_undone(attribute: str, words: str) -> None:
    model, expected = tiny("bert"), tiny("bert")
    first = 1 if attribute else 2
    location = f"bert.encoder.layer.{first - 1}: error PLM203"
    with pytest.raises(PlmccError, match=rf"{location}[\s\S]*{words}"):
        apply_transformation(Program(model), _Doubles(attribute))
    assert type(model.get_submodule("bert.encoder.layer.0")).__bases__[0] is not original_class(
        model.get_submodule("bert.encoder.layer.0")
    )
    with torch.no_grad():
        assert_same(expected(**inputs("bert")), model(**inputs("bert")))


def test_a_transformation_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(PlmccError, match="MergeLinears changed none of 2 layers"):
        apply_transformation(Program(tiny("bert")), MergeLinears())
    with pytest.raises(PlmccError, match=r"did you mean `model\.layers\.1`"):
        apply_transformation(Program(tiny("llama")), MergeLinears(), paths=["model.layer.1"])


def test_transformations_by_name() -> None:
    assert isinstance(transformation_named("MergeLinears"), MergeLinears)
    with pytest.raises(PlmccError, match="did you mean `MergeLinears`"):
        transformation_named("MergeLinear")


@pytest.mark.parametrize("name", NAMES)
def test_probe_inputs_fit_the_model(name: str) -> None:
    model = tiny(name)
    assert model(**probe_inputs(model)).logits.shape[0] == 2
