"""Match, replace, harden: passes rewrite a live transformers model in place.

All passes of a stage are matched before anything is replaced, so that a recipe that does not fit
leaves the model as it was, and two passes that want the same site are an error instead of a race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc import catalog
from plmcc.api import Hard, Layout, Miss, Objective, Pass, Site, Soft
from plmcc.diagnostics import Place, PlmccError, error, listing
from plmcc.layers import remain_layer
from plmcc.program import Program


class View(nn.Module):
    """A module path that shares a table kept elsewhere: it owns at most a bias.

    The table is held in a tuple, so that it is not registered twice: its tensors have one name, are
    saved once and follow their owner's device and dtype.
    """

    def __init__(self, table: nn.Module, role: str, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        assert role in ("embedding", "head"), role
        self._table, self.role = (table,), role
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, values: Tensor) -> Tensor:
        """Look up ids (...) -> (..., D), or turn hidden states (..., D) into logits (..., V)."""
        if self.role == "embedding":
            rows: Tensor = self._table[0](values)
            return rows
        logits: Tensor = self._table[0].attend(values)  # type: ignore[operator]
        return logits if self.bias is None else logits + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), built on demand."""
        return self._table[0].weight  # type: ignore[return-value]


@dataclass(frozen=True)
class Record:
    """What an artifact says of one rewritten site: `class(**layout)` goes to the first path, views
    to the others."""

    name: str
    paths: tuple[str, ...]
    roles: tuple[str, ...]
    kind: str
    layout: Layout
    removed: tuple[str, ...]
    """Names of the original module's tensors that no longer exist."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them back."""
        return {
            "pass": self.name,
            "paths": list(self.paths),
            "roles": list(self.roles),
            "class": self.kind,
            "layout": self.layout,
            "removed": list(self.removed),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """Read what `to_json` wrote.

        Raises:
            PlmccError: a key is missing or has another type.
        """
        try:
            lists = [
                tuple(str(item) for item in values[key]) for key in ("paths", "roles", "removed")
            ]
            layout = dict(values["layout"])
            record = cls(
                str(values["pass"]), lists[0], lists[1], str(values["class"]), layout, lists[2]
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise error(
                "PLM402", f"a module record is malformed: {problem!r}", "config.json"
            ) from None
        if not record.paths or len(record.paths) != len(record.roles):
            raise error("PLM402", "a module record needs as many roles as paths", "config.json")
        return record


@dataclass(frozen=True)
class Replacement:
    """One site with the pass that rewrites it and its trainable form."""

    name: str
    options: Pass
    site: Site
    soft: Soft
    objective: Objective | None
    original: tuple[str, ...]
    """Names of the site's tensors before it was rewritten."""


@dataclass(frozen=True)
class Matched:
    """What the passes of a stage found: pairs of (index of the pass, site), and refused places."""

    passes: tuple[Pass, ...]
    sites: tuple[tuple[int, Site], ...]
    misses: tuple[tuple[int, Miss], ...]


def match(
    model: PreTrainedModel,
    passes: Sequence[Pass],
    places: Sequence[Place | str] = (),
    batches: Sequence[dict[str, Tensor]] = (),
    counts: Tensor | None = None,
) -> Matched:
    """Match all passes against the model without changing it.

    Args:
        model: the model to look at.
        passes: the passes of one stage.
        places: where each pass stands in the recipe, for errors.
        batches: inputs of the model that passes may fit to.
        counts: how often tokens occur in the data, see `Program`.

    Raises:
        PlmccError: a pass matches nothing, refuses all it matches, or wants what another pass has
            taken.
    """
    program = Program(model, batches, counts)
    sites: list[tuple[int, Site]] = []
    misses: list[tuple[int, Miss]] = []
    taken: dict[str, str] = {}
    for index, chosen in enumerate(passes):
        place = places[index] if places else f"pass {index}"
        found, refused = match_pass(program, chosen, place)
        for site in found:
            claim(site, chosen, taken, place)
        sites += [(index, site) for site in found]
        misses += [(index, miss) for miss in refused]
    return Matched(tuple(passes), tuple(sites), tuple(misses))


def match_pass(program: Program, chosen: Pass, place: Place | str) -> tuple[list[Site], list[Miss]]:
    """Return what one pass finds, and the places that it refuses.

    Raises:
        PlmccError: it finds nothing, or another number of sites than expected.
    """
    try:
        results = list(chosen.match(program))
    except PlmccError as problem:
        done = [path for path, part in program.model.named_modules() if isinstance(part, Hard)]
        cure = f"{listing(done, 3)}: rewritten before, and gone as a target" if done else ""
        found = [replace(d, place=place, cure=cure or d.cure) for d in problem.diagnostics]
        raise PlmccError(*found) from None
    sites = [result for result in results if isinstance(result, Site)]
    misses = [result for result in results if isinstance(result, Miss)]
    if not sites:
        reasons = _reasons(misses) or "nothing was found"
        message = f"`{catalog.name_of(type(chosen))}` has nothing to rewrite in this model"
        raise error("PLM203", message, place, given=reasons, cure="change `targets` or the options")
    return sites, misses


def _reasons(misses: Sequence[Miss]) -> str:
    """Return every reason once, with the first of the places that it is for."""
    places: dict[str, list[str]] = {}
    for miss in misses:
        places.setdefault(miss.reason, []).append(miss.path)
    more = {reason: f" and {len(paths) - 1} more" for reason, paths in places.items()}
    return "; ".join(
        f"{paths[0]}{more[reason] if len(paths) > 1 else ''}: {reason}"
        for reason, paths in places.items()
    )


def claim(site: Site, chosen: Pass, taken: dict[str, str], place: Place | str) -> None:
    """Note in `taken` (path -> name of the pass) that a pass wants a site.

    Raises:
        PlmccError: another pass has it, or something in it or around it.
    """
    name = catalog.name_of(type(chosen))
    for path in site.paths:
        for other, owner in taken.items():
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                message = f"`{name}` and `{owner}` both want to rewrite {path}"
                cure = "give them different `targets`, put them into stages, or keep one"
                if path != other:
                    message = f"`{name}` wants to rewrite {path}, and `{owner}` {other}"
                    cure = "put them into `stages`: one of these places lies in the other"
                raise error("PLM204", message, place, cure=cure)
        taken[path] = name


def replace_all(model: PreTrainedModel, matched: Matched) -> list[Replacement]:
    """Put the trainable form of every matched site into the model. Fitting happens here.

    Raises:
        PlmccError: a pass cannot initialise a site, for a reason in the weights.
    """
    replacements = []
    for index, site in matched.sites:
        chosen = matched.passes[index]
        name = catalog.name_of(type(chosen))
        try:
            soft = chosen.replace(site)
        except PlmccError:
            raise
        except ValueError as problem:
            raise error(
                "PLM203", f"`{name}` cannot rewrite it: {problem}", f"model: {site.path}"
            ) from None
        soft.train(site.module.training)
        objective = chosen.objective(site, soft)
        original = tuple(site.module.state_dict())
        splice(model, site.paths, site.roles, soft)
        replacements.append(Replacement(name, chosen, site, soft, objective, original))
    return replacements


def harden_all(model: PreTrainedModel, replacements: Sequence[Replacement]) -> list[Record]:
    """Put the deployed form of every site into the model and return what an artifact has to say of
    them."""
    records = []
    for done in replacements:
        hard = done.soft.harden().train(done.soft.training)
        splice(model, done.site.paths, done.site.roles, hard)
        kept = model.get_submodule(done.site.path).state_dict()
        records.append(
            Record(
                done.name,
                done.site.paths,
                done.site.roles,
                type(hard).__name__,
                hard.layout,
                tuple(n for n in done.original if n not in kept),
            )
        )
    return records


def splice(
    model: PreTrainedModel, paths: Sequence[str], roles: Sequence[str], module: Soft | Hard
) -> None:
    """Put a module at the first path and views of it at the others, and forget ties that are gone.

    A replacement of a layer rewrites the layer that is there.
    """
    if roles[0] == "layer":
        program = Program(model)
        if paths[0] in program.layer_paths():
            remain_layer(model.get_submodule(paths[0]))
        module.rewrite(program, paths[0])
        return
    ties = [(part, part.get_expanded_tied_weights_keys()) for part in _models(model)]
    model.set_submodule(paths[0], module)
    for path, role in zip(paths[1:], roles[1:], strict=True):
        bias = getattr(model.get_submodule(path), "bias", None)
        model.set_submodule(path, View(module, role, bias))
    for part, mapping in ties:
        _keep_ties(part, mapping)


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _keep_ties(part: PreTrainedModel, mapping: dict[str, str]) -> None:
    """transformers ties weights by name whenever it loads or resizes: names that are gone must be
    gone there too."""
    names = {name for name, _ in part.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in part.named_buffers(remove_duplicate=False)}
    part._tied_weights_keys = {t: s for t, s in mapping.items() if t in names and s in names}
    part.all_tied_weights_keys = {
        t: s for t, s in part.all_tied_weights_keys.items() if t in names and s in names
    }


def build(record: Record, device: torch.device | str = "meta") -> Hard:
    """Return the module of a record with tensors that hold nothing yet.

    Only classes that the named pass's own module defines can be built; nothing is imported by a
    path in a record.

    Raises:
        PlmccError: the pass is not installed, has no such class, or refuses the layout.
    """
    import sys

    module = sys.modules[catalog.load(record.name).__module__]
    kind = vars(module).get(record.kind)
    place = f"config.json: {record.paths[0]}"
    if not (
        isinstance(kind, type) and issubclass(kind, Hard) and kind.__module__ == module.__name__
    ):
        raise error(
            "PLM402", f"the pass `{record.name}` has no module class `{record.kind}`", place
        )
    try:
        with torch.device(device):
            return kind(**record.layout)
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
        raise error("PLM402", f"`{record.kind}` refuses its layout: {problem}", place) from None
