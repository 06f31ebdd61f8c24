"""Sites with the densities that meet a target together (a helper of the movement pruning pass, not
a pass)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Protocol

from plmcc.api import Miss, Site
from plmcc.passes._latency import measure
from plmcc.passes._masked import Rules
from plmcc.passes._speed import latencies
from plmcc.passes._target import Aim, Budget, count_operations, count_parameters


class Target(Protocol):
    """What is aimed at: one of parameters, flops and latency."""

    @property
    def parameters(self) -> float | None: ...
    @property
    def flops(self) -> float | None: ...
    @property
    def latency(self) -> float | None: ...
    @property
    def length(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def device(self) -> str: ...


def aimed(sites: list[Site], rules: Rules, target: Target) -> Iterator[Site | Miss]:
    """Yield the sites with densities that meet the target together, or say that none do."""
    if not sites:
        return
    if target.latency and next(sites[0].module.parameters()).is_meta:
        yield from sites  # a plan: there is nothing to measure
        return
    aim = _timed(sites, rules, target) if target.latency else _counted(sites, rules, target)
    found = aim.densities(aim.target)
    if found is None:
        yield from (Miss(site.path, _refusal(aim, target)) for site in sites)
        return
    rest = iter(found)
    rules.density = found[0]
    # What is counted, and goes as a whole, takes nothing along: no need to measure.
    rules.aim = None if target.flops else aim
    for site in sites:
        own = list(islice(rest, len(site.facts["scored"])))
        yield replace(site, facts=site.facts | {"densities": own})


def _refusal(aim: Aim, target: Target) -> str:
    if target.latency:
        most = f"these layers reach {1 / aim.floor():.3g} times at most"
        return f"no density makes the model {target.latency:g} times as fast within 3 %: {most}"
    value = f"no density keeps {aim.target:g} within 3 %"
    return f"{value}: these layers keep at least {aim.floor():.3g}"


def _counted(sites: list[Site], rules: Rules, target: Target) -> Aim:
    per_token = partial(count_operations, length=target.length)
    count = count_parameters if target.parameters else per_token
    layers = [(s.module, s.facts["parts"], s.facts["scored"]) for s in sites]
    budget = sum((count(*layer) for layer in layers), Budget())
    value = target.parameters or target.flops or 0.0
    return Aim(budget, value, rules.together, len(budget.costs))


def _timed(sites: list[Site], rules: Rules, target: Target) -> Aim:
    found = [(site.path, site.facts["parts"]) for site in sites]
    setting = (target.batch, target.length, target.device)
    times, rest = measure(sites[0].facts["program"], found, *setting)
    layers = [(s.module, s.facts["parts"], s.facts["scored"]) for s in sites]
    for site, own in zip(sites, times, strict=True):
        site.facts["times"] = own
    budget = latencies(layers, times, rest)
    assert target.latency is not None
    return Aim(budget, 1 / target.latency, rules.together, len(budget.steps), rest)
