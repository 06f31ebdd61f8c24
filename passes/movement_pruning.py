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
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from plmcc.api import Hard, Layout, Miss, Objective, Pass, Planned, Site, Soft
from plmcc.passes._aimed import aimed
from plmcc.passes._compact import Compacted
from plmcc.passes._masked import Rules, unit_of
from plmcc.passes._planned import planned
from plmcc.passes._plans import Plan, Scored, plans, scored
from plmcc.passes._prunable import Attention, Parts, by_path, read
from plmcc.passes._prunable_layer import PrunableLayer, Pruning
from plmcc.passes._pruned_layer import empty, resize, store
from plmcc.passes._refill import refill
from plmcc.passes._scores import kept_of
from plmcc.passes._sensitivity import Sensitivity
from plmcc.program import Program

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
        None, gt=0, lt=1, description="Of their parameters: weights not zero, biases, norms."
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="Of their multiply-adds a token, attention's own included."
    )
    latency: float | None = Field(
        None, gt=1, description="How many times as fast the whole model is to be, by measurement."
    )
    length: int = Field(128, ge=1, description="For `flops`, `latency`: tokens in a sequence.")
    batch: int = Field(32, ge=1, description="For `latency`: sequences at a time.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="For `latency`: measured where.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        values = (self.parameters, self.flops, self.latency)
        if sum(value is not None for value in values) != 1:
            raise ValueError("give one of `parameters`, `flops` and `latency`")
        used = {"length": not self.parameters, "batch": self.latency, "device": self.latency}
        for name, has_effect in used.items():
            if not has_effect and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no effect on this target: remove it")
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
    """Which layers."""
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
    """Soft movement and L0: weight of the regulariser, or where it begins if it is steered; 400 and
    125 by default."""
    floor: float = Field(0.005, ge=0, lt=1)
    """Soft movement: the part of each score tensor that stays in any case."""
    warmup: float = Field(0.1, ge=0)
    """How long nothing is pruned: a fraction of the stage, or from 1 on, optimiser steps."""
    cooldown: float = Field(0.2, ge=0)
    """How long the final density holds at the end: a fraction, or from 1 on, steps."""
    initialisation: Literal["constant", "sensitivity"] = "constant"
    """Movement: scores begin equal, as in the paper, or, when the warm-up is over, with the ranks
    of the squared gradients that their masks have had in it: meant for short trainings."""
    score_learning_rate: float | None = Field(None, gt=0)
    """Of the scores; 0.01 by default, 0.1 for L0."""
    compact: bool = True
    """Remove empty heads and neurons. Without, all shapes stay, and with `storage: dense` the
    result is an ordinary checkpoint with zeros in it."""
    even_heads: Literal["keep", "remove"] = "keep"
    """Heads whose queries or keys have lost all weights attend (nearly) evenly. `remove`: they go
    too, as in nn_pruning. That changes what the layer computes; by how much is reported."""
    storage: Literal["dense", "bitmask", "csr", "int8_csr"] = "dense"
    """How the remaining matrices are stored. `int8_csr` rounds weights to 8 bits."""
    target: Target | None = None
    """Instead of `density`: what the pruned layers are to keep, or how many times as fast the model
    is to be, met within 3 %. `latency` goes by a table: the times of layers with fewer heads and
    neurons, measured (uncompiled) when the stage begins."""
    seed: int = Field(0, ge=0)
    """Refill: of the noise."""

    @model_validator(mode="after")
    def _has_effect(self) -> MovementPruning:
        """Refuse options that the others make meaningless."""
        soft, hard = self.method == "soft_movement", self.method in ("magnitude", "movement")
        masks, fixed = self.method != "refill", self.granularity == "2:4"
        free = self.density is None and self.target is None
        fields = type(self).model_fields
        used = {
            "density": masks and not fixed and self.target is None, "scope": hard and not fixed,
            "target": masks and not fixed, "threshold": soft and free, "floor": soft and free,
            "penalty": soft or self.method == "l0",
            "score_learning_rate": self.method in ("movement", "soft_movement", "l0"),
            "initialisation": self.method == "movement", "granularity": masks, "warmup": masks,
            "cooldown": masks, "seed": not masks, "even_heads": masks and self.compact,
        }  # fmt: skip
        for name, has_effect in used.items():
            if not has_effect and getattr(self, name) != fields[name].default:
                given = f"method `{self.method}`, granularity `{self.granularity}`"
                given += ", `target`" if name == "density" and self.target else ""
                raise ValueError(f"`{name}` has no effect with {given}: remove it")
        if fixed and not hard:
            raise ValueError("`2:4` goes with method magnitude or movement")
        if self.target and self.target.flops and self.granularity not in _WHOLE:
            raise ValueError(f"zeros save no operations: `flops` goes with {', '.join(_WHOLE)}")
        if self.target and self.target.latency:
            self._check_speed()
        if self.initialisation == "sensitivity" and not self.warmup:
            raise ValueError("`initialisation: sensitivity` looks at the warm-up: give `warmup`")
        if self.warmup < 1 and self.cooldown < 1 <= self.warmup + self.cooldown:
            raise ValueError("`warmup` and `cooldown` leave no time in which the density falls")
        return self

    def _check_speed(self) -> None:
        chosen = self.granularity
        hybrid = "hybrid" if isinstance(chosen, Blocks) and chosen.hybrid else chosen
        if hybrid not in (*_WHOLE, "hybrid"):
            raise ValueError(f"zeros save no time: `latency` goes with {', '.join(_WHOLE)}, hybrid")
        if not self.compact or self.storage != "dense":
            raise ValueError("`latency` goes with `compact: true` and `storage: dense`")

    def needs_training(self) -> str:
        """Magnitudes are there; scores, and weights in the place of zeros, are learned."""
        if self.method == "magnitude":
            return ""
        if self.method == "refill":
            return "`method: refill` puts noise in the place of zeros: it has to be trained"
        return f"the scores of `method: {self.method}` are learned: without training they are equal"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the layers that hold something to prune."""
        rules = self._rules()
        found = program.resolve(self.targets, "layer", self.expect)
        linears = by_path(program)
        sites = []
        for site in found:
            parts = site if isinstance(site, Miss) else read(program, site.path, linears)
            if isinstance(parts, Miss):
                yield parts
            elif isinstance(site, Site):
                groups = scored(site.module, self._plans(parts))
                reason = self._refusal(site.module, parts, groups)
                facts = {"parts": parts, "rules": rules, "scored": groups, "program": program}
                if reason:
                    yield Miss(site.path, reason)
                else:
                    sites.append(replace(site, facts=facts))
        yield from sites if self.target is None else aimed(sites, rules, self.target)

    def _rules(self) -> Rules:
        wanted = self.density is not None or self.target is not None
        steered = wanted and self.method in ("soft_movement", "l0")
        return Rules(
            method=self.method,
            density=0.5 if self.granularity == "2:4" else self.density or _DENSITY,
            steered=steered,
            threshold=self.threshold,
            floor=self.floor,
            wide=self.scope == "global",
            pattern=self.granularity == "2:4",
            int8=self.storage == "int8_csr",
            warmup=self.warmup,
            cooldown=self.cooldown,
            sensitivity=Sensitivity() if self.initialisation == "sensitivity" else None,
        )

    def _plans(self, parts: Parts) -> list[Plan]:
        chosen = self.granularity
        if not isinstance(chosen, Blocks):
            return plans(parts, chosen)
        name, size = ("block", chosen.block) if chosen.block else ("hybrid", chosen.hybrid)
        return plans(parts, name, size or (32, 32))

    def _refusal(self, layer: nn.Module, parts: Parts, groups: list[Scored]) -> str:
        """Say why a layer cannot be pruned as asked; empty if it can."""
        if not groups:
            return "; ".join(parts.refused) or f"it has nothing that is a {self.granularity}"
        weights = {n: layer.get_parameter(f"{n}.weight") for group in groups for n in group.names}
        frozen = next((name for name, weight in weights.items() if not weight.requires_grad), None)
        if frozen and self.method != "magnitude":
            return f"{frozen} is frozen: neither it nor scores for it can be trained"
        if self.method == "refill":
            zeros = any(w.is_meta or bool((w == 0).any()) for w in weights.values())
            return "" if zeros else "it has no zeros in the place of which something could grow"
        return next(filter(None, map(self._too_few, groups)), "")

    def _too_few(self, group: Scored) -> str:
        names, columns = ", ".join(group.names), group.spreads[0].shape[1]
        if self.granularity == "2:4":
            return f"the {columns} columns of {names} are no multiple of 4" if columns % 4 else ""
        local = self.scope == "local" and self.method in ("magnitude", "movement")
        density = self.density or _DENSITY
        if not local or self.target is not None or kept_of(density, group.count):
            return ""
        what = f"density {density:g} keeps less than one of the {group.count} groups"
        return f"{what} of {names}: at least {1 / group.count:.3g} is needed"

    def plan(self, site: Site) -> Planned:
        """What is removed for certain, by the density of heads and neurons; see `planned`."""
        layout, about, trained = planned(
            site, self.method, self.storage, self.compact, self._plans_alone()
        )
        return Planned(PrunedLayer(**layout), about, trained)

    def _plans_alone(self) -> bool:
        """Whether each score tensor has a density of its own that is known beforehand."""
        free = self.density is None and self.target is None
        unknown = self.method in ("soft_movement", "l0") and free
        timed = self.target is not None and self.target.latency is not None
        return not (unknown or timed or self.method == "refill")

    def replace(self, site: Site) -> Soft:
        """Put the linears under masks, or noise in the place of their zeros."""
        parts, rules = site.facts["parts"], site.facts["rules"]
        groups: list[Scored] = site.facts["scored"]
        densities = site.facts.get("densities", [None] * len(groups))
        inside: dict[str, nn.Module] = {}
        if self.method == "refill":
            seed = self.seed + zlib.crc32(site.path.encode())  # every layer its own noise
            return self._soft(site, refill(site.module, parts, seed))
        for group, density in zip(groups, densities, strict=True):
            linears = [site.module.get_submodule(name) for name in group.names]
            made = unit_of(rules, linears, group.spreads, group.groups, density)
            inside |= dict(zip(group.names, made, strict=True))
        layer = self._soft(site, inside)
        if "times" in site.facts:
            layer.price = site.facts["times"].price
        if self.even_heads == "remove":
            layer.close_even_heads(partial(site.facts["program"].record, site.path))
        if rules.aim is not None:
            rules.aim.layers.append(layer)
        return layer

    def _soft(self, site: Site, inside: dict[str, nn.Module]) -> PrunableLayer:
        parts = site.facts["parts"]
        deploy = partial(PrunedLayer.of, site.module, parts, storage=self.storage)
        return PrunableLayer(site.module, parts, inside, self.compact, deploy)

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Return the clock, the penalty and the learning rate of a layer's scores."""
        assert isinstance(soft, PrunableLayer)
        if self.method == "refill":
            return None
        rate = self.score_learning_rate or (0.1 if self.method == "l0" else 0.01)
        weights = {"soft_movement": 400.0, "l0": 125.0}
        penalty = self.penalty if self.penalty is not None else weights.get(self.method, 0.0)
        return Pruning(soft, site.facts["rules"], rate, penalty)


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
            "linears": linears, "rows": rows, "columns": columns, "values": values, "forms": forms,
            "attention": attention, "sizes": sizes, "counts": counts, "kept": kept,
        }  # fmt: skip
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
            layer.set_submodule(name, module)
        self._ready = {}
        for block, kept in self.blocks:
            if len(kept) < block.heads:
                resize(layer.get_submodule(block.path), block, kept)
