"""Tokens with cache and without may differ where two are equally likely, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plmcc.artifact import verify
from plmcc.ir.probes import probe_inputs
from plmcc.testing.tiny import tiny
from support import script


@pytest.mark.parametrize(("shift", "same"), [(1e-6, True), (0.5, False)])
def test_a_tie_is_no_difference(shift: float, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(_: object, __: object, *, use_cache: bool, **told: bool) -> Any:
        logits = torch.tensor([[0.1, 2.0, 2.0 - 1e-7]])
        logits[0, 2] += shift if use_cache else 0.0
        tokens: Tensor = torch.tensor([[5, 2 if use_cache else 1]])
        return SimpleNamespace(sequences=tokens, logits=(logits,)) if told else tokens

    monkeypatch.setattr(verify, "_generated", generated)
    model = tiny("gpt2")
    assert verify.same_with_cache(model, probe_inputs(model)) == same


def test_a_model_whose_tokens_agree_by_chance_is_known() -> None:
    """CPM-Ant computes other logits with its cache, in transformers itself."""
    model = script("benchmarks/zoo.py").build("cpmant")
    assert verify.same_with_cache(model, probe_inputs(model))
    assert not verify.caches_exactly(model, probe_inputs(model))
    assert verify.caches_exactly(tiny("gpt2"), probe_inputs(tiny("gpt2")))
