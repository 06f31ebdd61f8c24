"""Attributes of an object that other code replaces for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept(module: nn.Module, *names: str) -> Iterator[None]:
    """Give a module back its own attributes of these names, whatever the block does to them.

    Only what the instance itself has counts: where the class alone has an attribute, the instance
    has none afterwards.
    """
    own = module.__dict__
    before = {name: own[name] for name in names if name in own}
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)
