"""The tiny models of `plmcc.testing.tiny`, and what only tests need of them.

Import as `from tiny import NAMES, inputs, tiny`: `tests` is on pytest's path.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from plmcc.testing.tiny import (
    BOS,
    DECODERS,
    ENCODERS,
    EOS,
    GENERATIVE,
    NAMES,
    PAD,
    SEQ2SEQ,
    VOCAB,
    inputs,
    prompt,
    tiny,
)

__all__ = [
    "BOS",
    "DECODERS",
    "ENCODERS",
    "EOS",
    "GENERATIVE",
    "NAMES",
    "PAD",
    "SEQ2SEQ",
    "VOCAB",
    "cache_of",
    "inputs",
    "prompt",
    "tiny",
    "varied",
]
_SEED = 20
# For tensors this small, handing work to threads costs a hundred times the work.
torch.set_num_threads(1)


def varied(name: str, attention: str = "eager") -> PreTrainedModel:
    """A tiny model that does not repeat itself: with a tied head, each token calls for itself."""
    model = tiny(name, attention=attention)
    head: Any = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(_SEED)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=generator))
    model.eval().requires_grad_(False)
    return model


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, whatever this transformers calls it."""
    return next(value for value in output.values() if isinstance(value, Cache))
