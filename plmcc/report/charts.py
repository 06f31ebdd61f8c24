"""Charts as HTML and SVG that need no library and no script: bars, lines, points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from plmcc.api import Bars, Points

SERIES = 6
"""How many colors the style has."""
_CLOUDS = 6  # charts of points for all sites together
_LEFT_OUT = ("epoch", "step", "learning_rate", "grad_norm")
_WIDTH, _HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 24.0
_LETTER, _LINE = 6.2, 12.0
"""About the size of a letter in the font of a plot."""


class SiteChart(NamedTuple):
    """What a pass hands over to draw of a site."""

    stage: str
    path: str
    chart: Bars | Points


class Bar(NamedTuple):
    """A bar with its value in words; `color` is the number of the series."""

    color: int
    value: float
    words: str
    name: str = ""
    """Id in the page."""


class Dot(NamedTuple):
    """One way to make a model smaller, for `front`."""

    name: str
    kind: str
    size: int
    """Bytes."""
    quality: float
    best: bool
    """Whether it is on the Pareto front."""


def chart_id(*parts: object) -> str:
    """Return the id of something in a chart, not yet escaped."""
    return ":".join(map(str, parts)).replace(" ", "-")


def figure(title: str, body: str, legend: Sequence[str] = (), note: str = "") -> str:
    """Return a chart with its title, and a legend of the series in the order of their colors."""
    keys = [f'<span class="key s{i % SERIES}">{escape(n)}</span>' for i, n in enumerate(legend)]
    head = f"<figcaption>{escape(title)}</figcaption>"
    head += f'<div class="legend">{"".join(keys)}</div>' if keys else ""
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="chart">{head}{body}{foot}</figure>'


def bars(groups: Iterable[tuple[str, str, Sequence[Bar]]]) -> str:
    """Return horizontal bars in groups: of each its label, a smaller second label, its bars. The
    longest of all is as long as there is room."""
    found = [(label, small, list(rows)) for label, small, rows in groups]
    sizes = [abs(row.value) for *_, rows in found for row in rows]
    most = max(filter(math.isfinite, sizes), default=0.0) or 1.0
    return f'<div class="bars">{"".join(_group(*one, most) for one in found)}</div>'


def _group(label: str, small: str, rows: Sequence[Bar], most: float) -> str:
    second = f" <small>{escape(small)}</small>" if small else ""
    lines = [f'<div class="label">{escape(label)}{second}</div>']
    for row in rows:
        width = 100 * min(1.0, abs(row.value) / most) if row.value == row.value else 0.0
        name = f' id="{escape(row.name)}"' if row.name else ""
        fill = f'<div class="fill s{row.color % SERIES}"{name} style="width:{width:.2f}%"></div>'
        words = f'<div class="value">{escape(row.words)}</div>'
        lines.append(f'<div class="track">{fill}</div>{words}')
    return "".join(lines)


def draw(
    given: Sequence[SiteChart], training: Mapping[str, Sequence[Mapping[str, float]]]
) -> Iterator[str]:
    """Yield figures: curves of each training, bars over sites, points of some sites.

    Bars have the ids `bar:<number>:<title>:<series>:<site>`, points and lines are in groups
    `points:<number>:<title>:<series>` and `line:<number>:<name>`, with - for spaces: every id is in
    the page once.
    """
    count = 0
    for stage, log in training.items():
        for name, pairs in curves(log).items():
            count += 1
            yield _line(count, f"{name}, stage {stage}", name, pairs)
    for (stage, title), parts in _by_title(given).items():
        count += 1
        yield _bars(count, f"{title}, stage {stage}", parts)
    clouds = [(one, one.chart) for one in given if isinstance(one.chart, Points)]
    for one, chart in _spread(clouds):
        count += 1
        yield _points(count, f"{chart.title}: {one.path}, stage {one.stage}", chart)


def curves(log: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return the logged metrics by name: pairs of step and value, of those with two or more."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        if "train_runtime" in entry:  # the summary at the end
            continue
        for name, value in entry.items():
            timed = name.endswith(("_runtime", "_per_second"))
            if name not in _LEFT_OUT and not timed and isinstance(value, (int, float)):
                found.setdefault(name, []).append((entry["step"], float(value)))
    return {name: pairs for name, pairs in found.items() if len(pairs) > 1}


def _by_title(given: Sequence[SiteChart]) -> dict[tuple[str, str], list[tuple[str, Bars]]]:
    found: dict[tuple[str, str], list[tuple[str, Bars]]] = {}
    for one in given:
        if isinstance(one.chart, Bars):
            found.setdefault((one.stage, one.chart.title), []).append((one.path, one.chart))
    return found


def _spread(clouds: Sequence[tuple[SiteChart, Points]]) -> list[tuple[SiteChart, Points]]:
    """Return some of the charts, evenly over the model, the first and the last among them."""
    if len(clouds) <= _CLOUDS:
        return list(clouds)
    step = (len(clouds) - 1) / (_CLOUDS - 1)
    return [clouds[round(index * step)] for index in range(_CLOUDS)]


def _bars(count: int, title: str, parts: Sequence[tuple[str, Bars]]) -> str:
    names = list(dict.fromkeys(name for _, chart in parts for name in chart.values))
    groups = []
    for path, chart in parts:
        rows = [
            Bar(
                names.index(name),
                value,
                f"{value:.4g}",
                chart_id("bar", count, chart.title, name, path),
            )
            for name, value in chart.values.items()
        ]
        groups.append((path, "", rows))
    return figure(title, bars(groups), names, parts[0][1].y)


def _line(count: int, title: str, name: str, pairs: Sequence[tuple[float, float]]) -> str:
    plot = Plot(pairs)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(plot.place, pairs))
    group = escape(chart_id("line", count, name))
    line = f'<g id="{group}"><polyline class="line s0" points="{points}"/></g>'
    return figure(title, plot.svg([line]), note="over the steps of training")


def _points(count: int, title: str, chart: Points) -> str:
    plot = Plot([pair for pairs in chart.series.values() for pair in pairs])
    drawn = []
    for index, (name, pairs) in enumerate(chart.series.items()):
        group = escape(chart_id("points", count, chart.title, name))
        marks = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in map(plot.place, pairs))
        if marks:
            drawn.append(f'<g id="{group}"><path class="mark s{index % SERIES}" d="{marks}"/></g>')
    note = f"{chart.y} against {chart.x}" if chart.x and chart.y else chart.y or chart.x
    return figure(title, plot.svg(drawn), list(chart.series), note)


def front(title: str, dots: Sequence[Dot], x: str, y: str) -> str:
    """Return a figure of quality against bytes, the Pareto front a line.

    Dots have the ids `dot:<number>:<name>`, the line is `front`. A name that has no room is only in
    the dot's tooltip.
    """
    kinds = list(dict.fromkeys(dot.kind for dot in dots))
    plot = Plot([(dot.size, dot.quality) for dot in dots], logarithmic=True)
    best = [plot.place((dot.size, dot.quality)) for dot in sorted(dots, key=_size) if dot.best]
    points = " ".join(f"{left:.1f},{top:.1f}" for left, top in best)
    drawn = [f'<polyline id="front" class="front" points="{points}"/>']
    for number, dot in enumerate(dots, 1):
        left, top = plot.place((dot.size, dot.quality))
        name = escape(chart_id("dot", number, dot.name))
        tip = f"<title>{escape(dot.name)}: {dot.size:,} bytes, {dot.quality:.2f}</title>"
        color = kinds.index(dot.kind) % SERIES
        drawn.append(
            f'<circle id="{name}" class="dot s{color}" cx="{left:.1f}" cy="{top:.1f}" r="4">'
            f"{tip}</circle>"
        )
    drawn += _names(plot, dots)
    note = f"{y} against {x} (logarithmic); the line is the Pareto front"
    return figure(title, plot.svg(drawn), kinds, note).replace("chart", "chart wide", 1)


def _size(dot: Dot) -> int:
    return dot.size


def _names(plot: Plot, dots: Sequence[Dot]) -> Iterator[str]:
    """Yield names beside their dots, those on the front first, as far as they do not overlap."""
    places = [plot.place((dot.size, dot.quality)) for dot in dots]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for dot, (x, y) in sorted(zip(dots, places, strict=True), key=lambda pair: not pair[0].best):
        width = _LETTER * len(dot.name)
        corners = [(x + 6, y - 6), (x - 6 - width, y - 6), (x - width / 2, y - 18)]
        for left, top in [*corners, (x - width / 2, y + 6)]:
            box = (left, top, left + width, top + _LINE)
            if plot.holds(box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield f'<text x="{left:.1f}" y="{top + 9:.1f}">{escape(dot.name)}</text>'
                break


_Box = tuple[float, float, float, float]


def _overlap(one: _Box, two: _Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


class Plot:
    """Axes around pairs of numbers."""

    def __init__(self, pairs: Sequence[tuple[float, float]], logarithmic: bool = False) -> None:
        shown = [pair for pair in pairs if all(map(math.isfinite, pair))]
        self.logarithmic = logarithmic
        self.x = _range([self._scaled(x) for x, _ in shown])
        self.y = _range([y for _, y in shown])

    def _scaled(self, x: float) -> float:
        return math.log10(max(x, 1e-9)) if self.logarithmic else x

    def place(self, pair: tuple[float, float]) -> tuple[float, float]:
        """Return where a pair is; what is not finite is at the edge."""
        x, y = self._scaled(pair[0]), pair[1]
        right = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        right, up = (min(1.0, max(0.0, v)) if v == v else 0.0 for v in (right, up))
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (
            _HEIGHT - _TOP - _BOTTOM
        )

    def holds(self, box: _Box) -> bool:
        """Return whether a box is within the axes."""
        return box[0] >= _LEFT and box[1] >= 0 and box[2] <= _WIDTH and box[3] <= _HEIGHT - _BOTTOM

    def svg(self, drawn: Iterable[str]) -> str:
        """Return the axes with what is drawn between them."""
        lines = [*self._horizontal(), *self._vertical(), *drawn]
        box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
        return f'<svg viewBox="{box}" role="img">{"".join(lines)}</svg>'

    def _horizontal(self) -> Iterator[str]:
        for value in _ticks(*self.y, 5):
            _, y = self.place((1.0, value))
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            yield f'<text class="y" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{_tick(value)}</text>'

    def _vertical(self) -> Iterator[str]:
        bottom = _HEIGHT - _BOTTOM
        right = -math.inf
        for value in self._values():
            x, _ = self.place((value, self.y[0]))
            words = _bytes(value) if self.logarithmic else _tick(value)
            half = _LETTER * len(words) / 2
            x = min(x, _WIDTH - half)
            if x - half > right + _LETTER:
                right = x + half
                yield f'<path class="grid" d="M{x:.1f} {bottom}v4"/>'
                yield f'<text class="x" x="{x:.1f}" y="{bottom + 16}">{words}</text>'

    def _values(self) -> list[float]:
        if not self.logarithmic:
            return _ticks(*self.x, 5)
        low, high = (10**edge for edge in self.x)
        powers = range(math.floor(self.x[0]), math.ceil(self.x[1]) + 1)
        found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        return [value for value in found if low <= value <= high] or [low, high]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value, with some room around them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float) -> str:
    return f"{value:.4g}" if value else "0"


def _bytes(value: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"
