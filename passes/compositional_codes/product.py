"""Product quantization of a table (a helper of the passes, not a pass).

Jégou, Douze and Schmid, IEEE TPAMI 2011: a row is cut into M parts of equal width, and each part is
replaced by the nearest of the K means of all rows' parts at that place.
Shapes: V rows, D dimensions, M codebooks, K codewords, W = D / M dimensions of a part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.cluster import KMeans
from torch import Tensor

_ITERATIONS = 25


def product_quantize(
    table_VD: Tensor,
    weights_V: Tensor,
    codebooks: int,
    codewords: int,
    seed: int,
    tick: Callable[[str, float], None],
) -> tuple[Tensor, Tensor]:
    """Return codes (V, M) int64 and codebooks (M, K, W) float32 whose chosen rows, side by side,
    are near the table's: nearer where a row weighs more."""
    codes, books = [], []
    for index, part_VW in enumerate(table_VD.float().cpu().chunk(codebooks, dim=1)):
        means = KMeans(codewords, n_init=1, max_iter=_ITERATIONS, random_state=seed + index)
        labels_V = means.fit_predict(part_VW.contiguous().numpy(), sample_weight=weights_V.numpy())
        codes.append(torch.from_numpy(labels_V).long())
        books.append(torch.from_numpy(means.cluster_centers_).float())
        tick("k-means", (index + 1) / codebooks)
    return torch.stack(codes, 1).to(table_VD.device), torch.stack(books).to(table_VD.device)
