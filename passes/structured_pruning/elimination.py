"""What of the inputs of a linear map can be left out, and what the rest has to become (a helper of
the pass, not a pass).

Of a map y = W x + b with inputs of second moment G = E[x xᵀ], some inputs are left out and the
columns of the others fitted anew: min |X W'ᵀ - X Wᵀ|² + λ |W' - W|², which is solved in closed
form. Leaving out a group g of inputs then costs tr(W_g [(G + λI)⁻¹]_gg⁻¹ W_gᵀ) (optimal brain
surgeon; for structures Kurtic et al., "ZipLM", 2302.04089): groups go from the cheapest on, a few
at a time, and costs are computed anew.
Shapes: O outputs, N inputs, K inputs that stay. Where there is a bias, a constant input 1 is one of
the N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plmcc.kit.parts import matrix

_RIDGE = 0.01  # of the mean of G's diagonal
_ROUNDS = 40


@dataclass
class Reader:
    """A linear map that reads what is cut: heads or neurons, in groups of equally many inputs."""

    weight_ON: Tensor
    """In float64, with the bias as last column where there is one."""
    biased: bool
    width: int
    """Inputs of a group."""
    second_moment_NN: Tensor
    """Σ x xᵀ over the tokens, each divided by the mean square of the hidden states that the layer
    returns for it: float64. Errors then count as much as they change what the next norm gives; a
    few tokens have hidden states a hundred times as large as all others (Sun et al., "Massive
    Activations", 2402.17762)."""
    tokens: int = 0

    @classmethod
    def of(cls, linear: nn.Module, width: int) -> Reader:
        """Return one that has seen no inputs."""
        weight_ON, bias = matrix(linear).detach().double(), getattr(linear, "bias", None)
        if bias is not None:
            weight_ON = torch.cat([weight_ON, bias.detach().double()[:, None]], 1)
        count = weight_ON.shape[1]
        return cls(weight_ON, bias is not None, width, weight_ON.new_zeros(count, count))

    @property
    def groups(self) -> int:
        """The number of groups."""
        return (self.weight_ON.shape[1] - self.biased) // self.width

    def see(self, x_TN: Tensor, states_TD: Tensor) -> None:
        """Add tokens: inputs of the map, and the hidden states that the layer returned."""
        if self.biased:
            x_TN = torch.cat([x_TN, x_TN.new_ones(len(x_TN), 1)], 1)
        x_TN = x_TN * states_TD.square().mean(1, keepdim=True).clamp(min=1e-12).rsqrt()
        with torch.autocast(x_TN.device.type, enabled=False):
            self.second_moment_NN += (x_TN.T @ x_TN).double()
        self.tokens += len(x_TN)

    def _inputs(self, groups: Tensor) -> Tensor:
        """Return the inputs of some groups, and the constant."""
        steps = torch.arange(self.width, device=groups.device)
        inputs = (groups[:, None] * self.width + steps).flatten()
        if not self.biased:
            return inputs
        return torch.cat([inputs, inputs.new_tensor([self.weight_ON.shape[1] - 1])])

    def _regularized(self) -> Tensor:
        moment_NN = self.second_moment_NN.clone()
        diagonal = moment_NN.diagonal()
        diagonal += _RIDGE * diagonal.mean().clamp(min=1e-12)
        return moment_NN

    def norms(self) -> Tensor:
        """Return |W_g| |x_g| of each group: (groups,)."""
        size = self.groups * self.width
        squares = self.weight_ON[:, :size].square().sum(0) * self.second_moment_NN.diagonal()[:size]
        norms: Tensor = squares.unflatten(0, (self.groups, self.width)).sum(1).sqrt()
        return norms

    def eliminated(self, keep: int) -> tuple[Tensor, list[tuple[int, float]]]:
        """Return the groups that stay when the cheapest go, in order: (keep,) int64; and for each
        round how many have gone, and the mean square of the error relative to that of the hidden
        states which this round has added for each of them."""
        inverse = torch.linalg.inv(self._regularized())
        weight_NO = self.weight_ON.T.clone()
        alive = torch.arange(self.groups, device=weight_NO.device)
        step = max(1, (self.groups - keep) // _ROUNDS)
        rounds: list[tuple[int, float]] = []
        scale = max(1, self.tokens) * len(self.weight_ON)
        while len(alive) > keep:
            count, width = min(step, len(alive) - keep), self.width
            size = len(alive) * width
            blocks = inverse[:size, :size].unflatten(0, (-1, width)).unflatten(2, (-1, width))
            own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, width, width)
            columns = weight_NO[:size].unflatten(0, (-1, width))
            costs = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
            gone = torch.zeros(len(alive), dtype=torch.bool, device=alive.device)
            least = costs.topk(count, largest=False)
            gone[least.indices] = True
            rounds.append((count, float(least.values.mean()) / scale))
            out = torch.zeros(len(inverse), dtype=torch.bool, device=alive.device)
            out[:size] = gone.repeat_interleave(width)
            rest = ~out
            update = inverse[:, out] @ torch.linalg.inv(inverse[out][:, out])
            weight_NO = (weight_NO - update @ weight_NO[out])[rest]
            inverse = (inverse - update @ inverse[out])[rest][:, rest]
            alive = alive[~gone]
        return alive, rounds

    def refitted(self, kept: Tensor, reconstruct: bool) -> Refit:
        """Return the map that reads the kept groups only, fitted anew or as it was."""
        inputs = self._inputs(kept)
        weight_OK = self.weight_ON[:, inputs]
        if reconstruct:
            moment_NN = self._regularized()
            factor = torch.linalg.cholesky(moment_NN[inputs][:, inputs])
            wanted_KO = moment_NN[inputs] @ self.weight_ON.T
            weight_OK = torch.cholesky_solve(wanted_KO, factor).T
        change_ON = -self.weight_ON
        change_ON[:, inputs] += weight_OK
        lost, whole = (self._energy(value) for value in (change_ON, self.weight_ON))
        error = (lost / max(whole, 1e-30)) ** 0.5
        bias = weight_OK[:, -1] if self.biased else None
        return Refit(kept, weight_OK[:, :-1] if self.biased else weight_OK, bias, error)

    def _energy(self, weight_ON: Tensor) -> float:
        return float(((weight_ON @ self.second_moment_NN) * weight_ON).sum().clamp(min=0))


@dataclass(frozen=True)
class Refit:
    """What a map has become: the groups that it reads, its weight (O, K) and bias (O,) or None, and
    |y' - y| / |y| over the calibration tokens."""

    kept: Tensor
    weight_OK: Tensor
    bias_O: Tensor | None
    error: float
