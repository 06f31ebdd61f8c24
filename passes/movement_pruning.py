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

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from plmcc.api import Hard, Layout, Miss, Objective, Pass, Site, Soft
from plmcc.diagnostics import error
from plmcc.passes._compact import Compacted, Matrix, compact, figures, whole
from plmcc.passes._masked import Masked, Rules, Unit, unit_of
from plmcc.passes._plans import Plan, plans, shaped
from plmcc.passes._prunable import Attention, Parts, by_path, matrix, read
from plmcc.passes._pruned_layer import empty, resize, stored, zero_widths
from plmcc.passes._scores import kept_of
from plmcc.program import Program

Size = Annotated[int, Field(ge=1, le=4096)]
Shape = Literal["weight", "block", "row", "column", "head", "neuron", "2:4", "hybrid", "structured"]
_LEARNED = ("l0", "movement", "soft_movement")


class Blocks(BaseModel):
    """Rectangles of weights, with their size in rows and columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    block: tuple[Size, Size] | None = None
    """Blocks of this size everywhere."""
    hybrid: tuple[Size, Size] | None = None
    """Blocks of this size in attention, neurons in the feed-forward network."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Blocks:
        if (self.block is None) == (self.hybrid is None):
            raise ValueError("give either `block` or `hybrid`, with two sizes")
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
    method: Literal["magnitude", "l0", "movement", "soft_movement"] = "movement"
    """What decides: the weights' magnitude, or scores learned with them. `magnitude` needs no
    training."""
    granularity: Shape | Blocks = "weight"
    """What is kept or dropped as one. `neuron`: a row of fc1 (and gate) with its column of fc2.
    `hybrid`: 32 x 32 blocks in attention, neurons in the feed-forward network; other sizes as
    `{block: [R, C]}` or `{hybrid: [R, C]}`. `structured`: heads and neurons."""
    density: float = Field(0.1, gt=0, le=1)
    """Magnitude and movement: the part of each matrix (or of all heads, neurons) that stays."""
    scope: Literal["local", "global"] = "local"
    """`global`: the density is of all weights together, with one threshold."""
    threshold: float = Field(0.1, gt=0, lt=1)
    """Soft movement: final value of t; what scores sigmoid(S) <= t goes."""
    penalty: float | None = Field(None, ge=0)
    """Soft movement and L0: weight of the regulariser; 400 and 125 by default."""
    floor: float = Field(0.005, ge=0, lt=1)
    """Soft movement: the part of each score tensor that stays in any case."""
    warmup: float = Field(0.1, ge=0)
    """How long nothing is pruned: a fraction of the stage, or from 1 on, optimiser steps."""
    cooldown: float = Field(0.2, ge=0)
    """How long the final density holds at the end: a fraction, or from 1 on, steps."""
    score_learning_rate: float | None = Field(None, gt=0)
    """Of the scores; 0.01 by default, 0.1 for L0."""
    compact: bool = True
    """Remove empty heads and neurons. Without, all shapes stay, and with `storage: dense` the
    result is an ordinary checkpoint with zeros in it."""
    storage: Literal["dense", "bitmask", "csr", "int8_csr"] = "dense"
    """How the remaining matrices are stored. `int8_csr` rounds weights to 8 bits."""

    @model_validator(mode="after")
    def _has_effect(self) -> MovementPruning:
        """Refuse options that the others make meaningless."""
        soft, hard = self.method == "soft_movement", self.method in ("magnitude", "movement")
        fields = type(self).model_fields
        used = {
            "density": hard and self.granularity != "2:4", "scope": hard, "threshold": soft,
            "penalty": soft or self.method == "l0", "floor": soft,
            "score_learning_rate": self.method != "magnitude",
        }  # fmt: skip
        for name, has_effect in used.items():
            if not has_effect and getattr(self, name) != fields[name].default:
                given = f"method `{self.method}`, granularity `{self.granularity}`"
                raise ValueError(f"`{name}` has no effect with {given}: remove it")
        if self.granularity == "2:4" and (not hard or self.scope == "global"):
            raise ValueError("`2:4` goes with method magnitude or movement and scope local")
        if 0 < self.warmup < 1 and self.warmup + min(self.cooldown, 1) >= 1 > self.cooldown:
            raise ValueError("`warmup` and `cooldown` leave no time in which the density falls")
        return self

    def needs_training(self) -> str:
        """Scores are learned; magnitudes are there."""
        if self.method not in _LEARNED:
            return ""
        return f"the scores of `method: {self.method}` are learned: without training they are equal"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the layers that hold something to prune."""
        rules = self._rules()
        found = program.resolve(self.targets, "layer", self.expect)
        linears = by_path(program)
        for site in found:
            parts = site if isinstance(site, Miss) else read(program, site.path, linears)
            if isinstance(parts, Miss):
                yield parts
            elif isinstance(site, Site):
                reason = self._refusal(site.module, parts)
                facts = {"parts": parts, "rules": rules}
                fine = Site(site.kind, site.paths, site.roles, site.modules, facts)
                yield Miss(site.path, reason) if reason else fine

    def _rules(self) -> Rules:
        return Rules(
            method=self.method,
            density=0.5 if self.granularity == "2:4" else self.density,
            threshold=self.threshold,
            floor=self.floor,
            wide=self.scope == "global",
            pattern=self.granularity == "2:4",
            int8=self.storage == "int8_csr",
            warmup=self.warmup,
            cooldown=self.cooldown,
        )

    def _refusal(self, layer: nn.Module, parts: Parts) -> str:
        """Say why a layer cannot be pruned as asked; empty if it can."""
        found = list(shaped(layer, self._plans(parts)))
        if not found:
            return "; ".join(parts.refused) or f"it has nothing that is a {self.granularity}"
        for names, spreads, groups in found:
            weights = [layer.get_parameter(f"{name}.weight") for name in names]
            frozen = next((n for n, w in zip(names, weights, strict=True) if not w.requires_grad),
                          None)  # fmt: skip
            if frozen and self.method in _LEARNED:
                return f"{frozen} is frozen, and the scores are learned from its gradients"
            count = torch.Size(spreads[0].scores(groups)).numel()
            if self.granularity == "2:4" and spreads[0].shape[1] % 4:
                return f"the {spreads[0].shape[1]} columns of {names[0]} are no multiple of 4"
            local = self.scope == "local" and self.method in ("magnitude", "movement")
            if local and self.granularity != "2:4" and kept_of(self.density, count) < 1:
                what = f"density {self.density:g} keeps less than one of the {count} groups"
                return f"{what} of {', '.join(names)}: at least {1 / count:.3g} is needed"
        return ""

    def _plans(self, parts: Parts) -> list[Plan]:
        chosen = self.granularity
        if not isinstance(chosen, Blocks):
            return plans(parts, chosen)
        name, size = ("block", chosen.block) if chosen.block else ("hybrid", chosen.hybrid)
        return plans(parts, name, size or (32, 32))

    def replace(self, site: Site) -> Soft:
        """Put the linears under masks."""
        parts, rules = site.facts["parts"], site.facts["rules"]
        masked: dict[str, Masked] = {}
        for names, spreads, groups in shaped(site.module, self._plans(parts)):
            linears = [site.module.get_submodule(name) for name in names]
            masked |= dict(zip(names, unit_of(rules, linears, spreads, groups), strict=True))
        return MaskedLayer(site.module, parts, masked, self.storage, self.compact)

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Return the clock, the penalty and the learning rate of a layer's scores."""
        assert isinstance(soft, MaskedLayer)
        rates = {"l0": 0.1, "magnitude": 0.0}
        rate = self.score_learning_rate or rates.get(self.method, 0.01)
        weights = {"soft_movement": 400.0, "l0": 125.0}
        penalty = self.penalty if self.penalty is not None else weights.get(self.method, 0.0)
        return Pruning(soft, site.facts["rules"], rate, penalty)


class Pruning(Objective):
    """The clock, the penalty and the parameter group of one layer's scores."""

    name = "movement_pruning"

    def __init__(self, soft: MaskedLayer, rules: Rules, rate: float, penalty: float) -> None:
        self.soft, self.rules, self.rate, self.penalty = soft, rules, rate, penalty

    def begin(self, steps: int) -> None:
        """Check that the stage is longer than warm-up and cool-down.

        Raises:
            PlmccError: it is not: the density would jump from 1 to its final value, or the model
                would be trained dense and used pruned.
        """
        self.rules.begin(steps)
        warm, cool = self.rules.fractions()
        if warm + cool >= 1:
            given = f"{steps} steps: {warm * steps:g} of warm-up, {cool * steps:g} of cool-down"
            raise error(
                "PLM303", "the stage ends before the density has fallen", "movement_pruning.warmup",
                given=given, allowed="warm-up and cool-down together shorter than the stage",
                cure="train longer, or give `warmup` and `cooldown` as fractions",
            )  # fmt: skip

    def advance(self, progress: float) -> None:
        """Move the schedule."""
        self.rules.advance(progress)

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor | None:
        """Return this layer's share of penalty * mean over score tensors of their mean.

        The weight of the soft method follows the threshold from 0 to its final value; that of L0
        is constant.
        """
        if not self.penalty:
            return None
        weight = self.penalty
        if self.rules.method == "soft_movement":
            weight *= 1 - self.rules.left
        terms = [unit.penalty() for unit in self.soft.units()]
        return torch.stack(terms).sum() * (weight / len(self.rules.units))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the scores, never decayed: those that no gradient reaches must stay."""
        scores = [unit.scores for unit in self.soft.units() if unit.scores is not None]
        return [{"params": scores, "lr": self.rate, "weight_decay": 0.0}] if scores else []


class MaskedLayer(Soft):
    """A layer whose linears are under masks."""

    def __init__(
        self,
        layer: nn.Module,
        parts: Parts,
        masked: dict[str, Masked],
        storage: str,
        compact: bool,
    ) -> None:
        super().__init__()
        self._layer, self.parts, self.names, self.storage = (layer,), parts, list(masked), storage
        self.compact = compact
        self.masked = nn.ModuleList(masked.values())
        self._facts: dict[str, float] = {}

    def units(self) -> list[Unit]:
        """Return the score tensors of this layer."""
        return [m.unit for m in self.masked if isinstance(m, Masked) and "unit" in m._modules]

    def rewrite(self, program: Program, path: str) -> None:
        """Put the masked linears into the layer."""
        layer = program.model.get_submodule(path)
        for name, module in zip(self.names, self.masked, strict=True):
            layer.set_submodule(name, module)

    @torch.no_grad()
    def harden(self) -> Hard:
        """Multiply masks into weights, remove what is empty, and store the rest as asked."""
        matrices = {name: self._matrix(name) for name in self.parts.paths()}
        small = compact(self.parts, matrices) if self.compact else whole(self.parts, matrices)
        self._facts = figures(self.parts, matrices, small)
        return PrunedLayer.of(self._layer[0], self.parts, small, self.storage)

    def _matrix(self, name: str) -> Matrix:
        linear = self._layer[0].get_submodule(name)
        given = getattr(linear, "bias", None)
        bias = given.detach().clone() if given is not None else None
        if isinstance(linear, Masked):
            return Matrix(linear.effective(settled=True).detach().clone(), bias)
        return Matrix(matrix(linear).detach().clone(), bias)

    def facts(self) -> dict[str, float]:
        """Return what is left, after hardening."""
        return self._facts


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
        ready, forms, width = {}, {}, zero_widths(parts, small)
        for name, part in small.matrices.items():
            old = layer.get_submodule(name)
            like = old.original[0] if isinstance(old, Masked) else old
            forms[name], ready[name] = stored(like, part, storage, width.get(name, 0))
            ready[name].train(layer.training)
        sizes = [getattr(ready[name], "values", None) for name in ready]
        shapes = [tuple(small.matrices[name].weight.shape) for name in ready]
        rows = [width.get(n, r) if forms[n] == "zeros" else r
                for n, (r, _) in zip(ready, shapes, strict=True)]  # fmt: skip
        made = cls(
            linears=list(ready),
            rows=rows,
            columns=[columns for _, columns in shapes],
            values=[0 if value is None else len(value) for value in sizes],
            forms=list(forms.values()),
            attention=[block.path for block in parts.attention],
            sizes=[n for b in parts.attention for n in (b.heads, b.kv_heads, b.head_dim)],
            counts=[len(kept) for kept in small.heads],
            kept=[head for kept in small.heads for head in kept],
        )
        made._ready = ready
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
