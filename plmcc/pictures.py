"""Charts of a report as SVG, drawn by matplotlib (extra `report`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from plmcc.api import Bars, Points

_CLOUDS = 6  # charts of points for all sites together
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.0,
    "legend.frameon": False,
}
_LEFT_OUT = ("epoch", "step", "learning_rate", "grad_norm")
_NAMELESS = re.compile(r' id="[\w.]+_\d+"')


class Pictured(NamedTuple):
    """What a pass hands over to draw of a site."""

    stage: str
    path: str
    picture: Bars | Points


def drawable() -> bool:
    """Return whether matplotlib is there."""
    try:
        return find_spec("matplotlib") is not None
    except ValueError:  # a module that is set to None
        return False


def draw(
    given: Sequence[Pictured], training: Mapping[str, Sequence[Mapping[str, float]]]
) -> Iterator[str]:
    """Yield SVG texts: curves of each training, bars over sites, points of some sites.

    Bars have the ids `bar:<number>:<title>:<series>:<site>`, points and lines are in groups
    `points:<number>:<title>:<series>` and `line:<number>:<name>`, with - for spaces: every id is in
    the page once.
    """
    number = 0
    for stage, log in training.items():
        for name, pairs in curves(log).items():
            number += 1
            yield _line(number, f"{name}, stage {stage}", name, pairs)
    for (stage, title), parts in _charts(given, Bars).items():
        number += 1
        yield _bars(number, f"{title}, stage {stage}", parts)
    clouds = [one for one in given if isinstance(one.picture, Points)]
    for one in _spread(clouds):
        number += 1
        yield _points(number, one)


class Dot(NamedTuple):
    """One way to make a model smaller, for `front`."""

    name: str
    kind: str
    size: int
    """Bytes."""
    quality: float
    best: bool
    """Whether it is on the Pareto front."""


def front(title: str, dots: Sequence[Dot], x: str, y: str) -> str:
    """Return an SVG of quality against bytes, the Pareto front a line.

    Dots are in groups `dot:<number>:<name>`, the line is `front`.
    """

    def fill(axes: Any) -> None:
        for index, kind in enumerate(dict.fromkeys(dot.kind for dot in dots)):
            of_kind = [(n, dot) for n, dot in enumerate(dots, 1) if dot.kind == kind]
            for number, dot in of_kind:
                label = kind if number == of_kind[0][0] else None
                (drawn,) = axes.plot(dot.size, dot.quality, "o", color=f"C{index}", label=label)
                drawn.set_gid(picture_id("dot", number, dot.name))
                offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 6}
                axes.annotate(dot.name, (dot.size, dot.quality), **offset)
        best = sorted((dot.size, dot.quality) for dot in dots if dot.best)
        (line,) = axes.plot(*zip(*best, strict=True), color="0.6", zorder=0, label="Pareto front")
        line.set_gid("front")
        axes.set(title=title, xlabel=x, ylabel=y, xscale="log")
        axes.legend(loc="lower right")

    return svg(1, fill, wide=8.0)


def curves(log: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return the logged figures by name: pairs of step and value, of those with two or more."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        if "train_runtime" in entry:  # the summary at the end
            continue
        for name, value in entry.items():
            timed = name.endswith(("_runtime", "_per_second"))
            if name not in _LEFT_OUT and not timed and isinstance(value, (int, float)):
                found.setdefault(name, []).append((entry["step"], float(value)))
    return {name: pairs for name, pairs in found.items() if len(pairs) > 1}


def _charts(given: Sequence[Pictured], kind: type) -> dict[tuple[str, str], list[Pictured]]:
    found: dict[tuple[str, str], list[Pictured]] = {}
    for one in given:
        if isinstance(one.picture, kind):
            found.setdefault((one.stage, one.picture.title), []).append(one)
    return found


def _spread(clouds: Sequence[Pictured]) -> list[Pictured]:
    """Return some of the charts, evenly over the model, the first and the last among them."""
    if len(clouds) <= _CLOUDS:
        return list(clouds)
    step = (len(clouds) - 1) / (_CLOUDS - 1)
    return [clouds[round(index * step)] for index in range(_CLOUDS)]


def _line(number: int, title: str, name: str, pairs: list[tuple[float, float]]) -> str:
    def fill(axes: Any) -> None:
        (line,) = axes.plot(*zip(*pairs, strict=True), marker=".")
        line.set_gid(picture_id("line", number, name))
        axes.set(title=title, xlabel="step", ylabel=name)

    return svg(number, fill)


def _bars(number: int, title: str, parts: Sequence[Pictured]) -> str:
    sites = list(dict.fromkeys(one.path for one in parts))
    values: dict[str, dict[str, float]] = {}
    for one in parts:
        assert isinstance(one.picture, Bars)
        for name, value in one.picture.values.items():
            values.setdefault(name, {})[one.path] = value
    width = 0.8 / len(values)

    def fill(axes: Any) -> None:
        for index, (name, found) in enumerate(values.items()):
            places = [sites.index(site) + (index + 0.5) * width - 0.4 for site in found]
            drawn = axes.bar(places, list(found.values()), width, label=name)
            for bar, site in zip(drawn, found, strict=True):
                bar.set_gid(picture_id("bar", number, parts[0].picture.title, name, site))
        axes.set(title=title, ylabel=parts[0].picture.y)
        axes.set_xticks(range(len(sites)), sites, rotation=30, ha="right")
        if len(values) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return svg(number, fill, wide=max(5.0, 0.12 * len(sites) * len(values) + 3.0))


def _points(number: int, one: Pictured) -> str:
    picture = one.picture
    assert isinstance(picture, Points)

    def fill(axes: Any) -> None:
        for index, (name, pairs) in enumerate(picture.series.items()):
            if pairs:
                drawn = axes.scatter(*zip(*pairs, strict=True), s=3, label=name, color=f"C{index}")
                drawn.set_gid(picture_id("points", number, picture.title, name))
        axes.set(title=f"{picture.title}\n{one.path}, stage {one.stage}")
        axes.set(xlabel=picture.x, ylabel=picture.y)
        axes.legend()

    return svg(number, fill)


def picture_id(*parts: object) -> str:
    """Return the id of something in a picture."""
    return ":".join(map(str, parts)).replace(" ", "-")


def svg(number: int | str, fill: Any, wide: float = 5.0, high: float = 3.0) -> str:
    """Return an SVG text of what `fill(axes)` draws; sizes are in inches, the number is the
    picture's own in its page."""
    # matplotlib takes half a second to import, and is not always there.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.StringIO()
    # The salt keeps ids of several pictures in one page apart, and equal from run to run.
    with rc_context(_STYLE | {"svg.hashsalt": f"plmcc{number}"}):
        figure = Figure(figsize=(wide, high))
        fill(figure.subplots())
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = written.getvalue()
    # matplotlib numbers the rest anew in each picture, and nothing refers to it.
    return _NAMELESS.sub("", svg[svg.index("<svg") :])
