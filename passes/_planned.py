"""What pruning will leave of a layer, from shapes alone (a helper of the movement pruning pass, not
a pass)."""

from __future__ import annotations

from typing import Any

from plmcc.api import Site
from plmcc.passes._masked import Rules
from plmcc.passes._plans import Scored
from plmcc.passes._prunable import Attention, Parts, matrix

_LEARNED = "at most: what goes is decided by training"
_EMPTIED = "at most: whatever zeros empty as a whole is removed too"
_SHARED = "about: heads and neurons of all layers share the density"


def planned(
    site: Site, method: str, storage: str, compact: bool, known: bool
) -> tuple[dict[str, Any], str, int]:
    """Return the layout of the pruned layer, why it is not exact, and how many numbers train beside
    it.

    Args:
        site: a layer on the meta device, as matched.
        method: the pass's option, as `storage` and `compact`.
        storage: how matrices are stored.
        compact: whether empty heads and neurons are removed.
        known: whether densities are known beforehand; if not, all weights stay.
    """
    parts, rules = site.facts["parts"], site.facts["rules"]
    groups: list[Scored] = site.facts["scored"] if known else []
    densities = site.facts.get("densities", [rules.density] * len(groups))
    shapes = {p: list(matrix(site.module.get_submodule(p)).shape) for p in parts.paths()}
    before = {path: rows * columns for path, (rows, columns) in shapes.items()}
    left = dict(before)
    kept = {block.path: list(range(block.heads)) for block in parts.attention}
    for group, density in zip(groups, densities, strict=True):
        stays = max(1, int(density * group.count))
        for name, spread in zip(group.names, group.spreads, strict=True):
            left[name] = round(before[name] * stays / group.count)
            if group.removable and compact:
                side = 0 if spread.kind == "rows" else 1
                shapes[name][side] = shapes[name][side] * stays // group.count
        if group.removable and compact and (block := _block(parts, group)):
            kept[block.path] = list(range(stays * block.heads // block.kv_heads))
    sparse = storage != "dense"
    layout = {
        "linears": list(shapes),
        "rows": [rows for rows, _ in shapes.values()],
        "columns": [columns for _, columns in shapes.values()],
        "values": [left[path] if sparse else 0 for path in shapes],
        "forms": [storage] * len(shapes),
        "attention": [block.path for block in parts.attention],
        "sizes": [n for b in parts.attention for n in (b.heads, b.kv_heads, b.head_dim)],
        "counts": [len(kept[block.path]) for block in parts.attention],
        "kept": [head for block in parts.attention for head in kept[block.path]],
    }
    every: list[Scored] = site.facts["scored"]
    scores = 0 if method in ("magnitude", "refill") else sum(group.count for group in every)
    dense = 0 if sparse and storage == "int8_csr" else 1
    stored = dense * sum(left[p] if sparse else shapes[p][0] * shapes[p][1] for p in shapes)
    return layout, _about(rules, groups, known, compact), sum(before.values()) - stored + scores


def _block(parts: Parts, group: Scored) -> Attention | None:
    names = set(group.names)
    return next((b for b in parts.attention if names == set(b.linears.values())), None)


def _about(rules: Rules, groups: list[Scored], known: bool, compact: bool) -> str:
    if not known:
        return _LEARNED if rules.method != "refill" else ""
    if compact and not all(group.removable for group in groups):
        return _EMPTIED
    return _SHARED if rules.together else ""
