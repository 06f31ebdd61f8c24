"""What a search has to reach: `size<=25MB,drop<=1` as limits on what is measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from plmcc.diagnostics import Location, PlmccError, did_you_mean, error
from plmcc.recipe.metrics import check_name, lower_is_better

_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS: dict[str, dict[str, float]] = {
    "size": _BYTES | {"x": 0.0},
    "parameters": {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "x": 0.0},
    "drop": {"": 1.0, "%": 0.01},
    "quality": {"": 1.0},
    "latency": {"ms": 1e-3, "s": 1.0, "x": 0.0},
    "speed": {"": 1.0, "x": 1.0},
}
"""By quantity, what a unit is of bytes, numbers, points, the metric's unit, seconds, times; `x` is
a part of the original's, and `%` a part of its quality."""
_FORMS = (
    "size<=25MB, size<=0.5x, parameters<=10M, latency<=0.8x, speed>=2, drop<=1, drop<=5%, "
    "quality>=80"
)
_LIMIT = re.compile(
    r"\s*(?P<name>[^\s<>=≤≥,]*)\s*(?P<relation>[<>=≤≥]*)\s*(?P<number>[-+]?[\d.]*(?:[eE][-+]?\d+)?)"
    r"\s*(?P<unit>[^\s,]*)\s*"
)


EFFORTS = ("quick", "normal", "best")
"""How much `plmcc shrink` tries and trains."""
RUNTIMES = ("auto", "torch", "onnx")
"""Where its results may run."""


def check_asked(target: str, effort: str, metric: str | None, runtime: str = "auto") -> None:
    """Check what `plmcc shrink` is asked for, before anything is looked at.

    Raises:
        PlmccError: the target, the effort, the metric or the runtime is none.
    """
    if metric is not None:
        check_name(metric, "--metric")
    parse_goal(target, lower_is_better(metric or ""))
    for name, got, known in (("effort", effort, EFFORTS), ("runtime", runtime, RUNTIMES)):
        if got not in known:
            allowed, hint = ", ".join(known), did_you_mean(got, known)
            message = f"unknown {name}"
            raise error("PLM502", message, f"--{name}", got=got, allowed=allowed, hint=hint)


@dataclass(frozen=True)
class Limit:
    """One comparison of a target."""

    quantity: str
    """`size`, `parameters`, `latency`, `speed` (how many times that of the original), `quality`
    (the metric) or `drop` (points of it below the original, or a part of the original's)."""
    value: float
    """In bytes, numbers, points, the metric's unit or seconds, or the part of the original's."""
    relative: bool
    at_least: bool

    def excess(self, found: float, original: float) -> float:
        """Return by how much a value is beyond the limit, as a part of it: 0 or less is met, and
        what is not a number is infinitely far."""
        if math.isnan(found):
            return math.inf
        limit = self.value * (original if self.relative else 1)
        beyond = limit - found if self.at_least else found - limit
        return beyond / (abs(limit) or 1)


@dataclass(frozen=True)
class Goal:
    """A target: all of its limits have to be kept."""

    text: str
    limits: tuple[Limit, ...]

    @property
    def judges(self) -> bool:
        """Whether it says how good the result must be, so that what is left is to be small."""
        return any(limit.quantity in ("drop", "quality") for limit in self.limits)

    def asks(self, quantity: str) -> bool:
        """Say whether a quantity is limited."""
        return any(limit.quantity == quantity for limit in self.limits)

    def excess(
        self, metrics: Mapping[str, float], original: Mapping[str, float]
    ) -> dict[str, float]:
        """Return by how much each limit is exceeded, of those whose quantity has been measured.

        `original` has the same quantities of the original model, without latency: it is timed
        beside each result, `original_latency` of the figures.
        """
        of = {**original, "latency": metrics.get("original_latency", 0.0)}
        of["drop"] = abs(original.get("quality", 0.0))
        return {
            limit.quantity: limit.excess(metrics[limit.quantity], of.get(limit.quantity, 0.0))
            for limit in self.limits
            if limit.quantity in metrics
        }


def parse_goal(text: str, lower_is_better: bool = False) -> Goal:
    """Read a target.

    Args:
        text: comparisons with commas between them.
        lower_is_better: which way the metric goes, and with it the limit of `quality`.

    Raises:
        PlmccError: the first comparison that is wrong, with a caret.
    """
    limits: list[Limit] = []
    start = 0
    for part in text.split(","):
        limit = _limit(part, text, start, lower_is_better)
        if limit.quantity in [known.quantity for known in limits]:
            message = f"`{limit.quantity}` is limited twice"
            raise _wrong(message, text, start, part.strip(), hint="keep one")
        limits.append(limit)
        start += len(part) + 1
    return Goal(text, tuple(limits))


def _limit(part: str, text: str, start: int, lower_is_better: bool) -> Limit:
    found = _LIMIT.fullmatch(part)
    if found is None or not part.strip():
        raise _wrong("this is not a limit", text, start, part.strip(), _FORMS)

    def wrong(message: str, group: str, allowed: str, hint: str = "") -> PlmccError:
        return _wrong(message, text, start + found.start(group), found[group], allowed, hint)

    name, relation, unit = found["name"], found["relation"], found["unit"]
    if name not in _UNITS:
        hint = did_you_mean(name, _UNITS)
        raise wrong("this quantity cannot be limited", "name", ", ".join(_UNITS), hint)
    at_least = name == "speed" or (name == "quality" and not lower_is_better)
    sign = ">=" if at_least else "<="
    if relation != sign:
        raise wrong(f"`{name}` needs `{sign}`", "relation", f"{name}{sign}...")
    number = _number(found["number"])
    if not math.isfinite(number):
        raise wrong("the number is missing", "number", _FORMS)
    known = {key.lower(): factor for key, factor in _UNITS[name].items()}
    if unit.lower() not in known:
        units = ", ".join(key or "no unit" for key in _UNITS[name])
        raise wrong(f"`{name}` does not have this unit", "unit", units)
    if number <= 0 and name not in ("drop", "quality"):
        raise wrong("the limit must be positive", "number", "more than 0")
    relative = (unit == "x" and name != "speed") or unit == "%"
    if unit == "x" and relative and number > 1:
        raise wrong("a relative limit is a fraction of the original", "number", "at most 1x")
    return Limit(name, number * (known[unit.lower()] or 1), relative, at_least)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _wrong(
    message: str, text: str, at: int, token: str, allowed: str = "", hint: str = ""
) -> PlmccError:
    at += len(text[at:]) - len(text[at:].lstrip()) if token else 0
    location = Location("--target", 1, at + 1, max(1, len(token)), text)
    return error("PLM502", message, location, got=token, allowed=allowed, hint=hint)
