"""All that the author of a pass needs: Pass, Site, Miss, Soft, Hard, Planned, Objective, Bars,
Points.

A pass is one file in `passes/`. `match` finds sites in a `Program`, `replace` turns a site into a
`Soft` module that can be trained, `Soft.harden` turns that into the `Hard` module that is saved and
deployed. Saving, loading, size accounting and contracts are generic: a pass writes no code for
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from plmcc.options import Pass

if TYPE_CHECKING:
    from plmcc.program import Program

__all__ = [
    "Bars",
    "Hard",
    "Layout",
    "Miss",
    "Objective",
    "Pass",
    "Planned",
    "Points",
    "Site",
    "Soft",
    "State",
]

State = dict[str, Any]
Layout = dict[str, int | float | bool | str | list[int] | list[str] | None]


@dataclass(frozen=True)
class Site:
    """A place in a model that a pass can rewrite: one module, or several tied by one weight.

    `paths[i]` is the module path and `roles[i]` what the module does there: "embedding" (looks up
    rows), "head" (multiplies by the transposed table), "layer" (a repeated block, rewritten through
    its graph) or "module" (anything else). The first path is the primary: the replacement goes
    there, and the other paths become views of it. `facts` is what matching learnt (shapes, padding
    index, scale); nothing else travels from match to replace.
    """

    kind: str
    paths: tuple[str, ...]
    roles: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    warning: str = ""
    """What the user should know although the pass rewrites it: one sentence."""

    @property
    def path(self) -> str:
        """The primary module path."""
        return self.paths[0]

    @property
    def module(self) -> nn.Module:
        """The module at the primary path."""
        return self.modules[0]


@dataclass(frozen=True)
class Miss:
    """A place that a pass looked at and refused, with the sentence that the user reads."""

    path: str
    reason: str


@dataclass(frozen=True)
class Bars:
    """Values of a site for a chart in the report: those of one title stand side by side, site by
    site."""

    title: str
    values: dict[str, float]
    """By the name that the legend has for them."""
    y: str = ""
    """What the values are."""


@dataclass(frozen=True)
class Points:
    """Pairs of numbers of a site for a chart of its own in the report, a thousand or so at most."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    """By the name that the legend has for them."""
    x: str = ""
    y: str = ""


class Hard(nn.Module):
    """The deployed form of a site. `type(self)(**layout)` plus the saved tensors is the module
    again.

    `layout` holds everything that decides shapes, as JSON values. The constructor allocates tensors
    of these shapes (on the meta device when loading) and computes nothing from data. A module that
    replaces a tied table also has `attend(hidden) -> logits`, the product with its transposed
    table.
    """

    layout: Layout

    def rewrite(self, program: Program, path: str) -> None:
        """For a site of role "layer" only: bring the original layer at `path` into the final form.

        Loading calls it on the meta device, so it must not look at values.
        """
        raise NotImplementedError(f"{type(self).__name__} replaces a module, not a layer")

    def ideal_bits(self) -> int | None:
        """Size in bits by the paper's formula, where that differs from the bytes stored; else
        None."""
        return None

    def binary_codes(self) -> tuple[Tensor, int] | None:
        """For a table in which each row is a code of n bits, alike by the share of equal bits: the
        packed codes (V, ⌈n/8⌉) uint8, most significant bit first, and n; else None."""
        return None


class Soft(nn.Module):
    """The trainable form of a site: the same calls as its `Hard` module, with gradients."""

    def rewrite(self, program: Program, path: str) -> None:
        """For a site of role "layer" only: bring the layer at `path` into the trainable form."""
        raise NotImplementedError(f"{type(self).__name__} replaces a module, not a layer")

    def harden(self) -> Hard:
        """Return the deployed form. It computes the same function within the pass's declared
        tolerance."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Figures for the report, e.g. reconstruction errors. Names are field terms, values plain
        numbers."""
        return {}

    def pictures(self) -> list[Bars | Points]:
        """Return data to draw in the report, after hardening."""
        return []


@dataclass(frozen=True)
class Planned:
    """What a site will become, as far as shapes say it: see `Pass.plan`."""

    module: Hard | Soft
    """The form that is put in place, on the meta device; it need not compute anything right."""
    about: str = ""
    """Why its sizes are not exact, e.g. "at most: the task decides on the lengths"; empty where
    they are."""
    trained: int = 0
    """Numbers that are trained beside the parameters of `module`."""
    frozen: int = 0
    """Bytes that training holds beside them and does not change."""


class Objective:
    """What a site adds to training: a loss, its own parameter groups, and a clock."""

    name: ClassVar[str] = ""
    share: float = 0.0
    """Share of the training loss that `loss` takes the place of: all else is weighed by
    1 - share, the largest of all objectives."""

    def begin(self, steps: int) -> None:
        """Hear how many optimiser steps the stage has, before the first of them.

        Raises:
            PlmccError: that is too few for what the objective does.
        """

    def advance(self, progress: float) -> None:
        """Move the clock: `progress` runs from 0 (start of the stage) to 1 (its end)."""

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor | None:
        """Return a scalar to add to the training loss, or None."""
        return None

    def figures(self) -> dict[str, float]:
        """Return what is logged beside the loss, and drawn over the steps: the mean over sites."""
        return {}

    def state(self) -> State:
        """Return what training has gathered besides parameters and buffers, tensors or JSON values:
        a checkpoint holds it."""
        return {}

    def restore(self, state: State) -> None:
        """Take that back; `begin` and `advance` follow as if the training had not stopped."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups (`params`, `lr`, `weight_decay`) for parameters with settings of
        their own."""
        return []
