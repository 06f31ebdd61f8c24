"""Charts of a whole run, for the top of its report: sizes, quality, latency, errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from plmcc.report.charts import Bar, bars, chart_id, figure
from plmcc.report.summary import Component, Measured, Speed, Summary
from plmcc.report.words import megabytes, milliseconds, number

_COMPONENTS = 12
BEFORE, AFTER = "original", "compressed"
_ERROR = "relative_error"


def overview(summary: Summary) -> Iterator[str]:
    """Yield figures, each where there is something to draw.

    Bars have the ids `bytes:<what>:<component>`, `quality:<what>:<number>:<metric>` and
    `latency:<what>:<number>:<setting>`.
    """
    if summary.components:
        yield _bytes(summary.components)
    if summary.metrics:
        yield _quality(summary.metrics)
    if summary.speed:
        yield _latency(summary.speed)


def _bytes(parts: Sequence[Component]) -> str:
    """The largest components by name, and all others as one."""
    shown = list(parts[:_COMPONENTS])
    rest = parts[_COMPONENTS:]
    if rest:
        sizes = sum(one.before for one in rest), sum(one.after for one in rest)
        shown.append(Component(f"{len(rest)} smaller ones", "", *sizes, ()))
    groups = []
    for part in shown:
        sizes = part.before, part.after
        pair = [
            Bar(color, size, megabytes(size), chart_id("bytes", what, part.name))
            for color, (what, size) in enumerate(zip((BEFORE, AFTER), sizes, strict=True))
        ]
        groups.append((part.name, part.passes, pair))
    return figure("Size by component", bars(groups), (BEFORE, AFTER))


def _quality(metrics: Sequence[Measured]) -> str:
    """The bars of each metric are relative to the larger of the two."""
    groups = []
    for count, one in enumerate(metrics, 1):
        values = (BEFORE, one.before), (AFTER, one.after)
        most = max((abs(value) for _, value in values if value is not None), default=0.0) or 1.0
        pair = [
            Bar(color, value / most, number(value), chart_id("quality", what, count, one.metric))
            for color, (what, value) in enumerate(values)
            if value is not None
        ]
        groups.append((one.data, one.metric, pair))
    return figure("Quality by dataset", bars(groups), (BEFORE, AFTER))


def _latency(rows: Sequence[Speed]) -> str:
    """Times relative to the original's, with their spread."""
    groups = []
    for count, row in enumerate(rows, 1):
        name = chart_id(count, row.mode, f"{row.batch} x {row.length}")
        pair = [
            Bar(0, 1.0, milliseconds(row.original), chart_id("latency", BEFORE, name)),
            Bar(1, row.ratio, milliseconds(row.compressed), chart_id("latency", AFTER, name)),
        ]
        groups.append((row.setting, f"time {row.change}", pair))
    return figure("Latency (shorter is faster)", bars(groups), (BEFORE, AFTER))


def errors(sites: Sequence[Mapping[str, Any]], parts: Sequence[Component]) -> Iterator[str]:
    """Yield the figure of errors before training, where passes report any: the mean of each
    component, with its largest. Bars have the ids `error:<number>:<component>`."""
    found = {site["paths"][0]: site["statistics"].get(_ERROR) for site in sites}
    groups = []
    for count, part in enumerate(parts, 1):
        values = [value for path in part.paths if (value := found.get(path)) is not None]
        if values:
            small = f"mean of {len(values)}, at most {max(values):.3g}" if len(values) > 1 else ""
            middle = mean(values)
            bar = Bar(1, middle, f"{middle:.3g}", chart_id("error", count, part.name))
            groups.append((part.name, small, [bar]))
    if groups:
        note = "relative to the values themselves, before training"
        yield figure("Error of the rewritten modules", bars(groups), note=note)
