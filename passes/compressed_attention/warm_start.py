"""A warm start for compressed attention: its weights from what a trained decoder layer computes.

Folding weights algebraically (V = W1·Wo·Wv for every head) is exact for one head only; with more, a
slice of the feed-forward network reads one head. So the weights are fitted to recorded hidden
states, each step a least-squares problem with a closed solution: scores of both attentions by one
query (truncated SVD under the covariances of the states), values and skip path on the
pre-activations of the feed-forward network (its neurons dealt to the heads that explain them best),
the output on what the layer adds to its input. A few gradient steps on the same error follow.
Shapes: N tokens, D model width, M width of encoder states, K key width, H heads, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from plmcc.api import Call, Values
from plmcc.kit import observing
from plmcc.passes.compressed_attention.layer import Parts

if TYPE_CHECKING:
    from plmcc.passes.compressed_attention import SoftAttention

_RIDGE = 1e-4
_LEARNING_RATE = 1e-3
_HELD_OUT = 5  # every fifth recorded call judges, the others teach


@dataclass
class Errors:
    """||branch - layer||² / ||layer||² on held-out states, after least squares and after training;
    `layer` is what the original layer adds to its input."""

    least_squares: float | None = None
    fitted: float | None = None

    def statistics(self) -> dict[str, float]:
        """Return what has been measured."""
        named = {"least_squares_error": self.least_squares, "layer_error": self.fitted}
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class _Call:
    """One recorded call: arguments of the branch, and what it should return."""

    u_BTD: Tensor
    arguments: dict[str, Tensor | None]
    inner_NF: list[Tensor]
    """Pre-activations: of the gate, if there is one, and of the up projection."""
    added_BTD: Tensor
    second_BTD: Tensor
    """What cross-attention reads in the original layer."""

    @property
    def memory_BSM(self) -> Tensor:
        memory = self.arguments["encoder_hidden_states"]
        assert memory is not None
        return memory


def warm_start(
    soft: SoftAttention, layer: nn.Module, parts: Parts, calls: list[Values], steps: int
) -> Errors:
    """Fit a merged sub-layer to a trained layer.

    Args:
        soft: the sub-layer, changed in place.
        layer: the original layer.
        parts: its modules.
        calls: arguments of recorded calls of the layer.
        steps: gradient steps after the least squares.
    """
    recorded = [_observe(layer, parts, call) for call in calls]
    judged = recorded[::_HELD_OUT]
    taught = [call for call in recorded if all(call is not other for other in judged)] or judged
    mode = soft.training
    soft.eval()
    with torch.no_grad():
        _fit_scores(soft, parts, taught)
        order = _fit_inner(soft, taught)
        _fit_output(soft, parts, taught, order)
        errors = Errors(least_squares=_error(soft, judged))
    errors.fitted = _train(soft, taught, judged, steps, errors.least_squares or 0.0)
    soft.train(mode)
    return errors


@torch.no_grad()
def _observe(layer: nn.Module, parts: Parts, call: Values) -> _Call:
    """Run the original layer once and note what its sub-layers read and return."""
    linears = [parts.gate, parts.up] if parts.gate is not None else [parts.up]
    watched = [*parts.norms, parts.cross_attention, *linears]
    seen: dict[nn.Module, Call] = {}
    with observing([layer, *watched], lambda module, call: seen.update({module: call})):
        layer(**call)
    result = seen[layer].result
    x_BTD = call["hidden_states"]
    pre = parts.position == "pre"
    total = result if pre else seen[parts.norms[2]].input
    names = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask", "position_bias")
    return _Call(
        u_BTD=seen[parts.norms[0]].result if pre else x_BTD,
        arguments={name: call.get(name) for name in names},
        inner_NF=[seen[linear].result.flatten(0, -2) for linear in linears],
        added_BTD=total - x_BTD,
        second_BTD=seen[parts.cross_attention].input,
    )


def _fit_scores(soft: SoftAttention, parts: Parts, calls: list[_Call]) -> None:
    """Queries and keys: for each head, the best common query of rank K for both score matrices."""
    u_ND, second_ND, memory_NM = (
        torch.cat([_with_one(x.flatten(0, -2)).double() for x in states])
        for states in (
            [c.u_BTD for c in calls],
            [c.second_BTD for c in calls],
            [c.memory_BSM for c in calls],
        )
    )
    roots = [_root(x) for x in (u_ND, memory_NM)]
    onto_DD = _ridge(u_ND, second_ND)
    q, k, cross_q, cross_k = (
        _affine(parts.projections[n], parts.num_heads) for n in ("q", "k", "cross_q", "cross_k")
    )
    lefts = [roots[0] @ q.mT, roots[0] @ onto_DD @ cross_q.mT]
    rights = [roots[0] @ k.mT, roots[1] @ cross_k.mT]
    pairs = _paired(lefts, rights, parts.head_dim)
    solved = [_common(lefts, rights, i, j, parts.head_dim) for i, j in enumerate(pairs)]
    inverse = [torch.linalg.inv(root) for root in (roots[0], roots[0], roots[1])]
    targets = (soft.q_proj, soft.k_proj, soft.encoder_k_proj)
    for index, linear in enumerate(targets):
        rows = torch.cat([(inverse[index] @ found[index]).T for found in solved])
        _assign(linear, rows)


def _common(
    lefts: list[Tensor], rights: list[Tensor], own: int, cross: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the best approximation of [L_s·R_sᵀ, L_c·R_cᵀ] by Q·[K_sᵀ, K_eᵀ]."""
    left, small, others = _small(lefts, rights, own, cross)
    u, s, v = torch.linalg.svd(small)
    root = s[:rank].sqrt()
    keys = v[:rank].T * root
    half = rights[0].shape[-1]
    return left @ (u[:, :rank] * root), others[0] @ keys[:half], others[1] @ keys[half:]


def _small(
    lefts: list[Tensor], rights: list[Tensor], own: int, cross: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same matrix in orthonormal bases of its rows and columns: 2K x 2K."""
    left, upper = torch.linalg.qr(torch.cat((lefts[0][own], lefts[1][cross]), -1))
    first, second = (torch.linalg.qr(r) for r in (rights[0][own], rights[1][cross]))
    return left, upper @ torch.block_diag(first[1].T, second[1].T), [first[0], second[0]]


def _paired(lefts: list[Tensor], rights: list[Tensor], rank: int) -> list[int]:
    """Return for each head of self-attention the head of cross-attention that fits best."""
    heads = range(len(lefts[0]))

    def lost(own: int, cross: int) -> float:
        values = torch.linalg.svdvals(_small(lefts, rights, own, cross)[1])
        return float(values[rank:].square().sum())

    costs = [[lost(own, cross) for cross in heads] for own in heads]
    return [int(j) for j in linear_sum_assignment(costs)[1]]


def _fit_inner(soft: SoftAttention, calls: list[_Call]) -> Tensor:
    """Values and skip path: pre-activations explained by one head's contexts and the own state.

    Returns the order of neurons: the first F / H of them belong to the first head, and so on.
    """
    inner_NF = [torch.cat(x).double() for x in zip(*(c.inner_NF for c in calls), strict=True)]
    solutions, errors = [], []
    weights = [soft(call.u_BTD, **call.arguments)[1:3] for call in calls]
    for head in range(soft.num_heads):
        features = _features(soft, calls, weights, head)
        found = [_ridge(features, target) for target in inner_NF]
        residuals = [
            (target - features @ w).square().mean(0)
            for target, w in zip(inner_NF, found, strict=True)
        ]
        solutions.append(found)
        errors.append(torch.stack(residuals).sum(0))
    order = _dealt(torch.stack(errors))
    share = len(order) // soft.num_heads
    kinds = range(len(inner_NF))
    rows = torch.cat(
        [
            solutions[head][kind][:, order[head * share : (head + 1) * share]].T
            for head in range(soft.num_heads)
            for kind in kinds
        ]
    )
    memory, width = soft.encoder_v_proj.in_features, soft.v_proj.in_features
    source, target, own = rows.split((memory, width, rows.shape[1] - memory - width), 1)
    for linear, values in ((soft.encoder_v_proj, source), (soft.v_proj, target)):
        linear.weight.copy_(values)
        if linear.bias is not None:
            linear.bias.zero_()  # the weights of both sides sum to 1: one bias is enough
    _assign(soft.skip_proj, own)
    return order


def _features(
    soft: SoftAttention, calls: list[_Call], weights: list[tuple[Tensor, Tensor]], head: int
) -> Tensor:
    """Return (N, M + D + D + 1): a head's contexts on both sides, the own state and 1."""
    rows = []
    for call, (target_BHTP, source_BHTS) in zip(calls, weights, strict=True):
        source = source_BHTS[:, head] @ call.memory_BSM
        target = target_BHTP[:, head] @ call.u_BTD
        rows.append(torch.cat((source, target, _with_one(call.u_BTD)), -1).flatten(0, -2))
    features = torch.cat(rows).double()
    return features if soft.skip_proj.bias is not None else features[:, :-1]


def _dealt(errors_HF: Tensor) -> Tensor:
    """Deal neurons to heads, each head the same number, with the least sum of errors."""
    heads, neurons = errors_HF.shape
    share = neurons // heads
    relative = errors_HF / errors_HF.mean(0).clamp(min=1e-12)
    costs = relative.T.repeat_interleave(share, 1).cpu().numpy()
    slots = linear_sum_assignment(costs)[1]
    return torch.as_tensor(slots, device=errors_HF.device).argsort()


def _fit_output(soft: SoftAttention, parts: Parts, calls: list[_Call], order: Tensor) -> None:
    """The output projection on what the layer adds, as a correction of the layer's own."""
    _assign(soft.out_proj, _affine(parts.down, 1)[0][:, [*order.tolist(), -1]])
    inputs: list[Tensor] = []
    missing: list[Tensor] = []

    def note(_: nn.Module, call: Call) -> None:
        inputs.append(_with_one(call.input).flatten(0, -2))

    with observing([soft.out_proj], note):
        for call in calls:
            output = soft(call.u_BTD, **call.arguments)[0]
            missing.append((call.added_BTD - output).flatten(0, -2))
    features = torch.cat(inputs).double()
    if soft.out_proj.bias is None:
        features = features[:, :-1]
    change = _ridge(features, torch.cat(missing).double()).T
    width = soft.out_proj.in_features
    soft.out_proj.weight.add_(change[:, :width].to(soft.out_proj.weight))
    if soft.out_proj.bias is not None:
        soft.out_proj.bias.add_(change[:, width].to(soft.out_proj.bias))


def _train(
    soft: SoftAttention, taught: list[_Call], judged: list[_Call], steps: int, before: float
) -> float:
    """Gradient steps on the layer's error; the best state on held-out calls stays."""
    best, kept = before, {name: value.clone() for name, value in soft.state_dict().items()}
    optimizer = torch.optim.AdamW(soft.parameters(), _LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for step in range(steps):
        call = taught[step % len(taught)]
        with torch.enable_grad():
            loss = _relative(soft(call.u_BTD, **call.arguments)[0], call.added_BTD)
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 8) == 0 and (error := _error(soft, judged)) < best:
            best, kept = error, {n: v.clone() for n, v in soft.state_dict().items()}
    soft.load_state_dict(kept)
    return best


@torch.no_grad()
def _error(soft: SoftAttention, calls: list[_Call]) -> float:
    errors = [_relative(soft(c.u_BTD, **c.arguments)[0], c.added_BTD) for c in calls]
    return float(torch.stack(errors).mean())


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1)


def _affine(linear: nn.Linear, heads: int) -> Tensor:
    """Return weight and bias as one matrix (heads, out / heads, in + 1), in float64."""
    bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
    both = torch.cat((linear.weight, bias[:, None]), 1).detach().double()
    return both.view(heads, -1, both.shape[-1])


def _assign(linear: nn.Linear, rows: Tensor) -> None:
    """Set weight and bias from rows (out, in + 1); without a bias the last column goes."""
    linear.weight.copy_(rows[:, : linear.in_features])
    if linear.bias is not None:
        linear.bias.copy_(rows[:, linear.in_features])


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Least squares with a ridge relative to the features' size, in float64."""
    x, y = features.double(), targets.double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution


def _root(x_ND: Tensor) -> Tensor:
    """Return the symmetric square root of the second moments, bounded away from singular."""
    x = x_ND.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    floor = values.clamp(min=float(values.max()) * 1e-6)
    root: Tensor = (vectors * floor.sqrt()) @ vectors.T
    return root
