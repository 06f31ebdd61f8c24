"""A layer while it is pruned, and what it adds to training (a helper of the movement pruning pass,
not a pass)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plmcc.api import Bars, Hard, Objective, Points, Soft, State
from plmcc.diagnostics import error
from plmcc.passes._compact import Compacted, Matrix, even_groups, figures, whole, without_empty
from plmcc.passes._masked import Masked, Rules, Unit
from plmcc.passes._pictures import Learned, pictures
from plmcc.passes._prunable import Attention, Parts, matrix
from plmcc.program import Program


class Pruning(Objective):
    """The clock, the penalty and the parameter group of one layer's scores."""

    name = "movement_pruning"

    def __init__(self, soft: PrunableLayer, rules: Rules, rate: float, penalty: float) -> None:
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

    def state(self) -> State:
        """Return the rules' own, with the first of the layers that share them."""
        first = self.soft.units()[:1] == self.rules.units[:1]
        return self.rules.state() if first else {}

    def restore(self, state: State) -> None:
        """Take that back."""
        if state:
            self.rules.restore(state)

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor | None:
        """Return this layer's share of penalty * mean over score tensors of their mean.

        The weight of the soft method follows the threshold from 0 to its final value; that of L0
        is constant. Both are steered where a density is asked for.
        """
        if not self.penalty:
            return None
        weight = self.penalty * self.rules.pressure.factor
        if self.rules.method == "soft_movement":
            weight *= 1 - self.rules.left
        terms = [unit.penalty() for unit in self.soft.units()]
        return torch.stack(terms).sum() * (weight / len(self.rules.units))

    def figures(self) -> dict[str, float]:
        """Return the part of weights that the masks now leave out."""
        return {"sparsity": 1 - self.soft.density()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the scores, never decayed: those that no gradient reaches must stay."""
        scores = [unit.scores for unit in self.soft.units() if unit.scores is not None]
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
        self._facts: dict[str, float] = {}
        self._pictures: list[Bars | Points] = []
        self._record: Callable[[], list[dict[str, Any]]] | None = None
        self.price: Callable[[Compacted], float] | None = None
        """What the layer costs in seconds, where that is what is aimed at."""

    def close_even_heads(self, record: Callable[[], list[dict[str, Any]]]) -> None:
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
        keep = ~even_groups(block, matrices, biases=False)
        return keep.repeat_interleave(block.heads * block.head_dim // block.kv_heads)

    def _gap(self) -> float:
        """Return by how much the closed heads change what the layer returns, relative to it."""
        assert self._record is not None
        call, layer = self._record()[0], self._layer[0]
        closed = _output(layer(**call))
        outputs = [m for m in self.inside if isinstance(m, Masked) and m.open_columns]
        kept = [output.open_columns for output in outputs]
        for output in outputs:
            output.open_columns = None
        before = _output(layer(**call))
        for output, columns in zip(outputs, kept, strict=True):
            output.open_columns = columns
        return float((closed - before).norm() / before.norm().clamp(min=1e-12))

    def units(self) -> list[Unit]:
        """Return the score tensors of this layer."""
        return [m.unit for m in self.inside if isinstance(m, Masked) and "unit" in m._modules]

    def _learned(self) -> dict[str, Learned]:
        """Return the scores of one matrix of each score tensor."""
        pairs = zip(self.names, self.inside, strict=True)
        owners = [(n, m) for n, m in pairs if isinstance(m, Masked) and "unit" in m._modules]
        return {
            name: Learned(linear.spread(linear.unit.scores.detach()), linear.matrix().detach())
            for name, linear in owners
            if linear.unit.scores is not None
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
        self._facts = figures(self.parts, matrices, small)
        self._pictures = pictures(self.parts, matrices, small, self._learned())
        if self._record is not None:
            self._facts["even_heads_gap"] = self._gap()
        if self.price is not None:
            self._facts["predicted_seconds"] = self.price(small)
            self._facts["predicted_seconds_before"] = self.price(whole(self.parts, matrices))
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

    def facts(self) -> dict[str, float]:
        """Return what is left, after hardening."""
        return self._facts

    def pictures(self) -> list[Bars | Points]:
        """Return what is left by layer and by matrix, and learned scores beside weights."""
        return self._pictures


def _output(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found.float()
