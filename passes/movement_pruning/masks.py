"""Linears under masks, and the scores that several of them may share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import Objective, State
from plmcc.kit.parts import matrix
from plmcc.passes.movement_pruning.budget import DensitySearch, PenaltyController
from plmcc.passes.movement_pruning.scores import (
    L0_CLOSED,
    L0_START,
    ScoreLayout,
    Sensitivity,
    above,
    gates,
    kept_of,
    left,
    noise_like,
    open_probability,
    straight_through,
    top,
    two_of_four,
)
from plmcc.passes.movement_pruning.storage import rounded

_REFRESH = 25  # steps between two looks at all scores of the model, as in the official code
_PRESSED = 200  # times in a training that the penalty is steered
_ABOVE = 1e-5  # by how much scores that stay are above the limit: more than rounding
_GATHERED = ("density", "left", "_aimed", "_progress", "_ticks", "_cut")


@dataclass(frozen=True)
class PruningSettings:
    """How masks are made; from the options of the pass."""

    method: str
    granularity: str
    block: tuple[int, int]
    """Rows and columns of a block, where the granularity has blocks."""
    density: float
    threshold: float
    floor: float
    global_threshold: bool
    """Whether one threshold is for all scores of the model (`scope: global`)."""
    int8: bool
    """Whether finished weights are quantized to int8."""
    has_density: bool
    """Whether the recipe asks for a density, or for a target that decides on densities."""
    has_target: bool
    timed: bool
    """Whether the target is a latency."""
    warmup: float = 0.0
    cooldown: float = 0.0

    @property
    def two_of_four(self) -> bool:
        """Whether two of every four weights are kept."""
        return self.granularity == "2:4"

    @property
    def steered(self) -> bool:
        """Whether soft movement or L0 have to meet a density, which is not theirs to choose."""
        return self.has_density and self.method in ("soft_movement", "l0")

    @property
    def together(self) -> bool:
        """Whether the density is of the weights of all matrices together."""
        return self.global_threshold or self.steered

    @property
    def known(self) -> bool:
        """Whether each score tensor has a density of its own that is known before training."""
        learned = self.method in ("soft_movement", "l0") and not self.has_density
        return not (learned or self.timed or self.method == "refill")

    def fractions(self, steps: int) -> tuple[float, float]:
        """Return warm-up and cool-down as fractions of a stage; from 1 on they are in steps."""
        warm, cool = (
            value / max(1, steps) if value >= 1 else value for value in (self.warmup, self.cooldown)
        )
        return warm, cool


@dataclass
class PruningState:
    """The schedule and the scores of all layers of a pass; its objective moves it.

    `left` is how much of the way from density 1 (or threshold 0) to the final value is left; 0
    before and after training.
    """

    settings: PruningSettings
    density: float
    """That of the settings, until a target decides."""
    aim: DensitySearch | None = None
    sensitivity: Sensitivity | None = None
    """What scores begin with when the warm-up is over; None once they have."""
    controller: PenaltyController = field(default_factory=PenaltyController)
    score_groups: list[ScoreGroup] = field(default_factory=list, repr=False)
    objective: Objective | None = field(default=None, repr=False)
    """The one of all layers."""
    steps: int = 0
    left: float = 0.0
    _aimed: tuple[object, ...] = ()
    _progress: float = -1.0
    _ticks: int = 0
    _cut: tuple[tuple[object, ...], float] = ((), 0.0)

    def state(self) -> State:
        """Return where the schedule stands, and what has been learned besides scores."""
        sums = self.sensitivity.sums() if self.sensitivity is not None else []
        found: State = {name: getattr(self, name) for name in _GATHERED}
        found |= {"controller": self.controller.state(), "waiting": self.sensitivity is not None}
        found |= {"densities": [score_group.density for score_group in self.score_groups]}
        return found | {f"sensitivity{i}": one for i, one in enumerate(sums)}

    def restore(self, state: State) -> None:
        """Restore what `state` returned."""
        for name in _GATHERED:
            setattr(self, name, state[name])
        self._aimed, (key, value) = tuple(self._aimed), self._cut
        self._cut = (tuple(key), value)
        self.controller.restore(state["controller"])
        for score_group, density in zip(self.score_groups, state["densities"], strict=True):
            score_group.density = density
        if self.sensitivity is not None and state["waiting"]:
            for i, sums in enumerate(self.sensitivity.sums()):
                sums.copy_(state[f"sensitivity{i}"])
        elif not state["waiting"]:
            self.sensitivity = None

    def advance(self, progress: float) -> None:
        """Move the clock. The official code counts steps from 1, hence the one step added."""
        if progress == self._progress:
            return
        self._progress, self._ticks = progress, self._ticks + 1
        ahead = min(1.0, progress + (1 / self.steps if self.steps else 0.0))
        self.left = left(ahead, *self.settings.fractions(self.steps)) if progress < 1 else 0.0
        training = progress < 1
        if training and self.left < 1 and self.sensitivity is not None:
            self.sensitivity.begin()
            self.sensitivity = None
        for score_group in self.score_groups:
            score_group.draw(training and self.settings.method == "l0")
        turn = self._ticks % max(1, self.steps // _PRESSED) == 0
        if training and turn and self.settings.steered and self.settings.method == "l0":
            self.controller.update(self.open_part(), self.density_at(self.left))

    @torch.no_grad()
    def open_part(self) -> float:
        """Return the part of all weights whose L0 gates are not zero at test time."""
        sizes = [score_group.sizes() for score_group in self.score_groups]
        pairs = zip(self.score_groups, sizes, strict=True)
        kept = sum(float(((one.importance() > L0_CLOSED) * size).sum()) for one, size in pairs)
        return kept / sum(float(size.sum()) for size in sizes)

    def density_at(self, remaining: float, final: float | None = None) -> float:
        """Return the density where so much of the way is left to the final one."""
        density = self.density if final is None else final
        return density + (1 - density) * remaining

    def steer(self) -> None:
        """Fit densities to a target: 20 times in a training, and whenever scores have changed after
        it."""
        if self.aim is None:
            return
        key: tuple[object, ...] = (int(20 * self._progress),)
        if not 0 <= self._progress < 1:
            key = tuple(score_group.version() for score_group in self.score_groups)
        if key != self._aimed:
            self._aimed = key  # first: measuring asks for masks
            self.aim.steer(self._apply)

    def _apply(self, densities: list[float]) -> None:
        self.density = densities[0]
        for score_group, density in zip(self.score_groups, densities, strict=True):
            score_group.density = density

    def cut(self, remaining: float) -> float:
        """Return the score above which the weights of the whole model make up the density."""
        key: tuple[object, ...] = (remaining == 0.0, self._ticks // _REFRESH, self.density)
        if not 0 <= self._progress < 1:  # before and after training, always the present scores
            key += tuple(score_group.version() for score_group in self.score_groups)
        if self._cut[0] != key:
            self._cut = (key, self._threshold(self.density_at(remaining)))
        return self._cut[1]

    @torch.no_grad()
    def _threshold(self, density: float) -> float:
        scores = torch.cat([one.importance().flatten().cpu() for one in self.score_groups])
        sizes = torch.cat([one.sizes().flatten().cpu() for one in self.score_groups])
        order = scores.argsort(descending=True)
        within = sizes[order].double().cumsum(0) <= density * float(sizes.double().sum()) + 0.5
        count = int(within.sum())
        return float(scores[order[count - 1]]) if count else float("inf")


class ScoreGroup(nn.Module):
    """One score tensor: of a matrix, or of heads or neurons that several matrices have in common.

    Its members are the masked linears; magnitude pruning has no scores of its own and takes the
    mean magnitude of each group.
    """

    def __init__(
        self,
        state: PruningState,
        shape: tuple[int, ...],
        device: torch.device,
        density: float | None = None,
    ) -> None:
        super().__init__()
        self.state, self.shape, self.density = state, shape, density
        self.members: tuple[Masked, ...] = ()
        self.noise: Tensor | None = None
        self._kept: tuple[tuple[object, ...], Tensor] | None = None
        self._sizes: Tensor | None = None
        self.scores: nn.Parameter | None = None
        if state.settings.method != "magnitude":
            start = L0_START if state.settings.method == "l0" else 0.0
            self.scores = nn.Parameter(torch.full(shape, start, device=device))
            if state.sensitivity is not None:
                state.sensitivity.watch(self, lambda: state.left == 1.0)
        state.score_groups.append(self)

    def draw(self, wanted: bool) -> None:
        """Draw new noise for the gates of the L0 method, or forget it."""
        self.noise = noise_like(self.scores) if wanted and self.scores is not None else None

    def version(self) -> tuple[object, ...]:
        """Return a value that changes whenever what the mask is computed from is written to."""
        found = [self.scores] if self.scores is not None else [m.weight for m in self.members]
        # Fused optimizers write without counting it: in training every step makes a new version.
        step = self.state._ticks
        return (step, *(value for w in found for value in (id(w), w._version, w.device)))

    def importance(self) -> Tensor:
        """Return the scores; of magnitude pruning, mean magnitudes."""
        if self.scores is not None:
            return self.scores.detach()
        sums = [m.spread.gather(m.matrix().abs(), self.shape) for m in self.members]
        return torch.stack(sums).sum(0) / self.sizes()

    def sizes(self) -> Tensor:
        """Return how many weights stand behind each score."""
        device = self.members[0].weight.device
        if self._sizes is None or self._sizes.device != device:
            ones = [m.spread.gather(torch.ones_like(m.matrix()), self.shape) for m in self.members]
            self._sizes = torch.stack(ones).sum(0)
        return self._sizes

    def mask(self, settled: bool) -> Tensor:
        """Return the mask in the shape of the scores, with gradients to them.

        `settled`: the final mask, as it is used for evaluation and hardening, whatever the
        schedule says.
        """
        if self.state.settings.method == "l0":
            assert self.scores is not None
            return self._gates(self.scores, settled)
        remaining = 0.0 if settled else self.state.left
        mask = self._binary(remaining)
        return straight_through(mask, self.scores) if self.scores is not None else mask.float()

    def _gates(self, scores: Tensor, settled: bool) -> Tensor:
        """Return the gates of the L0 method. In the cool-down, and afterwards, what the steered
        penalty has left to the density is met exactly."""
        noise = None if settled else self.noise
        if not self.state.settings.steered or (self.state.left and not settled):
            return gates(scores, noise)
        self.state.steer()
        cut = self.state.cut(0.0)
        if cut < L0_CLOSED:  # too few are open: all are opened further
            return gates(scores + (L0_CLOSED - cut + _ABOVE), noise)
        return gates(scores, noise) * (scores.detach() >= cut)

    def _binary(self, remaining: float) -> Tensor:
        """Return the mask (bool); it is kept until the scores or the schedule change."""
        self.state.steer()
        key = (remaining, self.density, *self.version())
        if self.state.settings.together:
            key += (self.state.cut(remaining),)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._selected(remaining))
        return self._kept[1]

    @torch.no_grad()
    def _selected(self, remaining: float) -> Tensor:
        state, scores = self.state, self.importance()
        if state.settings.method == "soft_movement" and not state.settings.steered:
            return above(scores, state.settings.threshold * (1 - remaining), state.settings.floor)
        if state.settings.together:
            return scores >= state.cut(remaining)
        count = kept_of(state.density_at(remaining, self.density), scores.numel())
        if not state.settings.two_of_four:
            return top(scores, count)
        kept = two_of_four(scores)
        return kept | top(scores, count) if remaining else kept

    def penalty(self) -> Tensor:
        """Return the mean of sigmoid(S), or of the L0 method P(gate != 0)."""
        assert self.scores is not None
        l0 = self.state.settings.method == "l0"
        return (open_probability(self.scores) if l0 else torch.sigmoid(self.scores)).mean()


class Masked(nn.Module):
    """A linear map whose weight is multiplied by a mask. It keeps the parameters of the original,
    under their names."""

    def __init__(
        self, linear: nn.Module, score_group: ScoreGroup, spread: ScoreLayout, owner: bool
    ) -> None:
        super().__init__()
        self.original = (linear,)  # in a tuple: its parameters are ours
        self.weight = linear.get_parameter("weight")
        self.bias: nn.Parameter | None
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.spread, self._score_group, self.owner = spread, (score_group,), owner
        self.open_columns: Callable[[], Tensor] | None = None
        """Which columns finished weights have; None for all."""
        if owner:  # several linears may share the group; one of them registers it
            self.score_group = score_group

    def matrix(self) -> Tensor:
        """Return the weight (out, in) without its mask."""
        return matrix(self.original[0], self.weight)

    def effective(self, settled: bool) -> Tensor:
        """Return the masked weight (out, in)."""
        weight = self.matrix()
        masked = weight * self.spread(self._score_group[0].mask(settled)).to(weight.dtype)
        if settled and self.open_columns is not None:
            masked = masked * self.open_columns()
        return rounded(masked) if settled and self._score_group[0].state.settings.int8 else masked

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masked map. Evaluation (no gradients, not in training mode) uses the final
        mask."""
        # Without dropout, training steps run in evaluation mode too: gradients tell them apart.
        settled = not (self.training or torch.is_grad_enabled())
        return F.linear(x, self.effective(settled), self.bias)


def score_group_of(
    state: PruningState,
    linears: Sequence[nn.Module],
    spreads: Sequence[ScoreLayout],
    groups: int = 0,
    density: float | None = None,
) -> list[Masked]:
    """Put linears under the masks of one new unit; `density` is its own if not that of the
    state."""
    shape = spreads[0].scores(groups)
    score_group = ScoreGroup(state, shape, linears[0].get_parameter("weight").device, density)
    pairs = enumerate(zip(linears, spreads, strict=True))
    found = [Masked(linear, score_group, spread, index == 0) for index, (linear, spread) in pairs]
    score_group.members = tuple(found)
    return found
