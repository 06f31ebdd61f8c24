"""Shared layers: the layers of a group use the tensors of its first one.

Lan, Chen, Goodman, Gimpel, Sharma and Soricut, "ALBERT", ICLR 2020 (1909.11942), share all
parameters of all layers, or of each of G groups of consecutive layers. Here a pretrained model
begins with the tensors of a group's first layer, or with the mean over its layers, and is trained
afterwards: gradients of all layers of a group add up. The model computes as much as before; only
its size changes. Matches a stack: a list of repeated layers. Stored: the first layer of each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from plmcc.api import Hard, Miss, Pass, Program, Site, Soft, StackSite
from plmcc.kit import matched_stacks, unlike


class ShareLayers(Pass):
    """Let layers use the same tensors, as ALBERT does."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Lan et al., ICLR 2020, arXiv:1909.11942"
    hazards: ClassVar[tuple[str, ...]] = (
        "The model is broken until it is trained again: distill it in a `train` section.",
        "The model becomes smaller, not faster: it still runs every layer.",
    )

    targets: str | list[str] = "layers"
    """The stacks: every list of layers that contains a matching layer."""
    groups: int = Field(1, ge=1)
    """The number of groups of consecutive layers; the layers of each become one."""
    initialize_from: Literal["first", "mean"] = "first"
    """What a group begins with: the tensors of its first layer, or the mean over its layers."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the stacks whose layers are alike and more than the groups."""
        yield from matched_stacks(program, self.targets, self.expect, self._refusal)

    def _refusal(self, site: StackSite) -> str:
        depth = len(site.layers)
        if self.groups >= depth:
            return f"it has {depth} layers, not more than `groups`"
        for layer, owner in enumerate(self._owners(depth)):
            reason = unlike(site.layers[layer], site.layers[owner])
            if reason:
                return f"layers {owner} and {layer} are not alike: {reason}"
        if self.initialize_from == "mean" and any(
            isinstance(m, Hard) for m in site.layers.modules()
        ):
            return (
                "its layers are rewritten already: share them in an earlier stage, or use `first`"
            )
        return ""

    def _owners(self, depth: int) -> list[int]:
        """For each layer the first one of its group; the first groups have one more layer."""
        starts = [-(-depth * group // self.groups) for group in range(self.groups)]
        return [max(start for start in starts if start <= layer) for layer in range(depth)]

    def replace(self, site: Site, program: Program) -> Soft:
        """Choose the groups; `rewrite` sets the shared tensors."""
        assert isinstance(site, StackSite)
        return SharedLayers(self._owners(len(site.layers)), self.initialize_from == "mean")


class SharedLayers(Soft):
    """Groups of layers with the tensors of one; these train as they are."""

    def __init__(self, owners: list[int], mean: bool) -> None:
        super().__init__()
        self.owners, self.mean = owners, mean
        self._statistics: dict[str, float] = {}

    @property
    def shares(self) -> Mapping[str, str]:
        """Every layer but the first of a group shares with that."""
        return shared(self.owners)

    @torch.no_grad()
    def rewrite(self, program: Program, path: str) -> None:
        """Give the first layer of each group what its group begins with."""
        stack = program.model.get_submodule(path)
        assert isinstance(stack, nn.ModuleList)
        gone, whole = 0.0, 0.0
        for owner in dict.fromkeys(self.owners):
            group = [stack[i] for i, first in enumerate(self.owners) if first == owner]
            layers = [dict(layer.named_parameters()) for layer in group]
            for name, kept in layers[0].items():
                each = [layer[name].detach().float() for layer in layers if name in layer]
                kept.copy_(torch.stack(each).mean(0) if self.mean else kept)
                if not kept.is_meta:
                    gone += sum(float((one - kept.float()).square().sum()) for one in each)
                    whole += sum(float(one.square().sum()) for one in each)
        self._statistics = {"relative_error": (gone / whole) ** 0.5} if whole else {}

    def harden(self) -> Hard:
        """Return the record of the groups; the stack is already in its final form."""
        return SharedStack(self.owners)

    def statistics(self) -> dict[str, float]:
        """Return the distance of all layers from what they begin with, relative to their norm."""
        return self._statistics


class SharedStack(Hard):
    """A stack in which layers use the tensors of others; `owners` has the owner of each."""

    def __init__(self, owners: list[int]) -> None:
        super().__init__()
        self.layout = {"owners": owners}

    @property
    def shares(self) -> Mapping[str, str]:
        """Every layer but the owners shares with its owner."""
        return shared(self.layout["owners"])  # type: ignore[arg-type]

    def rewrite(self, program: Program, path: str) -> None:
        """Nothing is left to do: `shares` says it."""


def shared(owners: list[int]) -> dict[str, str]:
    """Return for each layer that has an owner the paths of both in the stack."""
    return {str(i): str(owner) for i, owner in enumerate(owners) if owner != i}
