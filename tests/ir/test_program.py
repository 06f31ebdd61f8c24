"""Sites of a program, and the targets that name them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, fx, nn

from plmcc.api import AttentionSite, FeedForwardSite, Miss, Site, TableSite
from plmcc.diagnostics import PlmccError
from plmcc.ir.branches import Branch, feed_forward_of, residual_branches
from plmcc.ir.layers import Layer
from plmcc.ir.program import Program
from plmcc.passes.low_rank import LowRank
from support.tiny_models import ENCODERS, NAMES, SEQ2SEQ, VOCAB, tiny

GATED = ("llama", "qwen3", "t5_gated")
PRE_NORM = ("gpt2", "llama", "qwen3", "t5", "t5_gated", "mbart", "whisper")
UNTIED = ("llama", "t5_gated")


S = TypeVar("S", bound=Site)


def table(found: Site) -> TableSite:
    assert isinstance(found, TableSite)
    return found


def sites(found: Sequence[S | Miss]) -> list[S]:
    return [site for site in found if not isinstance(site, Miss)]


def network(name: str) -> FeedForwardSite:
    site = Program(tiny(name)).resolve("feed_forward", "feed_forward").sites[0]
    assert isinstance(site, FeedForwardSite)
    return site


@pytest.mark.parametrize("name", NAMES)
def test_the_token_table_is_one_site_with_all_its_users(name: str) -> None:
    model = tiny(name)
    (site,) = Program(model).resolve("input_embeddings", "embedding", expect=1).sites
    assert site.module is model.get_input_embeddings()
    assert site.roles[0] == "embedding"
    assert ("head" in site.roles) == (name not in UNTIED)
    assert table(site).num_embeddings == VOCAB
    assert table(site).is_input is True
    for path, module in zip(site.paths, site.modules, strict=True):
        assert model.get_submodule(path) is module
        assert module.weight is site.module.weight
    with_weight = [
        path
        for path, module in model.named_modules()
        if vars(module).get("_parameters", {}).get("weight") is site.module.weight
    ]
    assert sorted(site.paths) == sorted(with_weight)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "marian"])
def test_shared_tables_have_four_users(name: str) -> None:
    (site,) = Program(tiny(name)).resolve("output_embeddings", "embedding").sites
    assert sorted(site.roles) == ["embedding", "embedding", "embedding", "head"]
    assert table(site).scale == (torch.tensor(32.0).sqrt().item() if name == "mbart" else 1.0)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_heads_have_a_bias_and_other_tables_are_sites(name: str) -> None:
    found = sites(Program(tiny(name)).tables())
    assert found[0].head_bias is True
    assert found[0].padding_idx == 0
    assert [table(site).is_input for site in found].count(True) == 1
    assert any("position" in site.path for site in found)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("bart", "model.encoder.embed_positions", "does not look up rows by id"),
        ("marian", "model.decoder.embed_positions", "does not look up rows by id"),
        ("whisper", "model.decoder.embed_positions", "does not return one row for each id"),
    ],
)
def test_position_tables_with_their_own_forward_are_misses(
    name: str, path: str, reason: str
) -> None:
    program = Program(tiny(name))
    assert any(m.path == path and reason in m.reason for m in program.tables() if type(m) is Miss)
    with pytest.raises(PlmccError, match=rf"PLM203[\s\S]*{reason}"):
        program.resolve(path, "embedding")
    both = program.resolve("embeddings", "embedding")
    assert path in [miss.path for miss in both.misses]
    assert list(both) == both.sites + both.misses


class _Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class _Reversed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(-1)


@pytest.mark.parametrize("kind", [_Shifted, _Reversed])
def test_a_table_that_computes_more_is_a_miss(kind: type[nn.Embedding]) -> None:
    model = tiny("llama")
    model.set_input_embeddings(kind(VOCAB, 32))
    with pytest.raises(PlmccError, match="computes more than a scaled look-up"):
        Program(model).resolve("input_embeddings", "embedding")


def test_tables_on_the_meta_device() -> None:
    (site,) = Program(tiny("bert").to("meta")).resolve("input_embeddings", "embedding").sites  # type: ignore[arg-type]
    assert table(site).scale == 1.0
    model: Any = tiny("mbart")
    scale = float(model.get_input_embeddings().embed_scale)
    (site,) = Program(model.to("meta")).resolve("input_embeddings", "embedding").sites
    assert table(site).scale == pytest.approx(scale)
    assert scale > 1


@pytest.mark.parametrize("name", NAMES)
def test_linears_are_all_but_the_tied_heads(name: str) -> None:
    model = tiny(name)
    found = sites(Program(model).linears())
    known = {path for site in found for path in site.paths}
    tied = model.get_input_embeddings().weight
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (path in known) == (module.weight is not tied), path
    for site in found:
        shape = (site.out_features, site.in_features)
        weight = site.module.get_parameter("weight")
        assert tuple(weight.shape) == (shape[::-1] if site.transposed else shape)
    assert any(site.transposed for site in found) == (name == "gpt2")


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_its_blocks(name: str) -> None:
    model = tiny(name)
    program = Program(model)
    paths = program.layer_paths()
    assert len(paths) == (4 if name in SEQ2SEQ else 1 if name == "albert" else 2)
    decoders = [path for path in paths if name in SEQ2SEQ and "decoder" in path]
    attention = sites(program.attention())
    assert len(attention) == len(program.attention()) == len(paths) + len(decoders)
    assert [s.layer for s in attention if s.is_cross] == decoders
    networks = sites(program.feed_forward())
    assert [site.layer for site in networks] == paths
    position = "pre" if name in PRE_NORM else "post"
    inside = "inside" if name == "albert" else position
    assert {s.position for s in attention} == {inside}
    assert {s.position for s in networks} == {position}
    for site in (*attention, *networks):
        named = [*site.linears.values(), *([site.norm] if site.norm else [])]
        assert all(model.get_submodule(path) for path in named)


@pytest.mark.parametrize("name", NAMES)
def test_attention_facts_fit_the_projections(name: str) -> None:
    model = tiny(name)
    for site in sites(Program(model).attention()):
        assert isinstance(site, AttentionSite)
        linears, width = site.linears, site.heads * site.head_dim
        assert width == 32
        if name == "gpt2":
            assert linears["qkv"].endswith("c_attn")
            assert not {"q", "k", "v"} & set(linears)
            continue
        shapes = {role: model.get_submodule(linears[role]).weight.shape for role in "qkvo"}
        assert shapes["q"] == shapes["o"] == (width, width)
        assert shapes["k"] == shapes["v"] == (site.kv_heads * site.head_dim, width)
        assert site.kv_heads == (2 if name in ("llama", "qwen3") else site.heads)


def test_an_attention_module_with_further_projections_is_a_miss() -> None:
    model = tiny("bert")
    model.get_submodule("bert.encoder.layer.0.attention.self").query_global = nn.Linear(32, 32)
    (miss,) = (found for found in Program(model).attention() if isinstance(found, Miss))
    assert miss.reason == "its projections are not recognized: query, key, value, query_global"


@pytest.mark.parametrize("name", NAMES)
def test_feed_forward_facts(name: str) -> None:
    model = tiny(name)
    for site in sites(Program(model).feed_forward()):
        assert ("gate" in site.linears) == (name in GATED)
        roles = ["fc1", "gate", "fc2"] if name in GATED else ["fc1", "fc2"]
        assert [site.linears[role] for role in roles] == list(site.paths)
        assert site.modules == tuple(model.get_submodule(path) for path in site.paths)
    expected = {"t5": "ReLU", "llama": "SiLUActivation", "albert": "NewGELUActivation"}
    assert network(name).activation == expected.get(name, network(name).activation)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("t5", "ReLU"), ("llama", "SiLUActivation"), ("albert", "NewGELUActivation")],
)
def test_activations_have_a_name(name: str, activation: str) -> None:
    assert network(name).activation == activation


def test_gate_and_up_are_told_apart_by_the_activation() -> None:
    assert network("llama").linears["gate"] == "model.layers.0.mlp.gate_proj"
    assert network("t5_gated").linears["gate"].endswith("wi_0")


@pytest.mark.parametrize("name", NAMES)
def test_branches_of_a_layer_are_chained(name: str) -> None:
    for layer in Program(tiny(name)).layers():
        assert isinstance(layer, Layer)
        graph_module = layer.graph_module
        graph_module.graph.lint()
        for branch in residual_branches(graph_module):
            assert branch.kind != "other"
            assert branch.input in branch.output.all_input_nodes
            assert branch.nodes[-1] in branch.output.all_input_nodes
            if branch.position == "pre":
                assert branch.norm is branch.nodes[0]
                assert branch.norm is not None
                assert branch.norm.args == (branch.input,)
            else:
                assert branch.norm is not None
                assert branch.norm.args == (branch.output,)


class _Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 8), nn.Linear(8, 4), nn.GELU()
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + (self.b(self.act(self.a(x))) + self.c(x))
        return result


class _FusedGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down, self.act = nn.Linear(4, 16), nn.Linear(8, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.both(x).chunk(2, dim=-1)
        result: Tensor = x + self.down(self.act(parts[0]) * parts[1])
        return result


def branches(module: nn.Module) -> list[tuple[fx.GraphModule, Branch]]:
    traced = fx.symbolic_trace(module)
    return [(traced, branch) for branch in residual_branches(traced)]


@pytest.mark.parametrize("module", [_Parallel(), _FusedGate()])
def test_a_branch_that_holds_more_is_of_another_kind(module: nn.Module) -> None:
    ((traced, branch),) = branches(module)
    assert branch.kind == "other"
    assert branch.position == "none"
    assert feed_forward_of(traced, branch) is None


@pytest.mark.parametrize(
    ("name", "target", "kind", "count"),
    [
        ("bert", "embeddings", "embedding", 3),
        ("bert", "linears", "linear", 13),
        ("bert", "*.query", "linear", 2),
        ("bert", ["*.query", "*.layer.0.*"], "linear", 7),
        ("bert", r"re:.*layer\.[01]\.output\.dense", "linear", 2),
        ("bert", "class:Embedding", "embedding", 3),
        ("bert", "class:BertSelfAttention", "attention", 2),
        ("bert", "cls.predictions.decoder", "embedding", 1),
        ("mbart", "class:MBartScaledWordEmbedding", "embedding", 1),
        ("marian", "decoder", "attention", 4),
        ("marian", "encoder", "feed_forward", 2),
        ("gpt2", "class:Conv1D", "linear", 8),
        ("t5", "attention", "attention", 6),
        ("llama", "output_embeddings", "linear", 1),
        ("llama", "*.gate_proj", "feed_forward", 2),
    ],
)
def test_targets(name: str, target: str | list[str], kind: str, count: int) -> None:
    assert len(Program(tiny(name)).resolve(target, kind, expect=count).sites) == count


def test_overlapping_targets_give_each_site_once_in_the_order_of_the_model() -> None:
    program = Program(tiny("bert"))
    twice = program.resolve(["*.layer.1.*.query", "*.query", "linears"], "linear").sites
    assert [site.path for site in twice] == [s.path for s in sites(program.linears())]


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("bert.embedings.word_embeddings", "embedding", r"nearest: bert\.embeddings\.word_embed"),
        ("input_embedding", "embedding", r"nearest: input_embeddings"),
        ("linears", "embedding", r"`linears` matches nothing of the kind embedding"),
        ("class:BertSelfAtention", "attention", "did you mean `BertSelfAttention`"),
        ("re:(", "linear", "not a regular expression"),
        ("re:layer", "linear", r"PLM201[\s\S]*input_embeddings"),
        ("decoder", "attention", "PLM201"),
        (["*.query", "*.quary"], "linear", r"`\*\.quary` matches nothing"),
        ("", "linear", "no targets are given"),
        ([], "linear", "no targets are given"),
    ],
)
def test_targets_that_match_nothing(target: str | list[str], kind: str, words: str) -> None:
    with pytest.raises(PlmccError, match=words):
        Program(tiny("bert")).resolve(target, kind)


SLOW = [r"(.*)" * 8 + r"\1\2\3\4\5\6\7\8z?(?<=q)", r"(.*?)" * 7 + r"(?<=\1q)"]


@pytest.mark.attack
@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(\w+\.?)+[^\w.]", *SLOW])
def test_an_expression_that_would_take_for_ever_is_stopped(pattern: str) -> None:
    start = time.process_time()
    said = "takes more than 1 s" if pattern in SLOW else "matches nothing"
    with pytest.raises(PlmccError, match=said):
        Program(tiny("bert")).resolve(f"re:{pattern}", "linear")
    assert time.process_time() - start < 10


@pytest.mark.attack
@pytest.mark.parametrize("pattern", ["(" * 500, "(" * 500 + ")" * 500, "[" * 500, "a{99999999999}"])
def test_an_expression_of_brackets_is_a_sentence(pattern: str) -> None:
    with pytest.raises(PlmccError, match="not a regular expression"):
        Program(tiny("bert")).resolve(f"re:{pattern}", "linear")
    with pytest.raises(ValueError, match="not a regular expression"):
        LowRank(targets=f"re:{pattern}", rank=4)


def test_another_number_of_sites_than_expected_lists_them() -> None:
    with pytest.raises(PlmccError, match=r"match 2 sites, expected 1[\s\S]*layer\.0.*layer\.1"):
        Program(tiny("bert")).resolve("*.query", "linear", expect=1)


def test_errors_name_the_place_of_the_targets() -> None:
    with pytest.raises(PlmccError, match=r"^recipe.yaml:7:3: error PLM201"):
        Program(tiny("bert")).resolve("x", "linear", location="recipe.yaml:7:3")


def test_a_linear_that_computes_more_is_a_miss() -> None:
    class Quantized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).round()

    model = tiny("bert")
    model.get_submodule("bert.encoder.layer.0.output").dense = Quantized(64, 32)
    found = Program(model).linears()
    assert [m.reason for m in found if isinstance(m, Miss)] == [
        "Quantized computes more than a linear map"
    ]


def test_blocks_of_layers_that_cannot_be_traced_are_misses() -> None:
    model = tiny("bert")
    layer = model.get_submodule("bert.encoder.layer.1")
    layer.forward = layer.forward
    program = Program(model)
    for found in (program.layers(), program.attention(), program.feed_forward()):
        misses = [miss for miss in found if isinstance(miss, Miss)]
        assert "bert.encoder.layer.1" in [miss.path for miss in misses]
        assert len(found) - len(misses) == 1
