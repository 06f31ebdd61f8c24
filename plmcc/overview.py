"""Charts of a whole run, for the top of its report: bytes, errors, latency, quality and size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plmcc.pictures import picture_id, svg

_COMPONENTS = 14
_BEFORE, _AFTER = "original", "compressed"
_ERROR = "relative_error"


def overview(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield SVG texts, each where there is something to draw.

    Bars have the ids `bytes:<what>:<component>`, `error:<number>:<site>` and
    `latency:<number>:<setting>`; points of quality are `quality:<number>:<metric>`.
    """
    if values["bytes_before"]:
        yield _bytes(values["bytes_before"], values["bytes_after"])
    errors = {site["paths"][0]: site["figures"].get(_ERROR) for site in values["sites"]}
    errors = {path: error for path, error in errors.items() if error is not None}
    if errors:
        yield _errors(errors)
    if values["latency"]:
        yield _latency(values["latency"])
    metrics = [one for one in values["metrics"] if one["before"] is not None]
    if metrics:
        sizes = [sum(values[key].values()) for key in ("bytes_before", "bytes_after")]
        yield _quality(metrics, sizes)


def _bytes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Bars side by side, the largest components by name and all others as one."""
    sizes = {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}
    order = sorted(sizes, key=lambda name: -max(sizes[name]))
    shown = {name: sizes[name] for name in order[:_COMPONENTS]}
    rest = [sizes[name] for name in order[_COMPONENTS:]]
    if rest:
        name = f"{len(rest)} smaller ones"
        shown[name] = (sum(one for one, _ in rest), sum(two for _, two in rest))
    names = list(shown)[::-1]

    def fill(axes: Any) -> None:
        for index, what in enumerate((_BEFORE, _AFTER)):
            places = [place + 0.2 - 0.4 * index for place in range(len(names))]
            drawn = axes.barh(places, [shown[n][index] / 1e6 for n in names], 0.4, label=what)
            for bar, name in zip(drawn, names, strict=True):
                bar.set_gid(picture_id("bytes", what, name))
        axes.set(title="bytes by component", xlabel="MB")
        axes.set_yticks(range(len(names)), names)
        axes.legend()

    return svg("bytes", fill, wide=7.0, high=max(2.0, 0.32 * len(names) + 1.0))


def _errors(errors: Mapping[str, float]) -> str:
    def fill(axes: Any) -> None:
        drawn = axes.bar(range(len(errors)), list(errors.values()), 0.6)
        for number, (bar, path) in enumerate(zip(drawn, errors, strict=True), 1):
            bar.set_gid(picture_id("error", number, path))
        axes.set(title="error by site, before training", ylabel="part of the variance")
        axes.set_xticks(range(len(errors)), list(errors), rotation=30, ha="right")

    return svg("error", fill, wide=max(4.0, 0.3 * len(errors) + 3.0))


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times relative to the original's, with their spread."""
    names = [f"{row['mode']}, {row['batch']} x {row['length']}" for row in rows]

    def fill(axes: Any) -> None:
        ratios, spreads = [row["ratio"] for row in rows], [row["spread"] for row in rows]
        drawn = axes.bar(range(len(rows)), ratios, 0.6, yerr=spreads, capsize=4)
        for number, (bar, name) in enumerate(zip(drawn, names, strict=True), 1):
            bar.set_gid(picture_id("latency", number, name))
        axes.axhline(1.0, color="0.5", linestyle="--")
        axes.set(title="latency (lower is faster)", ylabel="of the original's")
        axes.set_xticks(range(len(rows)), names, rotation=30, ha="right")

    return svg("latency", fill, wide=max(4.0, 0.6 * len(rows) + 2.0))


def _quality(metrics: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> str:
    def fill(axes: Any) -> None:
        for number, one in enumerate(metrics, 1):
            figures = [one["before"], one["after"]]
            (line,) = axes.plot([size / 1e6 for size in sizes], figures, "o-",
                                label=f"{one['metric']} ({number})")  # fmt: skip
            line.set_gid(picture_id("quality", number, one["metric"]))
        axes.annotate(_BEFORE, (sizes[0] / 1e6, metrics[0]["before"]), fontsize=6)
        axes.annotate(_AFTER, (sizes[1] / 1e6, metrics[0]["after"]), fontsize=6)
        axes.set(title="quality against size", xlabel="MB", ylabel="figure")
        axes.margins(0.2)
        axes.legend()

    return svg("quality", fill)
