"""Bytes by component, before and after a model is rewritten."""

from __future__ import annotations

import pytest

from plmcc import Pipeline
from plmcc.artifact.size import Inventory
from plmcc.passes.compositional_codes import CompositionalCodes
from support.tiny_models import tiny


@pytest.mark.parametrize("name", ["marian", "mbart", "bart", "t5", "qwen3", "gpt2", "bert"])
def test_a_tied_table_is_one_component_before_and_after(name: str) -> None:
    """Its first name may be another than the one that a pass gives it."""
    model = tiny(name)
    before = Inventory.of(model)
    Pipeline([CompositionalCodes(codebooks=4, codewords=8, rounds=0)])(model)
    (record,) = model.config.quantization_config.records()
    path = record.paths[0]
    sizes = [one.by_component([path]) for one in (before, Inventory.of(model))]
    assert sizes[0][path] > sizes[1][path] > 0
    assert sizes[0].keys() == sizes[1].keys()
    assert {k: v for k, v in sizes[0].items() if k != path} == {
        k: v for k, v in sizes[1].items() if k != path
    }
