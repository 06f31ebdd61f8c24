"""What `plmcc plan` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plmcc.api import Miss
from plmcc.catalog import registry as catalog
from plmcc.pipeline.expected import PlannedSite
from plmcc.planning.cost import Cost
from plmcc.planning.memory import Memory
from plmcc.planning.plan import Plan, Rule
from plmcc.report.words import megabytes


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan: its rules, its figures before and after each stage, and where it can run."""
    console.print(
        f"recipe {plan.recipe} on {plan.model} ({plan.architecture}, task {plan.task}, "
        f"{plan.dtype})",
        markup=False,
    )
    for note in plan.notes:
        console.print(f"  note: {note}", markup=False)
    for stage in plan.stages:
        console.print(f"stage {stage.name}", style="bold", markup=False)
        for rule in stage.rules:
            for line in rule_lines(rule):
                console.print(f"  {line}", markup=False, soft_wrap=True)
    if not plan.problems:
        console.print(_metrics(plan))
        for line in _explained(plan):
            console.print(line, markup=False, soft_wrap=True)
        console.print(_targets(plan))
        for line in hazards(plan):
            console.print(line, markup=False, soft_wrap=True)


def hazards(plan: Plan) -> list[str]:
    """Return what a user should know of each pass of a plan, a line each."""
    names = dict.fromkeys(rule.name for stage in plan.stages for rule in stage.rules)
    found = [f"  {name}: {one}" for name in names for one in catalog.options(name).hazards]
    return ["hazards of these passes:", *found] if found else []


def short_lines(plan: Plan) -> list[str]:
    """Return what `apply` prints of a plan: a line for each rule, and the size before and after."""
    lines = []
    for stage in plan.stages:
        for rule in stage.rules:
            count = f"{len(rule.sites)} site(s)" if rule.sites else rule.note or "no site"
            lines.append(f"  {stage.name}: {rule.name}, {count}")
    last = plan.stages[-1].after if plan.stages else None
    if last is not None:
        about = any(s.about for stage in plan.stages for r in stage.rules for s in r.sites)
        words = "about " if about else ""
        sizes = f"{megabytes(plan.before.bytes)} to {words}{megabytes(last.bytes)}"
        lines.append(f"  {sizes}; `plmcc plan` shows more")
    return lines


def rule_lines(rule: Rule) -> list[str]:
    """Return the sites of a rule, those that become the same in one line, and what it leaves."""
    lines = [f"{rule.name} ({rule.location})" + (f": {rule.note}" if rule.note else "")]
    for group in _alike(rule.sites):
        first, last = group[0], group[-1]
        where = first.path if len(group) == 1 else f"{first.path} ... {last.path} ({len(group)})"
        tied = f", tied {', '.join(first.tied)}" if first.tied else ""
        shape = " x ".join(map(str, first.shape))
        what = f"{first.module} {shape}".strip()
        before, after = (sum(s.bytes for s in group), sum(s.bytes_after for s in group))
        about = f" ({first.about})" if first.about else ""
        sizes = f"{megabytes(before)} to {megabytes(after)}{about}"
        lines.append(f"  {where}{tied}: {what} becomes {first.becomes}, {sizes}")
    return lines + [f"  leaves {line}" for line in _misses(rule.misses)]


def _alike(sites: Sequence[PlannedSite]) -> list[list[PlannedSite]]:
    groups: dict[tuple[object, ...], list[PlannedSite]] = {}
    for site in sites:
        key = (
            site.tied if site.tied else (),
            site.module,
            site.shape,
            site.becomes,
            site.bytes,
            site.bytes_after,
            site.about,
        )
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _misses(misses: Iterable[Miss]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for miss in misses:
        by_reason.setdefault(miss.reason, []).append(miss.path)
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in by_reason.items()
    ]


def _metrics(plan: Plan) -> Table:
    table = Table()
    table.add_column("")
    costs = [("before", plan.before), *((s.name, s.after) for s in plan.stages)]
    for name, _ in costs:
        table.add_column(name if name == "before" else f"after {name}", justify="right")
    known = [found for _, found in costs if found is not None]
    table.add_row("parameters", *(f"{c.parameters:,}" for c in known))
    table.add_row("bytes", *(megabytes(c.bytes) for c in known), style="bold")
    for name in dict.fromkeys(n for c in known for n in c.components):
        table.add_row(f"  {name}", *(megabytes(c.components.get(name, 0)) for c in known))
    table.add_row("operations a token", *(_operations(c) for c in known))
    if any(c.cache_bytes is not None for c in known):
        cached = (c.cache_bytes for c in known)
        table.add_row("cache a token", *("-" if b is None else megabytes(b) for b in cached))
    memories = [stage.memory for stage in plan.stages]
    if any(memories):
        table.add_row(
            "memory of training", "", *(megabytes(m.total) if m else "-" for m in memories)
        )
    return table


def _operations(cost: Cost) -> str:
    found = cost.flops_per_token
    if found is None:
        return "unknown"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if found >= unit:
            return f"{found / unit:.3g} {name}FLOP"
    return f"{found:.0f} FLOP"


def _explained(plan: Plan) -> list[str]:
    """What the figures are."""
    length = plan.before.length
    lines = [
        f"operations: of matrix products, forward, in a sequence of {length} tokens, two for a"
        " multiply-add"
    ]
    unknown = [c.unknown for c in (plan.before, *(s.after for s in plan.stages)) if c and c.unknown]
    lines += [f"operations are unknown: {unknown[0]}"] if unknown else []
    for stage in plan.stages:
        lines += [_memory(stage.name, stage.memory)] if stage.memory else []
    return lines


def _memory(name: str, memory: Memory) -> str:
    acts = memory.activations
    parts = [
        f"weights {megabytes(memory.weights)}",
        f"gradients {megabytes(memory.gradients)}",
        f"optimizer {megabytes(memory.optimizer)}",
    ]
    parts += [f"teacher {megabytes(memory.teacher)}"] if memory.teacher else []
    batch = f"{memory.batch} x {memory.length} tokens"
    parts.append(f"activations {'unknown' if acts is None else megabytes(acts)} for {batch}")
    return f"memory of training {name}, estimated: {', '.join(parts)}"


def _targets(plan: Plan) -> Table:
    table = Table()
    for column in ("target", "takes it", "why"):
        table.add_column(column)
    for target in plan.targets:
        table.add_row(target.name, target.takes, escape(target.reason))
    return table
