"""What passes that replace embedding tables share: calls, padding, tied heads, figures (a helper,
not a pass).

Shapes: V rows, D dimensions, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from plmcc.api import Hard, Layout, Miss, Objective, Site, Soft, TableSite
from plmcc.diagnostics import error
from plmcc.ir.program import Program
from plmcc.utils.types import Values

_PART = 8192
"""Rows that are looked at, or compared, at once."""
_SAME = "all rows of the table are the same, so that codes tell nothing apart: is it trained?"


def matched_tables(
    program: Program,
    targets: str | list[str],
    expect: int | None,
    refusal: Callable[[int, int], str],
    warning: Callable[[int, int], str] = lambda rows, dims: "",
) -> Iterator[Site | Miss]:
    """Yield the tables that targets name; `refusal(rows, dims)` says why one does not fit,
    `warning(rows, dims)` what to tell of one that does, or nothing."""
    for found in program.resolve(targets, "embedding", expect):
        if not isinstance(found, TableSite):
            yield found
            continue
        size = found.num_embeddings, found.embedding_dim
        reason = refusal(*size)
        if reason:
            yield Miss(found.path, reason)
            continue
        counts = program.data.counts if found.is_input else None
        told = [warning(*size), _SAME if _is_constant(found) else ""]
        yield replace(found, warning="; ".join(filter(None, told)), counts=counts)


def _is_constant(site: TableSite) -> bool:
    table_VD = site.module.get_parameter("weight").detach()
    if table_VD.is_meta:
        return False
    return all(bool((part == table_VD[0]).all()) for part in table_VD.split(_PART))


def weights_of(site: TableSite, power: float) -> Tensor:
    """Return what each row (V,) counts for: (1 + n)^power where the data has its token n times,
    divided by the mean; without data all rows count alike."""
    counts, rows = site.counts, site.num_embeddings
    times_V = torch.zeros(rows)
    if counts is not None:
        known = counts[:rows]
        times_V[: len(known)] = known.float()
    weights_V = (1 + times_V) ** power
    return weights_V / weights_V.mean()


def table_of(site: Site) -> Tensor:
    """Return the dense table (V, D), without its history.

    Raises:
        PlmccError: it holds values that are not finite.
    """
    table_VD = site.module.get_parameter("weight").detach()
    if table_VD.is_meta:
        return table_VD
    # By parts: isfinite takes a copy of what it looks at.
    finite_V = torch.cat([torch.isfinite(part).all(1) for part in table_VD.split(_PART)])
    if not finite_V.all():
        row = int(finite_V.logical_not().nonzero()[0])
        message = f"the table contains values that are not finite, the first in row {row}"
        raise error("PLM203", message, f"model: {site.path}")
    return table_VD


def common_layout(site: TableSite) -> Values:
    """Return what the layout of every `Table` says of the original. On the meta device nothing is
    known to be zero."""
    table_VD, padding_idx = table_of(site), site.padding_idx
    padded = padding_idx is not None and not table_VD.is_meta
    return {
        "num_embeddings": table_VD.shape[0],
        "embedding_dim": table_VD.shape[1],
        "padding_idx": padding_idx,
        "zero_padding": padded and not table_VD[padding_idx].any(),
        "scale": site.scale,
    }


class Table(nn.Module):
    """A table that is computed row by row; abstract: `rows` and `products` say how.

    Padding is as in nn.Embedding: no gradient through the padding row, and a zero row stays zero.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        zero_padding: bool,
        scale: float,
        **own: int | float | str | list[int],
    ) -> None:
        super().__init__()
        self.layout: Layout = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            **own,
            "padding_idx": padding_idx,
            "zero_padding": zero_padding,
            "scale": scale,
        }
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.zero_padding, self.scale = padding_idx, zero_padding, scale

    def rows(self, ids_N: Tensor) -> Tensor:
        """Rows (N, D) of the table, without its scale."""
        raise NotImplementedError(f"{type(self).__name__} has no method `rows`")

    def products(self, hidden_ND: Tensor) -> Tensor:
        """Products (N, V) of hidden states with all rows."""
        raise NotImplementedError(f"{type(self).__name__} has no method `products`")

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) -> rows (..., D), times the table's own scale."""
        rows_ND = self._padded_rows(ids.reshape(-1))
        if self.scale != 1.0:
            rows_ND = rows_ND * self.scale
        return rows_ND.view(*ids.shape, self.embedding_dim)

    def attend(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits_NV = self.products(hidden.reshape(-1, self.embedding_dim))
        if self.padding_idx is not None and self.zero_padding:
            keep_V = torch.arange(self.num_embeddings, device=hidden.device) != self.padding_idx
            logits_NV = logits_NV * keep_V
        return logits_NV.reshape(*hidden.shape[:-1], self.num_embeddings)

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), built on demand; without the scale, as in the original module."""
        device = next(self.parameters()).device
        return self._padded_rows(torch.arange(self.num_embeddings, device=device))

    def _padded_rows(self, ids_N: Tensor) -> Tensor:
        rows_ND = self.rows(ids_N)
        if self.padding_idx is None:
            return rows_ND
        fixed = torch.zeros_like(rows_ND) if self.zero_padding else rows_ND.detach()
        return torch.where(ids_N.eq(self.padding_idx)[:, None], fixed, rows_ND)


class CompressedTable(Table, Hard):
    """A `Table` as it is deployed; abstract."""


class LearningRate(Objective):
    """Adds nothing to the loss; gives a site's parameters their own learning rate."""

    name = "learning_rate"

    def __init__(self, soft: Soft, learning_rate: float) -> None:
        self.soft, self.learning_rate = soft, learning_rate

    def parameter_groups(self) -> list[Values]:
        """Return one group: all that the site trains."""
        return [{"params": list(self.soft.parameters()), "lr": self.learning_rate}]


@torch.no_grad()
def reconstruction(table_VD: Tensor, rows: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """½||ŷ - x||² and ||ŷ - x|| averaged over rows, and the error relative to the table's variance
    (where all rows are the same, to their square).

    `rows(ids_N)` computes rows (N, D). On the meta device, in a plan, there are no errors.
    """
    if table_VD.is_meta:
        return {}
    squares, distances, spread, whole = 0.0, 0.0, 0.0, 0.0
    mean_D = table_VD.float().mean(0)
    for ids_N in torch.arange(len(table_VD), device=table_VD.device).split(_PART):
        expected_ND = table_VD[ids_N].float()
        error_N = (rows(ids_N).float() - expected_ND).square().sum(-1)
        squares, distances = squares + float(error_N.sum()), distances + float(error_N.sqrt().sum())
        spread += float((expected_ND - mean_D).square().sum())
        whole += float(expected_ND.square().sum())
    count = len(table_VD)
    return {
        "reconstruction_loss": squares / count / 2,
        "mean_distance": distances / count,
        "relative_error": squares / (spread if spread > 1e-10 * whole else max(whole, 1e-30)),
    }
