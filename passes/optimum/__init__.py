"""Transformations of optimum.fx as a pass on layer graphs: MergeLinears, FuseBiasInLinear ...

Each layer is traced, transformed, put back and compared with what it computed before; a difference
is an error. Attention modules are leaves of the graphs, so MergeLinears joins the gate and up
projections of a gated feed-forward network, but not q, k and v. Stored: the tensors of the
transformed layer under their new names; loading transforms the empty layer in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from plmcc.api import Hard, Miss, Pass, Planned, Program, Site, Soft
from plmcc.kit.graphs import Layer
from plmcc.passes.optimum.transform import (
    apply_transformation,
    rewrite_layer,
    transformation_named,
    would,
)


class Optimum(Pass):
    """Apply a transformation of optimum.fx to the layers it changes."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "within"
    tolerance: ClassVar[float] = 1e-4
    paper: ClassVar[str] = "optimum.fx.optimization, Hugging Face"
    hazards: ClassVar[tuple[str, ...]] = (
        "optimum.fx is no longer developed; every result is checked numerically for that reason.",
        "The layers' parameters change their names: adapters and hooks for the old ones break.",
    )

    targets: str | list[str] = "layers"
    """The layers to transform; layers that it would not change are skipped."""
    transformation: str = "MergeLinears"
    """A class of optimum.fx.optimization that needs no arguments."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the layers that the transformation would change."""
        chosen = transformation_named(self.transformation)
        for found in program.resolve(self.targets, "layer", self.expect):
            layer = found if isinstance(found, Miss) else program.layer(found.path)
            if isinstance(layer, Miss):
                yield layer
            elif would(layer, chosen):
                yield found
            else:
                yield Miss(layer.path, f"{self.transformation} applies nowhere in its graph")

    def plan(self, site: Site) -> Planned:
        """The transformed layer, as loading makes it: without comparing values."""
        return Planned(TransformedLayer(self.transformation))

    def replace(self, site: Site, program: Program) -> Soft:
        """Return the transformation of the layer; `rewrite` carries it out and checks it."""
        return SoftLayer(self.transformation)


class SoftLayer(Soft):
    """A transformed layer; its parameters train under their new names."""

    def __init__(self, transformation: str) -> None:
        super().__init__()
        self.transformation = transformation

    def rewrite(self, program: Program, path: str) -> None:
        """Transform the layer and compare it with what it computed before.

        Raises:
            PlmccError: the outputs differ, and the layer is as it was.
        """
        apply_transformation(program, transformation_named(self.transformation), [path])

    def harden(self) -> Hard:
        """Return the record of the transformation; the layer is already in its final form."""
        hard = TransformedLayer(self.transformation)
        hard.done = True
        return hard


class TransformedLayer(Hard):
    """A layer after a transformation of optimum.fx."""

    def __init__(self, transformation: str) -> None:
        super().__init__()
        self.layout = {"transformation": transformation}
        self.done = False

    def rewrite(self, program: Program, path: str) -> None:
        """Transform an original layer, also on the meta device."""
        if self.done:
            return
        layer = program.layer(path)
        assert isinstance(layer, Layer), layer
        rewrite_layer(layer, transformation_named(str(self.layout["transformation"])))
