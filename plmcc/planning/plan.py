"""What a recipe will do to a model, found out on the meta device: no weights are read.

Every rule is matched, the places that it finds are given the form that the pass will leave (`Pass.
plan`), and the model so changed is counted, and is what the next stage is matched against.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from plmcc.api import Miss, Pass, Site
from plmcc.artifact.size import component_bytes
from plmcc.artifact.stock import needs_plmcc
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import Diagnostic, Location, PlmccError, error
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.modules import output_depth
from plmcc.ir.program import Program
from plmcc.models.new import new_source
from plmcc.models.reduced import Reducible
from plmcc.models.source import Source, load_source
from plmcc.pipeline.datasets import infer_label_space
from plmcc.pipeline.expected import UNKNOWN, PlannedSite, carry_out
from plmcc.pipeline.prepare import CHECKS, prepare, prepares, store, stored_dtype, widened_note
from plmcc.pipeline.trial import try_out
from plmcc.pipeline.untrained import bits_note
from plmcc.planning.cost import Cost, cost
from plmcc.planning.deploy import Target, targets
from plmcc.planning.memory import Extra, Memory, training_memory
from plmcc.recipe.load import Recipe, Scratch, Stage
from plmcc.recipe.needs import check_calibrated
from plmcc.rewrite import claim, match_pass
from plmcc.training.distillation import layer_map
from plmcc.utils.text import first_line
from plmcc.utils.types import Values


@dataclass(frozen=True)
class Rule:
    """A pass of the recipe: the sites that it rewrites, the places that it leaves and why."""

    name: str
    location: str
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
    needs_plmcc: str = ""
    """Why the result is loaded with plmcc only; empty where transformers loads it alone."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the recipe fits the model, and the costs of all sites are known."""
        sites = [site for stage in self.stages for rule in stage.rules for site in rule.sites]
        return not self.problems and not any(site.about.startswith(UNKNOWN) for site in sites)

    def to_json(self) -> Values:
        """Return plain values, for programs."""
        values = asdict(self) | {"ok": self.ok, "before": self.before.to_json()}
        del values["problems"]
        for stage, shown in zip(self.stages, values["stages"], strict=True):
            shown["after"] = stage.after.to_json() if stage.after else None
            if stage.memory:
                shown["memory"]["total"] = stage.memory.total
        found = PlmccError(*self.problems).to_json() if self.problems else []
        return values | {"diagnostics": found}


def load_outline(recipe: Recipe, name: str | None, base: Path | None = None) -> Source:
    """Return the model of a recipe without its weights, on the meta device.

    Args:
        recipe: says the task, and the model where `name` is None.
        name: a directory (config.json is enough), a hub id, or a file of word vectors.
        base: the folder that relative data paths may start at besides the current one.

    Raises:
        PlmccError: no model is given, or it cannot be built.
    """
    model = name or recipe.model
    if model is None:
        hint = "add MODEL to the command line, or `model:` to the recipe"
        raise error("PLM502", "no model is given", f"recipe {recipe.name}", hint=hint)
    if isinstance(model, Scratch):
        return new_source(recipe, base, meta=True)
    try:
        head = infer_label_space(recipe, base)
    except PlmccError as problem:
        head, note = None, f"the head is the config's own: {problem.diagnostics[0].message}"
    else:
        note = ""
    source = load_source(model, recipe.task, head, meta=True)
    return replace(source, notes=(*source.notes, note)) if note else source


def plan(
    recipe: Recipe, name: str | Source | None = None, base: Path | None = None, brief: bool = False
) -> Plan:
    """Plan a recipe on a model.

    Args:
        recipe: with passes of real classes (`load_recipe(path, load_torch=True)`).
        name: as in `load_outline`, or what it returned (which is changed); by default the recipe's
            model.
        base: the folder that relative data paths may start at besides the current one.
        brief: match and count sizes only.

    Raises:
        PlmccError: no model is given, or it cannot be built. What is wrong with the rules is in
            the plan's `problems`.
    """
    start = time.perf_counter()
    source = name if isinstance(name, Source) else load_outline(recipe, name, base)
    model = source.model
    made = Plan(
        recipe.name,
        source.name,
        type(model).__name__,
        source.task,
        str(stored_dtype(recipe, model)).removeprefix("torch."),
        cost(model, run=not brief),
    )
    made.notes += filter(None, [widened_note(recipe, model)])
    original = sum(component_bytes(model).values())
    store(recipe, model)
    untouched = Reducible.of(model)  # before rules change it
    teacher = copy.deepcopy(model.config)
    for check in CHECKS:
        with _problems_of(made):
            check(recipe, source)
    rewritten: list[tuple[str, str, str]] = []
    done: dict[str, str] = {}
    with _problems_of(made):
        sites = prepare(recipe, source, base, lambda _: None).sites
        done = {item["pass"]: _statistics(item["statistics"]) for item in sites}
    for number, stage in enumerate(recipe.steps()):
        rules, extra = _stage(recipe, number, done, model, made, rewritten)
        with _problems_of(made):
            _check_depths(stage, model, teacher)
        memory = after = None
        if not made.problems:
            if stage.train is not None and not brief:
                wide = copy.deepcopy(model).float() if widened_note(recipe, model) else model
                memory = training_memory(wide, stage, stage.train, extra, original)
            after = cost(model, named=made.before.components, run=not brief)
        made.stages.append(StagePlan(stage.name, tuple(rules), memory, after))
        if made.problems:
            left = ", ".join(later.name for later in recipe.steps()[number + 1 :])
            made.notes += [f"not planned until this is solved: stage {left}"] if left else []
            break
    with _problems_of(made):
        check_calibrated(recipe)
    if not (brief or made.problems):
        with _problems_of(made):
            try_out(recipe, untouched)
    made.notes[:0] = source.notes
    planned = [(s.name, site) for s in made.stages for rule in s.rules for site in rule.sites]
    made.notes += _larger(made) + bits_note(recipe, source, planned)
    made.needs_plmcc = "" if made.problems else needs_plmcc(model)
    changed = rewritten if made.needs_plmcc else []
    made.targets = [] if made.problems else targets(model, changed, made.needs_plmcc)
    made.seconds = round(time.perf_counter() - start, 3)
    return made


@contextmanager
def _problems_of(made: Plan) -> Iterator[None]:
    """List errors in the plan."""
    try:
        yield
    except PlmccError as problem:
        made.problems += [d for d in problem.diagnostics if d not in made.problems]


def _check_depths(stage: Stage, model: PreTrainedModel, teacher: PreTrainedConfig) -> None:
    """Check that layers can follow those of the original."""
    distill = stage.train.distill if stage.train else None
    if distill is not None and distill.hidden_states and distill.teacher == "original":
        layer_map(distill, output_depth(model.config), output_depth(teacher))


def _larger(made: Plan) -> list[str]:
    last = made.stages[-1].after if made.stages else None
    larger = last is not None and last.bytes > made.before.bytes
    return ["the result is larger than the original"] if larger else []


def _statistics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in metrics.items())


def _prepared(recipe: Recipe, number: int, index: int, done: dict[str, str]) -> Rule:
    name = catalog.name_of(type(recipe.steps()[number].passes[index]))
    return Rule(
        name,
        str(recipe.pass_location(number, index)),
        note=done.get(name, ""),
        failed=name not in done,
    )


def _stage(
    recipe: Recipe,
    number: int,
    prepared: dict[str, str],
    model: PreTrainedModel,
    made: Plan,
    rewritten: list[tuple[str, str, str]],
) -> tuple[list[Rule], Extra]:
    """Match the rules of a stage, all before any of them changes the model, and then carry them
    out."""
    later = any(stage.train for stage in recipe.steps()[number:])
    data = CalibrationData(planned=recipe.calibration() is not None or later)
    taken: dict[str, str] = {}
    rules: list[Rule] = []
    found: list[tuple[int, Pass, list[Site]]] = []
    for index, one in enumerate(recipe.steps()[number].passes):
        if prepares(one):
            rules.append(_prepared(recipe, number, index, prepared))
            continue
        location = recipe.pass_location(number, index, "targets")
        rule, sites = _matched(Program(model, data), one, location, taken, made)
        rules.append(rule)
        found.append((index, one, sites))
    extra = Extra()
    for index, one, sites in found if not made.problems else ():
        name = rules[index].name
        program = Program(model, data)
        program.data.sites = sites
        planned: list[PlannedSite] = []
        with _problems_of(made):
            planned += [_carried_out(program, one, site, extra) for site in sites]
        rules[index] = Rule(name, rules[index].location, tuple(planned), rules[index].misses)
        rewritten += [(name, site.path, site.becomes) for site in planned]
    return rules, extra


def _matched(
    program: Program,
    chosen: Pass,
    location: Location | str,
    taken: dict[str, str],
    made: Plan,
) -> tuple[Rule, list[Site]]:
    name = catalog.name_of(type(chosen))
    try:
        sites, misses = match_pass(program, chosen, location)
        for site in sites:
            claim(site, chosen, taken, location)
    except PlmccError as problem:
        cause = problem.__cause__
        if isinstance(cause, (RuntimeError, NotImplementedError)):
            reason = f"its matching needs the values of the weights: {first_line(cause)}"
            return Rule(name, str(location), note=f"cannot be planned: {reason}"), []
        made.problems += [d for d in problem.diagnostics if d not in made.problems]
        return Rule(name, str(location), note=problem.diagnostics[0].message, failed=True), []
    return Rule(name, str(location), misses=tuple(misses)), sites


def _carried_out(program: Program, chosen: Pass, site: Site, extra: Extra) -> PlannedSite:
    """Give a site the form that it will have, and count what training holds beside it."""
    shown, planned = carry_out(program, chosen, site)
    if planned is not None:
        extra.trained += planned.trained
        extra.frozen += planned.frozen
        after = program.model.get_submodule(site.path).parameters()
        extra.ours += planned.trained + sum(p.numel() for p in after)
    return shown
