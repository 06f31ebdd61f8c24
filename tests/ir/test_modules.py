from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from plmcc.ir.modules import cache_argument, is_attention, output_depth, stack_depths
from support.tiny_models import GENERATIVE, NAMES, SEQ2SEQ, tiny


def renamed(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class Asked(nn.Module):
    @renamed
    def forward(self, x: Tensor, memory: Any = None, **kwargs: Any) -> Tensor:
        past = 0 if memory is None else memory.get_seq_length(0)
        kwargs.update(past=past)
        return x + past


class Unknown(nn.Module):
    def forward(self, x: Tensor, cache: Any = None, past_key_values: Any = None) -> Tensor:
        return x if cache is None else x + cache.sum() + past_key_values


def typed(annotation: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, state: Any = None) -> Tensor:
        return x

    forward.__annotations__ = {"x": Tensor, "state": annotation}
    return type("Typed", (nn.Module,), {"forward": forward})


@pytest.mark.parametrize("annotation", [Cache | None, EncoderDecoderCache, Cache])
def test_a_cache_is_told_by_its_type(annotation: Any) -> None:
    assert cache_argument(typed(annotation)) == "state"


def test_a_cache_is_told_by_what_the_code_asks_it_for() -> None:
    assert cache_argument(Asked) == "memory"


def test_a_name_alone_makes_no_cache() -> None:
    assert cache_argument(Unknown) is None
    assert cache_argument(typed(Tensor | None)) is None


@pytest.mark.parametrize("name", GENERATIVE)
def test_every_model_and_its_attention_have_one(name: str) -> None:
    model = tiny(name)
    assert cache_argument(type(model))
    decoder = model.get_decoder()
    attention = [type(m) for m in decoder.modules() if is_attention(m)]
    assert attention
    assert all(map(cache_argument, attention))


# ALBERT has one list of layers that run again and again.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "albert"])
def test_the_depth_of_a_model_is_that_of_the_stack_of_its_output(name: str) -> None:
    model = tiny(name)
    stacks = stack_depths(model)
    last = [path for path in stacks if "encoder" not in path or name not in SEQ2SEQ]
    assert len(last) == 1, stacks
    for field in ("decoder_layers", "num_decoder_layers"):
        if getattr(model.config, field, None):
            setattr(model.config, field, 5)
            assert output_depth(model.config) == 5
            return
    assert output_depth(model.config) == stacks[last[0]]
