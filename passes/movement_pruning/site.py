"""A layer with what can be pruned in it, and what pruning will leave of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from plmcc.api import Miss, Program, Site, Values
from plmcc.kit.parts import Attention, Parts, by_path, matrix, read
from plmcc.passes.movement_pruning.groups import Scored, plans, scored
from plmcc.passes.movement_pruning.latency import Times
from plmcc.passes.movement_pruning.masks import PruningSettings, PruningState
from plmcc.passes.movement_pruning.scores import kept_of


@dataclass(frozen=True)
class PrunableSite(Site):
    """A layer with its attention modules and networks, and the groups that are scored."""

    parts: Parts = field(kw_only=True, repr=False)
    state: PruningState = field(kw_only=True, repr=False)
    """Shared by all layers of a pass."""
    groups: list[Scored] = field(kw_only=True, repr=False)
    densities: list[float] | None = field(default=None, kw_only=True)
    """Of each group, where a target decides on them."""
    times: Times | None = field(default=None, kw_only=True, repr=False)
    """Measured times of the layer, where the target is a latency."""


def prunable_sites(
    program: Program, layers: Iterable[Site | Miss], state: PruningState
) -> Iterator[PrunableSite | Miss]:
    """Yield the layers that hold something to prune, and why the others do not."""
    settings, linears = state.settings, by_path(program)
    for site in layers:
        parts = site if isinstance(site, Miss) else read(program, site.path, linears)
        if isinstance(site, Miss) or isinstance(parts, Miss):
            assert isinstance(parts, Miss)
            yield parts
            continue
        groups = scored(site.module, plans(parts, settings.granularity, settings.block))
        reason = _refusal(settings, site.module, parts, groups)
        if reason:
            yield Miss(site.path, reason)
        else:
            found = (site.kind, site.paths, site.roles, site.modules)
            yield PrunableSite(*found, parts=parts, state=state, groups=groups)


def _refusal(
    settings: PruningSettings, layer: nn.Module, parts: Parts, groups: list[Scored]
) -> str:
    """Say why a layer cannot be pruned as asked; empty if it can."""
    if not groups:
        return "; ".join(parts.refused) or f"it has nothing that is a {settings.granularity}"
    weights = {n: layer.get_parameter(f"{n}.weight") for group in groups for n in group.names}
    frozen = next((name for name, weight in weights.items() if not weight.requires_grad), None)
    if frozen and settings.method != "magnitude":
        return f"{frozen} is frozen: neither it nor scores for it can be trained"
    if settings.method == "refill":
        zeros = any(w.is_meta or bool((w == 0).any()) for w in weights.values())
        return "" if zeros else "it has no zeros to refill"
    return next(filter(None, (_too_few(settings, group) for group in groups)), "")


def _too_few(settings: PruningSettings, group: Scored) -> str:
    names, columns = ", ".join(group.names), group.spreads[0].shape[1]
    if settings.two_of_four:
        return f"{columns} columns of {names} are not a multiple of 4" if columns % 4 else ""
    local = not settings.global_threshold and settings.method in ("magnitude", "movement")
    if not local or settings.has_target or kept_of(settings.density, group.count):
        return ""
    what = f"density {settings.density:g} keeps less than one of the {group.count} groups"
    return f"{what} of {names}: at least {1 / group.count:.3g} is needed"


_LEARNED = "at most: what goes is decided by training"
_EMPTIED = "at most: whatever zeros empty as a whole is removed too"
_SHARED = "about: all layers share the density"


def plan_layer(site: PrunableSite, storage: str, compact: bool) -> tuple[Values, str, int]:
    """Return the layout of the pruned layer, why it is not exact, and the count of trainable
    parameters beside it.

    `storage` and `compact` are options of the pass. Unless densities are known beforehand, all
    weights stay.
    """
    parts, state = site.parts, site.state
    method, known = state.settings.method, state.settings.known
    groups = site.groups if known else []
    densities = site.densities or [state.density] * len(groups)
    densities = densities if known else []
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
    }
    layout |= _heads(parts, kept)
    scores = 0 if method in ("magnitude", "refill") else sum(g.count for g in site.groups)
    dense = 0 if sparse and storage == "int8_csr" else 1
    stored = dense * sum(left[p] if sparse else shapes[p][0] * shapes[p][1] for p in shapes)
    return layout, _about(state, groups, known, compact), sum(before.values()) - stored + scores


def _heads(parts: Parts, kept: dict[str, list[int]]) -> Values:
    """Return the layout of attention modules with the heads that stay."""
    return {
        "attention": [block.path for block in parts.attention],
        "sizes": [n for b in parts.attention for n in (b.heads, b.kv_heads, b.head_dim)],
        "counts": [len(kept[block.path]) for block in parts.attention],
        "kept": [head for block in parts.attention for head in kept[block.path]],
    }


def _block(parts: Parts, group: Scored) -> Attention | None:
    names = set(group.names)
    return next((b for b in parts.attention if names == set(b.linears.values())), None)


def _about(state: PruningState, groups: list[Scored], known: bool, compact: bool) -> str:
    if not known:
        return _LEARNED if state.settings.method != "refill" else ""
    if state.settings.together:
        return _SHARED  # before the next reason: a layer may keep more than its part
    return _EMPTIED if compact and not all(group.removable for group in groups) else ""
