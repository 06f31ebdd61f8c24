"""What a site becomes: `Soft` for training, `Hard` for deployment, and what they add to both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from plmcc.ir.program import Program

State = dict[str, Any]
Layout = dict[str, int | float | bool | str | list[int] | list[str] | None]


@dataclass(frozen=True)
class Bars:
    """Values of a site for a chart in the report: those of one title are side by side, site by
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
    rounds_inputs: bool = False
    """Whether it quantizes what it is called with. Its outputs then jump where inputs hardly
    differ, and an exported program is compared with a wider tolerance."""

    @property
    def shares(self) -> Mapping[str, str]:
        """For modules in the one at the site's path that use the tensors of others in it: their
        paths and those of the owners. Each tensor is stored once, and shared again on loading."""
        return {}

    def rewrite(self, program: Program, path: str) -> None:
        """For a site of role "layer" only: bring the original layer at `path` into the final form.

        Loading calls it on the meta device, so it must not look at values.
        """
        raise NotImplementedError(f"{type(self).__name__} replaces a module, not a layer")

    def check_loaded(self) -> None:
        """Check the values of integer tensors, which come from a file: indices, offsets, codes.
        `kit.check_range` and its siblings do. A part of the module may have this method too.

        Raises:
            ValueError: a value is one that the module must not be called with.
        """

    def parameter_count(self) -> int:
        """Return how many values it stores, integers included; where several share a byte, each of
        them."""
        tensors = {id(v): v for v in self.state_dict(keep_vars=True).values()}
        return sum(v.numel() for v in tensors.values())

    def ideal_bits(self) -> int | None:
        """Size in bits by the paper's formula, where that differs from the bytes stored; else
        None."""
        return None

    def binary_codes(self) -> tuple[Tensor, int] | None:
        """For a table in which each row is a code of n bits, alike by the share of equal bits: the
        packed codes (V, ⌈n/8⌉) uint8, most significant bit first, and n; else None."""
        return None


@runtime_checkable
class Counted(Protocol):
    """A module that says how many parameters it stores: a `Hard`, or a part of one."""

    def parameter_count(self) -> int:
        """Return the number of values that stand for parameters."""


class Soft(nn.Module):
    """The trainable form of a site: the same calls as its `Hard` module, with gradients."""

    @property
    def shares(self) -> Mapping[str, str]:
        """As `Hard.shares`."""
        return {}

    def rewrite(self, program: Program, path: str) -> None:
        """For a site of role "layer" only: bring the layer at `path` into the trainable form."""
        raise NotImplementedError(f"{type(self).__name__} replaces a module, not a layer")

    def harden(self) -> Hard:
        """Return the deployed form. It computes the same function within the pass's declared
        tolerance."""
        raise NotImplementedError

    def statistics(self) -> dict[str, float]:
        """Figures for the report, e.g. reconstruction errors. Names are field terms, values plain
        numbers."""
        return {}

    def charts(self) -> list[Bars | Points]:
        """Return data to draw in the report, after hardening."""
        return []


@dataclass(frozen=True)
class Planned:
    """What a site will become, as far as shapes say it: see `Pass.plan`."""

    module: Hard | Soft
    """The form that is put in place, on the meta device; it need not compute anything right."""
    about: str = ""
    """Why its sizes are not exact; empty where they are. "at most: the task decides on the lengths"
    is a bound, which `apply` checks; any other text is a guess."""
    trained: int = 0
    """Parameters that are trained beside the parameters of `module`."""
    frozen: int = 0
    """Bytes that training holds beside them and does not change."""


class Objective:
    """What a site adds to training: a loss, its own parameter groups, and a clock."""

    name: ClassVar[str] = ""
    loss_weight: float = 0.0
    """Share of the training loss that `loss` takes the place of: all else is weighed by
    1 - share, the largest of all objectives."""

    def begin(self, steps: int) -> None:
        """Hear how many optimizer steps the stage has, before the first of them.

        Raises:
            PlmccError: that is too few for what the objective does.
        """

    def advance(self, progress: float) -> None:
        """Move the clock: `progress` runs from 0 (start of the stage) to 1 (its end)."""

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor | None:
        """Return a scalar to add to the training loss, or None."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return what is logged beside the loss, and drawn over the steps: the mean over sites."""
        return {}

    def state(self) -> State:
        """Return what training has gathered besides parameters and buffers, tensors or JSON values:
        a checkpoint holds it."""
        return {}

    def restore(self, state: State) -> None:
        """Take that back; `begin` and `advance` follow as if the training had not stopped."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups (`params`, `lr`, `weight_decay`) for parameters with settings of
        their own."""
        return []
