from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plmcc.data.pooling import Pooling
from plmcc.recipe.load import Distill
from plmcc.training.distillation import Distillation
from plmcc.utils import numerics
from plmcc.utils.numerics import by_rows
from support.tiny_models import tiny


class Largest(TorchDispatchMode):
    """Notes the elements of the largest float32 tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        floats = [
            x for x in tree_leaves(made) if isinstance(x, Tensor) and x.dtype.is_floating_point
        ]
        sizes = [x.numel() for x in floats if x.dtype is torch.float32]
        self.elements = max([self.elements, *sizes])
        return made


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps, by storage."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield kept


def test_parts_are_all_rows_in_order() -> None:
    one, two = torch.randn(10, 3, 2), torch.arange(10)
    parts = list(by_rows(one, two, elements=20))
    assert [len(part[0]) for part in parts] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([part[0] for part in parts]), one)
    assert torch.equal(torch.cat([part[1] for part in parts]), two)
    assert [len(part[0]) for part in by_rows(one, elements=1)] == [1] * 10


def test_logits_of_a_large_vocabulary_are_compared_by_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same loss and gradient as at once, with no float32 copy of all logits."""
    rows, vocabulary = 512, 4096
    monkeypatch.setattr(numerics.by_rows, "__kwdefaults__", {"elements": 16 * vocabulary})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, rows // 2, vocabulary, generator=generator).bfloat16() for _ in range(2)
    )
    student.requires_grad_()
    mask_BL = torch.ones(2, rows // 2, dtype=torch.long)
    mask_BL[1, 100:] = 0
    model = tiny("gpt2")
    distill = Distillation(model, model, Distill(logits=1.0, temperature=2.0), Pooling(), "")
    seen = Largest()  # type: ignore[no-untyped-call]
    with seen, kept_bytes() as kept:
        found = distill.loss({"attention_mask": mask_BL}, {"logits": student}, {"logits": teacher})
        (gradient,) = torch.autograd.grad(found, student)
    assert seen.elements <= 32 * vocabulary
    assert sum(kept.values()) < 2.1 * student.nbytes  # the logits of both, as they are
    log_s, log_t = ((x.float() / 2).log_softmax(-1) for x in (student, teacher))
    each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    expected = 4 * each[mask_BL.bool()].mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (plain,) = torch.autograd.grad(expected, student)
    assert torch.allclose(gradient.float(), plain.float(), rtol=2e-2, atol=1e-9)
