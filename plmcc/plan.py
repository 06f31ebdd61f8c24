"""What a recipe will do to a model, found out on the meta device: no weights are read.

Every rule is matched, the places that it finds are given the form that the pass will leave (`Pass.
plan`), and the model so changed is counted, and is what the next stage is matched against.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from plmcc import catalog
from plmcc.api import Miss, Pass, Planned, Site
from plmcc.cost import Cost, cost
from plmcc.deploy import Target, targets
from plmcc.diagnostics import Diagnostic, Place, PlmccError, error
from plmcc.lessons import head_shown
from plmcc.preparing import check_lower, check_trained, prepare, prepares, quantization, widen
from plmcc.program import Program
from plmcc.recipe import Recipe, Scratch
from plmcc.result import Result
from plmcc.rewrite import claim, match_pass, splice
from plmcc.scratch import new_source
from plmcc.size import component_bytes, module_bytes
from plmcc.source import Source, load_source
from plmcc.training_memory import Extra, Memory, training_memory


@dataclass(frozen=True)
class PlannedSite:
    """A place that a rule rewrites, before and after. `about` says why the size is not exact."""

    path: str
    tied: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    """Of the weight; of a layer, empty."""
    module: str
    becomes: str
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    about: str = ""


@dataclass(frozen=True)
class Rule:
    """A pass of the recipe: the sites that it rewrites, the places that it leaves and why."""

    name: str
    place: str
    sites: tuple[PlannedSite, ...] = ()
    misses: tuple[Miss, ...] = ()
    note: str = ""
    """What else is to be said: figures of `prepare`, or why nothing can be planned."""
    failed: bool = False


@dataclass(frozen=True)
class StagePlan:
    """A stage: its rules, what its training takes, and what the model costs afterwards."""

    name: str
    rules: tuple[Rule, ...]
    memory: Memory | None = None
    after: Cost | None = None


@dataclass
class Plan:
    """A recipe on a model. `problems` are what `apply` would stop at."""

    recipe: str
    model: str
    architecture: str
    task: str
    dtype: str
    before: Cost
    stages: list[StagePlan] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for programs."""
        values = asdict(self) | {"ok": not self.problems, "before": self.before.to_json()}
        del values["problems"]
        for stage, shown in zip(self.stages, values["stages"], strict=True):
            shown["after"] = stage.after.to_json() if stage.after else None
            if stage.memory:
                shown["memory"]["total"] = stage.memory.total
        found = PlmccError(*self.problems).to_json() if self.problems else []
        return values | {"diagnostics": found}


def outlined(recipe: Recipe, name: str | None, base: Path | None = None) -> Source:
    """Return the model of a recipe without its weights, on the meta device.

    Args:
        recipe: says the task, and the model where `name` is None.
        name: a directory (config.json is enough), a hub id, or a file of word vectors.
        base: the folder that relative data paths may start at besides the current one.

    Raises:
        PlmccError: no model is named, or it cannot be built.
    """
    model = name or recipe.model
    if model is None:
        cure = "add MODEL to the command line, or `model:` to the recipe"
        raise error("PLM502", "no model is named", f"recipe {recipe.name}", cure=cure)
    if isinstance(model, Scratch):
        return new_source(recipe, base, meta=True)
    try:
        head = head_shown(recipe, base)
    except PlmccError as problem:
        head, note = None, f"the head is the config's own: {problem.diagnostics[0].message}"
    else:
        note = ""
    source = load_source(model, recipe.task, head, meta=True)
    source.notes += (note,) if note else ()
    return source


def plan(
    recipe: Recipe, name: str | Source | None = None, base: Path | None = None, brief: bool = False
) -> Plan:
    """Plan a recipe on a model.

    Args:
        recipe: with passes of real classes (`load_recipe(path, real=True)`).
        name: as in `outlined`, or what it returned (which is changed); by default the recipe's
            model.
        base: the folder that relative data paths may start at besides the current one.
        brief: match and count sizes only.

    Raises:
        PlmccError: no model is named, or it cannot be built. What is wrong with the rules is in
            the plan's `problems`.
    """
    start = time.perf_counter()
    source = name if isinstance(name, Source) else outlined(recipe, name, base)
    model = source.model
    made = Plan(recipe.name, source.name, type(model).__name__, source.task,
                str(model.dtype).removeprefix("torch."), cost(model, run=not brief))  # fmt: skip
    widen(recipe, source)
    original = sum(component_bytes(model).values())
    _checked(made, lambda: check_lower(recipe, model))
    _checked(made, lambda: check_trained(recipe))
    rewritten: list[tuple[str, str, str]] = []
    figures = Result(model)
    _checked(made, lambda: prepare(recipe, source, base, figures, lambda _: None))
    done = {item["pass"]: _figures(item["figures"]) for item in figures.sites}
    for number, stage in enumerate(recipe.steps()):
        rules = [
            _prepared(recipe, number, index, done) if prepares(chosen) else Rule("", "")
            for index, chosen in enumerate(stage.passes)
        ]
        chosen = [
            (index, one, recipe.pass_place(number, index, "targets"))
            for index, one in enumerate(stage.passes)
            if not prepares(one)
        ]
        extra = _stage(chosen, model, rules, made, rewritten)
        memory = None
        if stage.train is not None and not brief and not made.problems:
            memory = training_memory(model, stage, stage.train, extra, original)
        named = made.before.components
        after = None if made.problems else cost(model, named=named, run=not brief)
        made.stages.append(StagePlan(stage.name, tuple(rules), memory, after))
        if made.problems:
            left = [later.name for later in recipe.steps()[number + 1 :]]
            if left:
                made.notes.append(f"not planned, until that is solved: stage {', '.join(left)}")
            break
    if recipe.lower is not None and recipe.lower.quantize and not made.problems:
        last, rules = quantization(recipe.lower.quantize), [Rule("", "")]
        place = recipe.place(("lower", "quantize"))
        _stage([(0, last.passes[0], place)], model, rules, made, rewritten)
        after = None if made.problems else cost(model, named=made.before.components, run=not brief)
        made.stages.append(StagePlan(last.name, tuple(rules), None, after))
    made.notes[:0] = source.notes
    made.targets = [] if made.problems else targets(model, rewritten)
    made.seconds = round(time.perf_counter() - start, 3)
    return made


def _checked(made: Plan, check: Any) -> None:
    try:
        check()
    except PlmccError as problem:
        made.problems += [d for d in problem.diagnostics if d not in made.problems]


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in figures.items())


def _prepared(recipe: Recipe, number: int, index: int, done: dict[str, str]) -> Rule:
    name = catalog.name_of(type(recipe.steps()[number].passes[index]))
    return Rule(name, str(recipe.pass_place(number, index)), note=done.get(name, ""),
                failed=name not in done)  # fmt: skip


def _stage(
    chosen: list[tuple[int, Pass, Place | str]],
    model: PreTrainedModel,
    rules: list[Rule],
    made: Plan,
    rewritten: list[tuple[str, str, str]],
) -> Extra:
    """Match the rules of a stage, all before any of them changes the model, and then carry them
    out."""
    taken: dict[str, str] = {}
    found: list[tuple[int, Pass, list[Site]]] = []
    for index, one, place in chosen:
        rules[index], sites = _matched(model, one, place, taken, made)
        found.append((index, one, sites))
    extra = Extra()
    for index, one, sites in found if not made.problems else ():
        name = rules[index].name
        planned = [_carried_out(model, one, site, extra) for site in sites]
        rules[index] = Rule(name, rules[index].place, tuple(planned), rules[index].misses)
        rewritten += [(name, site.path, site.becomes) for site in planned]
    return extra


def _matched(
    model: PreTrainedModel, chosen: Pass, place: Place | str, taken: dict[str, str], made: Plan
) -> tuple[Rule, list[Site]]:
    name = catalog.name_of(type(chosen))
    try:
        sites, misses = match_pass(Program(model), chosen, place)
        for site in sites:
            claim(site, chosen, taken, place)
    except PlmccError as problem:
        made.problems += [d for d in problem.diagnostics if d not in made.problems]
        return Rule(name, str(place), note=problem.diagnostics[0].message, failed=True), []
    except (RuntimeError, NotImplementedError) as problem:
        reason = f"it looks at values while it matches: {_line(problem)}"
        return Rule(name, str(place), note=f"cannot be planned: {reason}"), []
    return Rule(name, str(place), misses=tuple(misses)), sites


def _carried_out(model: PreTrainedModel, chosen: Pass, site: Site, extra: Extra) -> PlannedSite:
    """Give a site the form that it will have."""
    module, before = type(site.module).__name__, module_bytes(site.module)
    numbers = _count(site.module)
    shape = () if site.roles[0] == "layer" else _shape(site.module)
    planned = _planned(chosen, site)
    about = planned if isinstance(planned, str) else planned.about
    if isinstance(planned, Planned):
        splice(model, site.paths, site.roles, planned.module)
        extra.trained += planned.trained
        extra.frozen += planned.frozen
        extra.ours += planned.trained + _count(model.get_submodule(site.path))
    after = model.get_submodule(site.path)
    name = type(planned.module if isinstance(planned, Planned) else after).__name__
    return PlannedSite(site.path, site.paths[1:], site.kind, shape, module, name, numbers,
                       _count(after), before, module_bytes(after), about)  # fmt: skip


def _planned(chosen: Pass, site: Site) -> Planned | str:
    """Return what a site becomes, or why nobody knows."""
    dtype = next((p.dtype for p in site.module.parameters() if p.is_floating_point()), None)
    try:
        with torch.device("meta"):
            planned = chosen.plan(site)
            if planned is None:
                soft = chosen.replace(site)
                more = _count(soft)
                hard = soft.harden()
                planned = Planned(hard, trained=max(0, more - _count(hard)))
    except PlmccError:
        raise
    except Exception as problem:  # a pass of somebody else, which may look at values
        return f"unknown, counted as it is: {_line(problem)}"
    planned.module.to(dtype=dtype)
    planned.module.train(site.module.training)
    return planned


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return tuple(weight.shape) if weight is not None else ()


def _line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
