"""Match, replace, harden: passes rewrite a live transformers model in place.

All passes of a stage are matched before anything is replaced, so that a recipe that does not fit
leaves the model as it was, and two passes that want the same site are an error instead of a race.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.api import Hard, Layout, Miss, Objective, Pass, Site, Soft
from plmcc.catalog import registry as catalog
from plmcc.catalog.origin import Origin, origin_of
from plmcc.diagnostics import Location, PlmccError, error, listing, out_of_memory
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.layers import remain_layer
from plmcc.ir.program import Program
from plmcc.ir.sharing import share
from plmcc.utils.text import first_line
from plmcc.utils.types import Values


class View(nn.Module):
    """A module path that shares a table, or a weight, kept elsewhere: it owns at most a bias.

    The table is held in a tuple, so that it is not registered twice: its tensors have one name, are
    saved once and follow their owner's device and dtype.
    """

    def __init__(self, table: nn.Module, role: str, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        assert role in ("embedding", "head", "module"), role
        self._table, self.role = (table,), role
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, values: Tensor) -> Tensor:
        """Look up ids (...) -> (..., D), turn hidden states (..., D) into logits (..., V), or
        multiply inputs (..., I) by the weight of a linear map (..., O)."""
        table: Any = self._table[0]
        if self.role == "embedding":
            rows: Tensor = table(values)
            return rows
        work = table.attend if self.role == "head" else table.product
        # accelerate loads offloaded tensors around `forward`, which this is not.
        hook = getattr(table, "_hf_hook", None)
        if hook is None:
            home = next(table.parameters(), values)
            apart = isinstance(values, Tensor) and home.device != values.device
            # A device map may put the head and the table that it shares on two devices.
            products: Tensor = (
                work(values.to(home.device)).to(values.device) if apart else work(values)
            )
        else:
            (moved,), _ = hook.pre_forward(table, values)
            products = hook.post_forward(table, work(moved))
        return products if self.bias is None else products + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), built on demand."""
        return self._table[0].weight  # type: ignore[return-value]


class Lookup(nn.Module):
    """A coded table as peft finds it: by a parameter `weight` of as many rows as the vocabulary.

    Prompt tuning and p-tuning look ids up in the module that has such a parameter. This one has no
    columns: it takes no memory and no place in files.
    """

    def __init__(self, table: nn.Module, rows: int) -> None:
        super().__init__()
        self._table = (table,)
        like = next(table.parameters())
        empty = torch.empty(rows, 0, dtype=like.dtype, device=like.device)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) -> (..., D)."""
        rows: Tensor = self._table[0](ids)
        return rows

    def _save_to_state_dict(self, *_: object) -> None:
        pass

    def _load_from_state_dict(self, *_: object) -> None:
        pass


def name_tables(model: nn.Module) -> None:
    """Give every rewritten embedding table, and every view of one, its `Lookup`."""
    for module in list(model.modules()):
        table = module
        if isinstance(module, View) and module.role == "embedding":
            table = module._table[0]
        rows = table.layout.get("num_embeddings") if isinstance(table, Hard) else None
        if isinstance(rows, int) and next(table.parameters(), None) is not None:
            module.lookup = Lookup(table, rows)


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
    origin: Origin | None = None
    """The code that made it; None for a pass of plmcc."""

    def to_json(self) -> Values:
        """Return plain values; `from_json` reads them back."""
        made = {"origin": self.origin.to_json()} if self.origin is not None else {}
        return made | {
            "pass": self.name,
            "paths": list(self.paths),
            "roles": list(self.roles),
            "class": self.kind,
            "layout": self.layout,
            "removed": list(self.removed),
        }

    @classmethod
    def from_json(cls, values: Values) -> Record:
        """Read what `to_json` wrote.

        Raises:
            PlmccError: a key is missing or has another type.
        """
        try:
            lists = [
                tuple(str(item) for item in values[key]) for key in ("paths", "roles", "removed")
            ]
            layout = dict(values["layout"])
            origin = Origin.from_json(values["origin"]) if "origin" in values else None
            record = cls(
                str(values["pass"]),
                lists[0],
                lists[1],
                str(values["class"]),
                layout,
                lists[2],
                origin,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
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
    dtypes: frozenset[torch.dtype]
    """Of the site's floating tensors before it was rewritten."""


After = Callable[[Sequence[Replacement]], None]


@dataclass(frozen=True)
class Matched:
    """What the passes of a stage found: pairs of (index of the pass, site), and refused places."""

    passes: tuple[Pass, ...]
    sites: tuple[tuple[int, Site], ...]
    misses: tuple[tuple[int, Miss], ...]
    program: Program


def match(
    model: PreTrainedModel,
    passes: Sequence[Pass],
    locations: Sequence[Location | str] = (),
    data: CalibrationData | None = None,
) -> Matched:
    """Match all passes against the model without changing it.

    Args:
        model: the model to look at.
        passes: the passes of one stage.
        locations: where each pass stands in the recipe, for errors.
        data: rows that passes may measure on.

    Raises:
        PlmccError: a pass matches nothing, refuses all it matches, or wants what another pass has
            taken.
    """
    program = Program(model, data)
    sites: list[tuple[int, Site]] = []
    misses: list[tuple[int, Miss]] = []
    taken: dict[str, str] = {}
    for index, chosen in enumerate(passes):
        location = locations[index] if locations else f"pass {index}"
        found, refused = match_pass(program, chosen, location)
        for site in found:
            claim(site, chosen, taken, location)
        sites += [(index, site) for site in found]
        misses += [(index, miss) for miss in refused]
    return Matched(tuple(passes), tuple(sites), tuple(misses), program)


def match_pass(
    program: Program, chosen: Pass, location: Location | str
) -> tuple[list[Site], list[Miss]]:
    """Return what one pass finds, and the places that it refuses.

    Raises:
        PlmccError: it finds nothing, or another number of sites than expected.
    """
    try:
        with calling(chosen, "match", location):
            results = list(chosen.match(program))
    except PlmccError as problem:
        done = [path for path, part in program.model.named_modules() if isinstance(part, Hard)]
        hint = f"{listing(done, 3)}: already rewritten, no longer a target" if done else ""
        found = [replace(d, location=location, hint=hint or d.hint) for d in problem.diagnostics]
        raise PlmccError(*found) from problem.__cause__
    results = [_if_whole(program, result) for result in results]
    sites = [result for result in results if isinstance(result, Site)]
    misses = [result for result in results if isinstance(result, Miss)]
    if not sites:
        reasons = _reasons(misses) or "nothing was found"
        what = "refuses all that it matches" if misses else "has nothing to rewrite"
        message = f"`{catalog.name_of(type(chosen))}` {what} in this model"
        raise error(
            "PLM203", message, location, got=reasons, hint="change `targets` or the options"
        )
    return sites, misses


def _if_whole(program: Program, found: Site | Miss) -> Site | Miss:
    """Refuse a layer that shares its tensors with another, unless a site has both; that is also
    why one is refused that lacks them."""
    if isinstance(found, Site) and found.roles[0] != "layer":
        return found
    paths = found.paths if isinstance(found, Site) else (found.path,)
    inside = tuple(f"{path}." for path in paths)
    for member, owner in program.sharing().items():
        if f"{member}.".startswith(inside) != f"{owner}.".startswith(inside):
            return Miss(found.path, f"it shares its tensors: {member} uses those of {owner}")
    return found


@contextmanager
def calling(chosen: Pass, hook: str, where: Location | str) -> Iterator[None]:
    """Turn an exception of a pass that is no refusal into an error that says where it was raised.

    Raises:
        PlmccError: the pass refuses, or it has failed.
    """
    try:
        yield
    except PlmccError as problem:
        found = [d if d.location else replace(d, location=where) for d in problem.diagnostics]
        raise PlmccError(*found) from problem.__cause__
    except Exception as problem:
        if out_of_memory(problem):
            raise
        name = catalog.name_of(type(chosen))
        frame = _deepest_frame(problem, type(chosen).__module__)
        words = f"{type(problem).__name__}: {first_line(problem)}"
        message = f"the pass `{name}` failed in `{hook}`: {words}"
        hint = "this is a bug of the pass; `plmcc --debug` shows the traceback"
        raise error("PLM112", message, where, got=frame, hint=hint) from problem


def _deepest_frame(problem: BaseException, module: str) -> str:
    """Return file and line of the last call in the package of a pass, or of the last call."""
    shipped = "plmcc.passes."
    package = module.removeprefix(shipped).partition(".")[0]
    head = f"{shipped}{package}" if module.startswith(shipped) else package
    frames = list(traceback.walk_tb(problem.__traceback__))
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{head}.")]
    frame, line = frames[inside[-1] if inside else -1]
    return f"{Path(frame.f_code.co_filename).name}, line {line}"


def _reasons(misses: Sequence[Miss]) -> str:
    """Return every reason once, with the first of the places that it is for."""
    locations: dict[str, list[str]] = {}
    for miss in misses:
        locations.setdefault(miss.reason, []).append(miss.path)
    more = {reason: f" and {len(paths) - 1} more" for reason, paths in locations.items()}
    return "; ".join(
        f"{paths[0]}{more[reason] if len(paths) > 1 else ''}: {reason}"
        for reason, paths in locations.items()
    )


def claim(site: Site, chosen: Pass, taken: dict[str, str], location: Location | str) -> None:
    """Note in `taken` (path -> name of the pass) that a pass wants a site.

    Raises:
        PlmccError: another pass has it, or something in it or around it.
    """
    name = catalog.name_of(type(chosen))
    for path in site.paths:
        for other, owner in taken.items():
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                message = f"`{name}` and `{owner}` both rewrite {path}"
                hint = "give them different `targets`, put them into stages, or keep one"
                if path != other:
                    message = f"`{name}` rewrites {path}, and `{owner}` rewrites {other}"
                    hint = "put them into separate `stages`: one module contains the other"
                raise error("PLM204", message, location, hint=hint)
        taken[path] = name


def replace_all(
    model: PreTrainedModel, matched: Matched, after: After = lambda done: None
) -> list[Replacement]:
    """Put the trainable form of every matched site into the model. Fitting happens here.

    Args:
        model: the model that was matched.
        matched: its sites.
        after: called with the sites of each pass when all of them are in place.

    Raises:
        PlmccError: a pass cannot initialize a site, for a reason in the weights.
    """
    replacements: list[Replacement] = []
    for index, chosen in enumerate(matched.passes):
        sites = [site for at, site in matched.sites if at == index]
        matched.program.data.sites = sites
        done = [_replaced(matched.program, chosen, site) for site in sites]
        if done:
            after(done)
        replacements += done
    return replacements


def _replaced(program: Program, chosen: Pass, site: Site) -> Replacement:
    with calling(chosen, "replace", f"model: {site.path}"):
        soft = chosen.replace(site, program)
        check_form(chosen, "replace", soft, site)
        soft.train(site.module.training)
        objective = chosen.objective(site, soft)
    tensors = site.module.state_dict()
    dtypes = frozenset(v.dtype for v in tensors.values() if v.is_floating_point())
    splice(program, site.paths, site.roles, soft)
    name = catalog.name_of(type(chosen))
    return Replacement(name, chosen, site, soft, objective, tuple(tensors), dtypes)


def check_form(chosen: Pass, hook: str, made: object, site: Site) -> None:
    """Check that a hook of a pass, which is foreign code, returns the form that it is for.

    Raises:
        PlmccError: it returns something else.
    """
    kind = Soft if hook == "replace" else Hard
    if isinstance(made, kind):
        return
    name, given = catalog.name_of(type(chosen)), type(made).__name__
    message = f"`{hook}` of `{name}` returns a {given}, which is no `{kind.__name__}`"
    hint = ""
    if isinstance(made, Hard):
        hint = f"`kit.Trainable({given}(...))` trains a `Hard` module as it is"
    raise error("PLM112", message, f"model: {site.path}", hint=hint)


def harden_all(
    model: PreTrainedModel, replacements: Sequence[Replacement], after: After = lambda done: None
) -> list[Record]:
    """Put the deployed form of every site into the model and return what an artifact has to say of
    them. `after` is called with the sites of each pass when all of them are in place."""
    records, program = [], Program(model)
    for _, group in itertools.groupby(replacements, lambda one: id(one.options)):
        done = list(group)
        records += [_hardened(program, one) for one in done]
        after(done)
    return records


def _hardened(program: Program, done: Replacement) -> Record:
    site = done.site
    with calling(done.options, "harden", f"model: {site.path}"):
        hard = done.soft.harden()
        check_form(done.options, "harden", hard, site)
        hard.train(done.soft.training)
    splice(program, site.paths, site.roles, hard)
    kept = program.model.get_submodule(site.path).state_dict()
    removed = tuple(name for name in done.original if name not in kept)
    kind, origin = type(hard).__name__, origin_of(done.name)
    return Record(done.name, site.paths, site.roles, kind, hard.layout, removed, origin)


def splice(
    program: Program, paths: Sequence[str], roles: Sequence[str], module: Soft | Hard
) -> None:
    """Put a module at the first path and views of it at the others, and forget ties that are gone.

    A replacement of a layer rewrites the layer that is there, and those that share its tensors.
    """
    model = program.model
    if roles[0] == "layer":
        for path in paths:
            if program.is_layer(path):
                remain_layer(model.get_submodule(path))
            module.rewrite(program, path)
        stack, _, first = paths[0].rpartition(".")
        others = (path.rpartition(".")[2] for path in paths[1:])
        share(model.get_submodule(stack), dict.fromkeys(others, first))
        share(model.get_submodule(paths[0]), module.shares)
        return
    if "module" in roles[1:] and getattr(type(module), "product", None) is None:
        message = f"it shares its weight with {listing(paths[1:], 3)}"
        hint = "leave it out of `targets`; for authors: use `plmcc.kit.HardLinear` and `Trainable`"
        raise error("PLM203", message, f"model: {paths[0]}", hint=hint)
    ties = [(part, _ties(part)) for part in _models(model)]
    model.set_submodule(paths[0], module)
    share(module, module.shares)
    for path, role in zip(paths[1:], roles[1:], strict=True):
        bias = getattr(model.get_submodule(path), "bias", None)
        model.set_submodule(path, View(module, role, bias))
    for part, mapping in ties:
        _keep_ties(part, mapping)


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _ties(part: PreTrainedModel) -> dict[str, str]:
    """Return the tied names of a model: which one is that of another.

    Raises:
        PlmccError: its class says it in a way that transformers does not understand.
    """
    try:
        found: dict[str, str] = part.get_expanded_tied_weights_keys()
    except ValueError as problem:
        message = f"transformers cannot say which weights of {type(part).__name__} are tied"
        raise error("PLM203", message, got=first_line(problem)) from problem
    return found


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
    location = f"config.json: {record.paths[0]}"
    kind = _hard_class(record)
    if kind is None:
        chosen = catalog.load(record.name)
        message = f"the pass `{record.name}` has no module class `{record.kind}`"
        hint = f"define it in {chosen.__module__}, or import it there from a module below it"
        raise error("PLM402", message, location, hint=hint)
    try:
        with torch.device(device):
            return kind(**record.layout)
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
        message = f"`{record.kind}` rejects its layout: {problem}"
        hint = "for authors: `layout` holds every argument of the constructor"
        raise error("PLM402", message, location, hint=hint) from None


def _hard_class(record: Record) -> type[Hard] | None:
    """Return the class of a record, if the module of its pass, or one below it, defines it."""
    try:
        chosen = catalog.load(record.name)
    except PlmccError as problem:
        made = record.origin
        if made is None or record.name in catalog.names():
            raise
        message = f"the artifact needs the pass `{record.name}` of {made}, which is not installed"
        hint = f"pip install {made.distribution}=={made.version}"
        if not made.distribution:
            message = f"the artifact needs the pass `{record.name}`, {made}"
            hint = "define the class and call `plmcc.register` before loading"
        at = f"config.json: {record.paths[0]}"
        raise error("PLM402", message, at, hint=hint) from problem
    if catalog.is_registered(record.name):  # perhaps within a function, or a cell that ran twice
        known = [kind for kind in _subclasses(Hard) if kind.__name__ == record.kind]
        return next((k for k in reversed(known) if k.__module__ == chosen.__module__), None)
    module = sys.modules[chosen.__module__]
    found = getattr(module, record.kind, None)
    if not (isinstance(found, type) and issubclass(found, Hard)):
        return None
    return found if f"{found.__module__}.".startswith(f"{module.__name__}.") else None


def _subclasses(kind: type[Hard]) -> list[type[Hard]]:
    return [one for child in kind.__subclasses__() for one in (child, *_subclasses(child))]


def changed_code(record: Record) -> str:
    """Return how the installed code of a record's pass differs from what made it; or nothing.

    A pass that is not there is told when its modules are built.
    """
    if record.origin is None or record.name not in catalog.names():
        return ""
    now = origin_of(record.name)
    return now.differs(record.origin) if now is not None else ""
