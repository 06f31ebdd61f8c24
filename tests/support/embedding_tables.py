"""Embedding tables for the tests of passes: toy tables, sites, and what every table must satisfy.

Import as `from tables import ...`: `tests` is on pytest's path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.api import Pass, TableSite
from plmcc.artifact import format as artifact
from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.kit.tables import CompressedTable
from support.tiny_models import tiny


def toy(rows: int = 2000, dims: int = 32, rank: int = 10) -> Tensor:
    """Rows of a low rank, with noise; standard deviation about 1."""
    random = torch.Generator().manual_seed(0)
    latent: Tensor = torch.randn(rows, rank, generator=random)
    mix = torch.randn(rank, dims, generator=random) / rank**0.5
    table_VD: Tensor = latent @ mix + 0.2 * torch.randn(rows, dims, generator=random)
    return table_VD


PROGRAM = Program(tiny("bert"))
"""Passes on tables look at no more than the table."""


def site(table_VD: Tensor, **known: Any) -> TableSite:
    module = nn.Embedding.from_pretrained(table_VD)
    shape = {"num_embeddings": len(table_VD), "embedding_dim": table_VD.shape[1]}
    return TableSite("embedding", ("table",), ("embedding",), (module,), **shape | known)


def replaced(model: Any, *passes: Pass) -> list[rewrite.Replacement]:
    return rewrite.replace_all(model, rewrite.match(model, passes))


def hardened(model: Any, *passes: Pass) -> list[rewrite.Replacement]:
    done = replaced(model, *passes)
    artifact.adopt(model, rewrite.harden_all(model, done))
    return done


def refused(model: Any, *passes: Pass) -> Any:
    with pytest.raises(PlmccError) as caught:
        replaced(model, *passes)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def gemma() -> PreTrainedModel:
    """A model whose table is multiplied by √D when rows are looked up."""
    config = hf.Gemma3TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        max_position_embeddings=48,
    )
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(config).eval()  # type: ignore[no-any-return]


def check_calls(module: CompressedTable, table_VD: Tensor, parameters: Sequence[Tensor]) -> None:
    """Lookup and head against a dense table made of the same parameters, gradients included.

    `table_VD` is computed from `parameters` by the test, without padding.
    """
    rows, dims = table_VD.shape
    zero = module.padding_idx if module.zero_padding else None
    if zero is not None:
        table_VD = table_VD * (torch.arange(rows) != zero)[:, None]
    own = list(module.parameters())
    torch.testing.assert_close(module.weight, table_VD, rtol=1e-4, atol=1e-5)
    for ids in (torch.randint(0, rows, (2, 3, 4)), torch.tensor(7), torch.arange(rows)):
        given = torch.randn(*ids.shape, dims)
        looked = F.embedding(ids, table_VD, padding_idx=module.padding_idx) * module.scale
        torch.testing.assert_close(module(ids), looked, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad((module(ids) * given).sum(), own)
        theirs = torch.autograd.grad((looked * given).sum(), parameters, retain_graph=True)
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, dims)
    hidden, other = (torch.randn(2, 3, dims, requires_grad=True) for _ in range(2))
    other.data.copy_(hidden.data)
    given = torch.randn(2, 3, rows)
    logits, expected = module.attend(hidden), other @ table_VD.T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad((logits * given).sum(), [hidden, *own])
    theirs = torch.autograd.grad((expected * given).sum(), [other, *parameters])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
