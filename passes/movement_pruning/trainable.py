"""A layer while it is pruned, and what it adds to training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from plmcc.api import Bars, Call, Hard, Objective, Points, Program, Soft, State, Values, error
from plmcc.kit.parts import Attention, Parts, matrix, plain
from plmcc.passes.movement_pruning.charts import Learned, charts
from plmcc.passes.movement_pruning.compact import (
    Compacted,
    Matrix,
    metrics,
    uniform_groups,
    whole,
    without_empty,
)
from plmcc.passes.movement_pruning.masks import Masked, PruningState, ScoreGroup, score_group_of
from plmcc.passes.movement_pruning.site import PrunableSite

_NOISE = 0.01
_PENALTIES = {"soft_movement": 400.0, "l0": 125.0}


class Pruning(Objective):
    """The schedule, the penalty and the scores of all layers of a pass."""

    name = "movement_pruning"

    def __init__(self, state: PruningState, rate: float, penalty: float) -> None:
        self.pruning, self.rate, self.penalty = state, rate, penalty
        self.layers: list[PrunableLayer] = []

    @classmethod
    def of(
        cls, state: PruningState, layer: PrunableLayer, rate: float, penalty: float | None
    ) -> Pruning:
        """Return the objective of all layers of a state, with one more layer.

        `penalty` is the weight of the regularizer; None: that of the method.
        """
        if state.objective is None:
            own = _PENALTIES.get(state.settings.method, 0.0)
            state.objective = cls(state, rate, own if penalty is None else penalty)
        assert isinstance(state.objective, cls)
        state.objective.layers.append(layer)
        return state.objective

    def begin(self, steps: int) -> None:
        """Check that the stage is longer than warm-up and cool-down.

        Raises:
            PlmccError: it is not: the density would jump from 1 to its final value, or the model
                would be trained dense and used pruned.
        """
        self.pruning.steps = steps
        warm, cool = self.pruning.settings.fractions(steps)
        if warm + cool >= 1:
            given = f"{steps} steps: {warm * steps:g} of warm-up, {cool * steps:g} of cool-down"
            raise error(
                "PLM303",
                "the stage ends before the final density is reached",
                "movement_pruning.warmup",
                got=given,
                allowed="warm-up and cool-down together shorter than the stage",
                hint="train longer, or give `warmup` and `cooldown` as fractions",
            )

    def advance(self, progress: float) -> None:
        """Move the schedule."""
        self.pruning.advance(progress)

    def state(self) -> State:
        """Return where the schedule is, and what was gathered for it."""
        return self.pruning.state()

    def restore(self, state: State) -> None:
        """Restore what `state` returned."""
        self.pruning.restore(state)

    def loss(
        self, batch: dict[str, Tensor], output: object, teacher: object | None
    ) -> Tensor | None:
        """Return penalty * mean over score tensors of their mean.

        The weight of the soft method follows the threshold from 0 to its final value; that of L0
        is constant. Both are steered where a density is asked for.
        """
        if not self.penalty:
            return None
        weight = self.penalty * self.pruning.controller.factor
        if self.pruning.settings.method == "soft_movement":
            weight *= 1 - self.pruning.left
        return torch.stack([one.penalty() for one in self.pruning.score_groups]).mean() * weight

    def metrics(self) -> dict[str, float]:
        """Return the part of weights that the masks leave out, the mean over layers."""
        return {"sparsity": 1 - sum(one.density() for one in self.layers) / len(self.layers)}

    def parameter_groups(self) -> list[Values]:
        """Return the scores, never decayed: those that no gradient reaches must stay."""
        groups = [group for layer in self.layers for group in layer.score_groups()]
        scores = [group.scores for group in groups if group.scores is not None]
        return [{"params": scores, "lr": self.rate, "weight_decay": 0.0}] if scores else []


class PrunableLayer(Soft):
    """A layer whose linears are under masks, or have new weights in the place of zeros."""

    def __init__(
        self,
        layer: nn.Module,
        parts: Parts,
        inside: dict[str, nn.Module],
        compact: bool,
        deploy: Callable[[Compacted], Hard],
    ) -> None:
        super().__init__()
        self._layer, self.parts, self.names = (layer,), parts, list(inside)
        self._reduce, self._deploy = without_empty if compact else whole, deploy
        known = {id(p) for n in parts.paths() for p in layer.get_submodule(n).parameters()}
        self._others = sum(p.numel() for p in layer.parameters() if id(p) not in known)
        self.inside = nn.ModuleList(inside.values())
        self._statistics: dict[str, float] = {}
        self._charts_html: list[Bars | Points] = []
        self._record: Callable[[], list[Call]] | None = None
        self.price: Callable[[Compacted], float] | None = None
        """What the layer costs in seconds, where that is what is aimed at."""

    def close_uniform_heads(self, record: Callable[[], list[Call]]) -> None:
        """Let finished output projections skip heads that attend evenly; `record` returns calls of
        the layer, on which the change is measured."""
        self._record = record
        for block in self.parts.attention:
            output = dict(zip(self.names, self.inside, strict=True)).get(block.linears["o"])
            if isinstance(output, Masked):
                output.open_columns = partial(self._open_columns, block)

    def _open_columns(self, block: Attention) -> Tensor:
        roles = [role for role in ("q", "k", "qkv") if role in block.linears]
        paths = [block.linears[role] for role in roles]
        matrices = {path: self._matrix(path) for path in paths}
        keep = ~uniform_groups(block, matrices, biases=False)
        return keep.repeat_interleave(block.heads * block.head_dim // block.kv_heads)

    def _gap(self) -> float:
        """Return by how much the closed heads change what the layer returns, relative to it."""
        assert self._record is not None
        call, layer = self._record()[0].arguments, self._layer[0]
        closed = _output(layer(**call))
        outputs = [m for m in self.inside if isinstance(m, Masked) and m.open_columns]
        kept = [output.open_columns for output in outputs]
        for output in outputs:
            output.open_columns = None
        before = _output(layer(**call))
        for output, columns in zip(outputs, kept, strict=True):
            output.open_columns = columns
        return float((closed - before).norm() / before.norm().clamp(min=1e-12))

    def score_groups(self) -> list[ScoreGroup]:
        """Return the score tensors of this layer."""
        return [m.score_group for m in self.inside if isinstance(m, Masked) and m.owner]

    def _learned(self) -> dict[str, Learned]:
        """Return the scores of one matrix of each score tensor."""
        pairs = zip(self.names, self.inside, strict=True)
        owners = [(n, m) for n, m in pairs if isinstance(m, Masked) and m.owner]
        return {
            name: Learned(
                linear.spread(linear.score_group.scores.detach()), linear.matrix().detach()
            )
            for name, linear in owners
            if linear.score_group.scores is not None
        }

    @torch.no_grad()
    def density(self) -> float:
        """Return the part of the masked weights that is not zero now."""
        now = [m.effective(settled=False) for m in self.inside if isinstance(m, Masked)]
        return sum(int((w != 0).sum()) for w in now) / sum(w.numel() for w in now)

    def rewrite(self, program: Program, path: str) -> None:
        """Put the linears into the layer."""
        layer = program.model.get_submodule(path)
        for name, module in zip(self.names, self.inside, strict=True):
            layer.set_submodule(name, module)

    @torch.no_grad()
    def harden(self) -> Hard:
        """Multiply masks into weights, remove what is empty, and store the rest as asked."""
        matrices, small = self._compacted()
        self._statistics = metrics(self.parts, matrices, small)
        self._charts_html = charts(self.parts, matrices, small, self._learned())
        if self._record is not None:
            self._statistics["uniform_heads_gap"] = self._gap()
        if self.price is not None:
            self._statistics["predicted_seconds"] = self.price(small)
            self._statistics["predicted_seconds_before"] = self.price(whole(self.parts, matrices))
        return self._deploy(small)

    @torch.no_grad()
    def remaining(self) -> float:
        """Return how many parameters there would be, zeros of pruned matrices left out, or how
        many seconds."""
        small = self._compacted()[1]
        if self.price is not None:
            return self.price(small)
        every = small.matrices.values()
        biases = sum(len(m.bias) for m in every if m.bias is not None)
        return self._others + biases + sum(int((m.weight != 0).sum()) for m in every)

    def _compacted(self) -> tuple[dict[str, Matrix], Compacted]:
        matrices = {name: self._matrix(name) for name in self.parts.paths()}
        return matrices, self._reduce(self.parts, matrices)

    def _matrix(self, name: str) -> Matrix:
        linear = dict(zip(self.names, self.inside, strict=True)).get(name)
        linear = self._layer[0].get_submodule(name) if linear is None else linear
        given = getattr(linear, "bias", None)
        bias = given.detach().clone() if given is not None else None
        if isinstance(linear, Masked):
            return Matrix(linear.effective(settled=True).detach().clone(), bias)
        return Matrix(matrix(linear).detach().clone(), bias)

    def statistics(self) -> dict[str, float]:
        """Return what is left, after hardening."""
        return self._statistics

    def charts(self) -> list[Bars | Points]:
        """Return what is left by layer and by matrix, and learned scores beside weights."""
        return self._charts_html


def _output(result: object) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found.float()


@torch.no_grad()
def refilled(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a matrix whose zeros are mean(w) + N(0, 1) * 0.01 * std(w), of the others' values."""
    zero = weight == 0
    values = weight[~zero].float()
    if not zero.any() or values.numel() < 2:
        return weight.clone()
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return torch.where(zero, (values.mean() + noise * (_NOISE * values.std())).to(weight), weight)


def masked(site: PrunableSite) -> dict[str, nn.Module]:
    """Return the linears of a layer under masks, by their paths in it."""
    densities: Sequence[float | None] = site.densities or [None] * len(site.groups)
    inside: dict[str, nn.Module] = {}
    for group, density in zip(site.groups, densities, strict=True):
        linears = [site.module.get_submodule(name) for name in group.names]
        made = score_group_of(site.state, linears, group.spreads, group.groups, density)
        inside |= dict(zip(group.names, made, strict=True))
    return inside


def refill(layer: nn.Module, parts: Parts, seed: int) -> dict[str, nn.Module]:
    """Return new linears for a layer, by path, with noise in the place of their zeros."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in parts.paths():
        linear = layer.get_submodule(name)
        weight = refilled(matrix(linear).detach(), generator)
        found[name] = plain(linear, weight, getattr(linear, "bias", None))
    return found
