from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.planning.match import Found, find
from plmcc.vectors.keyed import Vectors
from plmcc.vectors.model import model_of
from support.plans import outline_of, run
from support.tiny_models import NAMES, tiny


def paths(found: Found) -> list[tuple[str, str]]:
    return [(hit.kind, hit.path) for hit in found.hits]


def test_a_regex_hits_modules_with_class_shape_and_role() -> None:
    found = find(tiny("bert"), r"re:.*\.query")
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert paths(found) == [("linear", name) for name in names]
    assert {(hit.module, hit.shape, hit.role) for hit in found.hits} == {
        ("Linear", (32, 32), "module")
    }
    assert found.proposals == ()


def test_tied_paths_have_a_role_each() -> None:
    found = find(tiny("gpt2"), "input_embeddings")
    assert [(hit.path, hit.role) for hit in found.hits] == [
        ("transformer.wte", "embedding"),
        ("lm_head", "head"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_proposal_hits_as_many_sites_as_it_says(name: str) -> None:
    model = tiny(name)
    found, program = find(model), Program(model)
    assert found.hits == ()
    assert {proposal.kind for proposal in found.proposals} == set(program.kinds())
    for proposal in found.proposals:
        sites = program.resolve(proposal.pattern, proposal.kind).sites
        assert len(sites) == proposal.sites, proposal


def test_a_path_that_is_an_alias_is_proposed_once() -> None:
    model, _ = model_of(Vectors(["a", "b"], np.eye(2, dtype=np.float32)))
    proposed = [proposal.pattern for proposal in find(model).proposals]
    assert sorted(proposed) == ["embeddings", "input_embeddings"]


def test_what_cannot_be_rewritten_says_why() -> None:
    found = find(tiny("bart"), "*embed_positions")
    assert {hit.kind for hit in found.hits} == {"embedding"}
    assert all(len(hit.reason.split()) > 3 for hit in found.hits)
    assert found.proposals


def test_a_pattern_that_hits_nothing_brings_the_nearest() -> None:
    found = find(tiny("bert"), "bert.encoder.layer.0.attention.self.quary")
    assert found.hits == ()
    assert "bert.encoder.layer.0.attention.self.query" in " ".join(found.nearest)
    assert "did you mean `Linear`" in " ".join(find(tiny("bert"), "class:Liner").nearest)


def test_a_broken_regex_is_an_error() -> None:
    with pytest.raises(PlmccError, match="not a regular expression"):
        find(tiny("bert"), "re:(")


def test_the_command_reads_no_weights(tmp_path: Path) -> None:
    folder = outline_of("llama", tmp_path)
    done = run("match", folder, "class:LlamaAttention", "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [hit["path"] for hit in found["hits"]] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    missed = run("match", folder, "nothing")
    assert missed.returncode == 1
    assert "PLM201" in missed.stderr
    assert r"re:model\.layers\.\d+" in missed.stdout
