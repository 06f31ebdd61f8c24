"""What the report draws of a pruned layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plmcc.api import Bars, Points
from plmcc.kit.parts import Parts
from plmcc.passes.movement_pruning.compact import Compacted, Matrix

_POINTS = 500  # of a matrix


class Learned(NamedTuple):
    """The scores of a matrix, in its shape, and its weights without their mask."""

    scores: Tensor
    weights: Tensor


def charts(
    parts: Parts, matrices: dict[str, Matrix], small: Compacted, learned: dict[str, Learned]
) -> list[Bars | Points]:
    """Return heads and neurons before and after, densities of matrices, and the scores of the first
    and the last matrix that has some."""
    found: list[Bars | Points] = []
    if parts.attention:
        heads = {
            "before": sum(b.heads for b in parts.attention),
            "kept": sum(map(len, small.heads)),
        }
        found.append(_bars("heads", heads))
    if parts.networks:
        rows = [len(matrices[n.linears["fc1"]].weight) for n in parts.networks]
        found.append(_bars("neurons", {"before": sum(rows), "kept": sum(small.neurons)}))
    kept = {name: float((m.weight != 0).float().mean()) for name, m in matrices.items()}
    found.append(Bars("density of matrices", kept, y="part of weights that is not zero"))
    names = list(dict.fromkeys([*list(learned)[:1], *list(learned)[-1:]]))
    return [*found, *(_cloud(name, matrices[name], learned[name]) for name in names)]


def _bars(what: str, counts: dict[str, int]) -> Bars:
    return Bars(f"{what} by layer", {name: float(n) for name, n in counts.items()}, y=what)


def _cloud(name: str, matrix: Matrix, learned: Learned) -> Points:
    """A sample of the scores against the weights as trained, by what became of these."""
    weights, scores = (value.float().flatten().cpu() for value in reversed(learned))
    count = min(_POINTS, len(weights))
    # Drawn without the global generator: a picture must not change what comes after it.
    chosen = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))[:count]
    kept = (matrix.weight != 0).flatten().cpu()[chosen]
    pairs = torch.stack([weights[chosen], scores.expand(len(weights))[chosen]], -1)
    series = {"kept": pairs[kept], "pruned": pairs[~kept]}
    lists = {n: [(float(x), float(y)) for x, y in values] for n, values in series.items()}
    return Points(f"scores and weights of {name}", lists, x="weight", y="score")
