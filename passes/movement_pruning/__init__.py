"""Movement pruning: weights, blocks, heads or neurons whose scores fall during fine-tuning go.

Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020
(2005.07683); blocks and structure: Lagunas et al., "Block Pruning For Faster Transformers", EMNLP
2021 (2109.04838). a = (W * M)x, and M is Top_v(|W|) (magnitude), Top_v(S) (movement), 1[sigmoid(S)
> t] (soft movement) or a hard-concrete gate (L0). Learned scores get dL/dS = dL/da W x through the
mask as if it were the identity: a weight that moves away from zero gains, one that moves towards it
loses. Matches the linears of attention blocks and feed-forward networks in repeated layers. Heads
and neurons that end up empty are removed, with their biases, where that changes nothing; of the
rest, zeros are stored densely, as a bit mask with values, or as compressed rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from plmcc.api import (
    Hard,
    Layout,
    Miss,
    Objective,
    Pass,
    Planned,
    Program,
    Site,
    Soft,
    refuse_unused,
)
from plmcc.kit.heads import resize
from plmcc.kit.parts import Attention, Parts
from plmcc.passes.movement_pruning.compact import Compacted
from plmcc.passes.movement_pruning.deployed import empty, store
from plmcc.passes.movement_pruning.masks import PruningSettings, PruningState
from plmcc.passes.movement_pruning.scores import Sensitivity
from plmcc.passes.movement_pruning.site import PrunableSite, plan_layer, prunable_sites
from plmcc.passes.movement_pruning.targets import with_densities
from plmcc.passes.movement_pruning.trainable import PrunableLayer, Pruning, masked, refill

Size = Annotated[int, Field(ge=1, le=4096)]
Shape = Literal["weight", "block", "row", "column", "head", "neuron", "2:4", "hybrid", "structured"]
_WHOLE = ("head", "neuron", "structured")
_DENSITY = 0.1


class Blocks(BaseModel):
    """Rectangles of weights, with their size in rows and columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: tuple[Size, Size] | None = Field(None, description="Blocks of this size everywhere.")
    hybrid: tuple[Size, Size] | None = Field(
        None, description="Blocks of this size in attention, neurons in the feed-forward network."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Blocks:
        if (self.block is None) == (self.hybrid is None):
            raise ValueError("give either `block` or `hybrid`, with two sizes")
        return self


class Target(BaseModel):
    """What the pruned layers are to keep, as a part of what they have, or how fast the model is to
    be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the parameters to keep, zeros not counted."
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="Fraction of FLOPs per token to keep, attention included."
    )
    latency: float | None = Field(
        None, gt=1, description="Speed-up of the whole model to reach, as measured."
    )
    length: int = Field(128, ge=1, description="For `flops`, `latency`: tokens in a sequence.")
    batch: int = Field(32, ge=1, description="For `latency`: batch size.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="For `latency`: its device.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        values = (self.parameters, self.flops, self.latency)
        if sum(value is not None for value in values) != 1:
            raise ValueError("give one of `parameters`, `flops` and `latency`")
        used = {"length": not self.parameters, "batch": self.latency, "device": self.latency}
        refuse_unused(self, used, "on this target")
        return self


class MovementPruning(Pass):
    """Prune layers by weights, blocks, heads or neurons while they are fine-tuned."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Sanh, Wolf and Rush, NeurIPS 2020, arXiv:2005.07683"
    hazards: ClassVar[tuple[str, ...]] = (
        "Zeros among other weights make nothing faster; only removed heads and neurons do.",
        "With `storage: dense` the file shrinks only by what is removed as a whole.",
        "Sparse storage makes the file smaller and each call slower: the matrix is rebuilt.",
        "A run must be longer than warm-up and cool-down, or the density would jump.",
    )

    targets: str | list[str] = "layers"
    """The layers to prune."""
    method: Literal["magnitude", "l0", "movement", "soft_movement", "refill"] = "movement"
    """What decides: the weights' magnitude, or scores learned with them. `magnitude` needs no
    training. `refill` prunes nothing: it trains all weights again that an earlier stage has set to
    zero in what it kept."""
    granularity: Shape | Blocks = "weight"
    """What is kept or dropped as one. `neuron`: a row of fc1 (and gate) with its column of fc2.
    `hybrid`: 32 x 32 blocks in attention, neurons in the feed-forward network; other sizes as
    `{block: [R, C]}` or `{hybrid: [R, C]}`. `structured`: heads and neurons."""
    density: float | None = Field(None, gt=0, le=1)
    """The part of each matrix (or of all heads, neurons) that stays; 0.1 by default for magnitude
    and movement. Soft movement and L0 have none of their own. If one is given, it is of all weights
    together; soft movement then keeps its penalty, but not its threshold, and the penalty of L0 is
    steered."""
    scope: Literal["local", "global"] = "local"
    """`global`: the density is of all weights together, with one threshold."""
    threshold: float = Field(0.1, gt=0, lt=1)
    """Soft movement: final value of t; what scores sigmoid(S) <= t goes."""
    penalty: float | None = Field(None, ge=0)
    """Soft movement and L0: weight of the regularizer, or where it begins if it is steered; 400 and
    125 by default."""
    floor: float = Field(0.005, ge=0, lt=1)
    """Soft movement: the part of each score tensor that stays in any case."""
    warmup: float = Field(0.1, ge=0)
    """How long nothing is pruned: a fraction of the stage, or from 1 on, optimizer steps."""
    cooldown: float = Field(0.2, ge=0)
    """How long the final density holds at the end: a fraction, or from 1 on, steps."""
    initialization: Literal["constant", "sensitivity"] = "constant"
    """Movement: scores begin equal, as in the paper, or, when the warm-up is over, with the ranks
    of the squared gradients that their masks have had in it: meant for short trainings."""
    score_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the scores; 0.01 by default, 0.1 for L0."""
    compact: bool = True
    """Remove empty heads and neurons. Without, all shapes stay, and with `storage: dense` the
    result is an ordinary checkpoint with zeros in it."""
    uniform_heads: Literal["keep", "remove"] = "keep"
    """Heads whose queries or keys have lost all weights attend (nearly) evenly. `remove`: they go
    too, as in nn_pruning. That changes what the layer computes; by how much is reported."""
    storage: Literal["dense", "bitmask", "csr", "int8_csr"] = "dense"
    """How the remaining matrices are stored. `int8_csr` quantizes weights to 8 bits."""
    target: Target | None = None
    """Instead of `density`: what the pruned layers are to keep, or how many times as fast the model
    is to be, met within 3 %. `latency` goes by a table: the times of layers with fewer heads and
    neurons, measured (uncompiled) when the stage begins."""
    seed: int = Field(0, ge=0)
    """Seed of the noise that `method: refill` adds."""

    @model_validator(mode="after")
    def _agree(self) -> MovementPruning:
        _check_effects(self)
        _check_method(self)
        return self

    def needs_training(self) -> str:
        """Magnitudes are there; scores, and weights in the place of zeros, are learned."""
        if self.method == "magnitude":
            return ""
        if self.method == "refill":
            return "`method: refill` replaces zeros by noise, which has to be trained"
        return f"the scores of `method: {self.method}` are learned: without training they are equal"

    def needs_data(self) -> str:
        """The change by `uniform_heads: remove` is measured."""
        if self.uniform_heads == "keep":
            return ""
        return "`uniform_heads: remove` measures by how much it changes the layers"

    def speed_target(self) -> tuple[float, int, int] | None:
        """That of `target.latency`."""
        target = self.target
        if target is None or target.latency is None:
            return None
        return target.latency, target.batch, target.length

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the layers that hold something to prune."""
        settings = _settings(self)
        sensitivity = Sensitivity() if self.initialization == "sensitivity" else None
        state = PruningState(settings, settings.density, sensitivity=sensitivity)
        found = program.merged(program.resolve(self.targets, "layer", self.expect))
        sites = []
        for site in prunable_sites(program, found, state):
            if isinstance(site, Miss):
                yield site
            else:
                sites.append(site)
        if self.target is None:
            yield from sites
        else:
            yield from with_densities(sites, state, self.target, program)

    def plan(self, site: Site) -> Planned:
        """What is removed for certain, by the density of heads and neurons; see `planned`."""
        assert isinstance(site, PrunableSite)
        layout, about, trained = plan_layer(site, self.storage, self.compact)
        return Planned(PrunedLayer(**layout), about, trained)

    def replace(self, site: Site, program: Program) -> Soft:
        """Put the linears under masks, or noise in the place of their zeros."""
        assert isinstance(site, PrunableSite)
        deploy = partial(PrunedLayer.of, site.module, site.parts, storage=self.storage)
        if self.method == "refill":
            seed = self.seed + zlib.crc32(site.path.encode())  # every layer its own noise
            inside = refill(site.module, site.parts, seed)
            return PrunableLayer(site.module, site.parts, inside, self.compact, deploy)
        layer = PrunableLayer(site.module, site.parts, masked(site), self.compact, deploy)
        if site.times is not None:
            layer.price = site.times.price
        if self.uniform_heads == "remove":
            layer.close_uniform_heads(partial(program.data.record, site.path))
        if site.state.aim is not None:
            site.state.aim.layers.append(layer)
        return layer

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Return the clock, the penalty and the learning rate of the scores of all layers."""
        assert isinstance(soft, PrunableLayer)
        assert isinstance(site, PrunableSite)
        if self.method == "refill":
            return None
        rate = self.score_learning_rate or (0.1 if self.method == "l0" else 0.01)
        return Pruning.of(site.state, soft, rate, self.penalty)


def _check_effects(options: MovementPruning) -> None:
    """Refuse options that the others make meaningless."""
    method, masks = options.method, options.method != "refill"
    fixed = options.granularity == "2:4"
    free = options.density is None and options.target is None
    given = f"with method `{method}`, granularity `{options.granularity}`"
    if options.target is not None and masks and not fixed:
        refuse_unused(options, {"density": False}, f"{given}, `target`")
    used = {
        "density": masks and not fixed,
        "scope": method in ("magnitude", "movement") and not fixed,
        "target": masks and not fixed,
        "threshold": method == "soft_movement" and free,
        "floor": method == "soft_movement" and free,
        "penalty": method in ("soft_movement", "l0"),
        "score_learning_rate": method in ("movement", "soft_movement", "l0"),
        "initialization": method == "movement",
        "granularity": masks,
        "warmup": masks,
        "cooldown": masks,
        "seed": not masks,
        "uniform_heads": masks and options.compact,
    }
    refuse_unused(options, used, given)


def _check_method(options: MovementPruning) -> None:
    """Refuse what the method, or the target, cannot do."""
    shape, target = options.granularity, options.target
    if shape == "2:4" and options.method not in ("magnitude", "movement"):
        raise ValueError("`2:4` needs the method magnitude or movement")
    if target and target.flops and shape not in _WHOLE:
        raise ValueError(f"zeros save no FLOPs: `flops` needs granularity {', '.join(_WHOLE)}")
    if target and target.latency:
        hybrid = isinstance(shape, Blocks) and shape.hybrid
        if shape not in (*_WHOLE, "hybrid") and not hybrid:
            needed = ", ".join(_WHOLE)
            raise ValueError(f"zeros save no time: `latency` needs granularity {needed}, hybrid")
        if not options.compact or options.storage != "dense":
            raise ValueError("`latency` needs `compact: true` and `storage: dense`")
    if options.initialization == "sensitivity" and not options.warmup:
        raise ValueError("`initialization: sensitivity` is measured in warm-up: set `warmup`")
    if options.warmup < 1 and options.cooldown < 1 <= options.warmup + options.cooldown:
        raise ValueError("`warmup` and `cooldown` leave no steps for the density to fall")


def _settings(options: MovementPruning) -> PruningSettings:
    shape, block = options.granularity, None
    if isinstance(shape, Blocks):
        shape, block = ("block", shape.block) if shape.block else ("hybrid", shape.hybrid)
    target = options.target
    return PruningSettings(
        method=options.method,
        granularity=shape,
        block=block or (32, 32),
        density=0.5 if shape == "2:4" else options.density or _DENSITY,
        threshold=options.threshold,
        floor=options.floor,
        global_threshold=options.scope == "global",
        int8=options.storage == "int8_csr",
        has_density=options.density is not None or target is not None,
        has_target=target is not None,
        timed=target is not None and target.latency is not None,
        warmup=options.warmup,
        cooldown=options.cooldown,
    )


class PrunedLayer(Hard):
    """A layer whose linears have lost rows and columns, and may be stored sparsely.

    `linears` are paths in the layer, `rows`, `columns` and `values` (those that are not zero) their
    sizes, `forms` how each is stored: "dense", "zeros" and "constant" (nothing is left of it but
    zeros, or its bias), or a form of sparse storage. For each of `attention`, `sizes` holds heads,
    key-value heads and head width before, and the next of `counts` in `kept` the heads that stay.
    """

    def __init__(
        self,
        linears: list[str],
        rows: list[int],
        columns: list[int],
        values: list[int],
        forms: list[str],
        attention: list[str],
        sizes: list[int],
        counts: list[int],
        kept: list[int],
    ) -> None:
        super().__init__()
        self.layout: Layout = {
            "linears": linears,
            "rows": rows,
            "columns": columns,
            "values": values,
            "forms": forms,
            "attention": attention,
            "sizes": sizes,
            "counts": counts,
            "kept": kept,
        }
        self._ready: dict[str, nn.Module] = {}
        shapes = zip(rows, columns, strict=True)
        self.plan = dict(zip(linears, zip(shapes, values, forms, strict=True), strict=True))
        self.blocks: list[tuple[Attention, list[int]]] = []
        for index, path in enumerate(attention):
            block = Attention(path, {}, *sizes[3 * index : 3 * index + 3])
            start = sum(counts[:index])
            self.blocks.append((block, kept[start : start + counts[index]]))

    @classmethod
    def of(cls, layer: nn.Module, parts: Parts, small: Compacted, storage: str) -> PrunedLayer:
        """Make the deployed form of a layer; `rewrite` puts it in place."""
        kept = store(layer, parts, small, storage)
        made = cls(
            linears=list(kept),
            rows=[part.shape[0] for part in kept.values()],
            columns=[part.shape[1] for part in kept.values()],
            values=[part.values for part in kept.values()],
            forms=[part.form for part in kept.values()],
            attention=[block.path for block in parts.attention],
            sizes=[n for b in parts.attention for n in (b.heads, b.kv_heads, b.head_dim)],
            counts=[len(heads) for heads in small.heads],
            kept=[head for heads in small.heads for head in heads],
        )
        made._ready = {name: part.module for name, part in kept.items()}
        return made

    def rewrite(self, program: Program, path: str) -> None:
        """Put the pruned linears into the trainable form, or (loading) into the original layer.

        Raises:
            ValueError: the layer has no such linears.
        """
        layer = program.model.get_submodule(path)
        for name, ((rows, columns), values, form) in self.plan.items():
            module = self._ready.get(name)
            if module is None:
                old = layer.get_submodule(name)
                module = empty(old, (rows, columns), values, form).train(old.training)
                self._ready[name] = module  # also for layers that share it
            layer.set_submodule(name, module)
        for block, kept in self.blocks:
            if len(kept) < block.heads:
                resize(layer.get_submodule(block.path), block, kept)
