"""Sizes, ratios, changes and names as a person writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def megabytes(count: int) -> str:
    """Return bytes in decimal units: 1 MB is 1,000,000 bytes."""
    for scale, unit in _UNITS:
        # Where three digits would round up to 1000, the next unit fits.
        if count >= 0.9995 * scale:
            value = count / scale
            return f"{_three_digits(value)} {unit}"
    return f"{count} bytes"


def milliseconds(seconds: float) -> str:
    """Return a time with three digits."""
    return f"{_three_digits(seconds * 1e3)} ms"


def _three_digits(value: float) -> str:
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def times(before: int, after: int) -> str:
    """Return how the size changed: "5.8 times smaller", "same size", "new", "removed"."""
    if before == after:
        return "same size"
    if not before or not after:
        return "removed" if before else "new"
    ratio = max(before, after) / min(before, after)
    if ratio < 1.005:
        return "almost the same size"
    factor = f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"
    return f"{factor} times {'smaller' if after < before else 'larger'}"


def number(value: float | None) -> str:
    """Return a metric with two decimals, three digits of small and of huge ones; "-" where there is
    none, as of random weights."""
    if value is None:
        return "-"
    plain = value == 0 or 0.1 <= abs(value) < 1e7
    return f"{value:,.2f}" if plain else f"{value:.3g}"


def signed(value: float) -> str:
    """Return a difference of metrics with its sign."""
    return ("-" if value < 0 else "+") + number(abs(value))


def dataset_names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for the dataset of each metric: the file's, or as given where two metrics would
    be called the same."""
    short = [_short(one["data"]) for one in metrics]
    seen = Counter((one["metric"], name) for one, name in zip(metrics, short, strict=True))
    return [
        one["data"] if seen[one["metric"], name] > 1 else name
        for one, name in zip(metrics, short, strict=True)
    ]


def _short(data: str) -> str:
    return data.removeprefix("hub:") if data.startswith("hub:") else Path(data).name


def model_name(name: str) -> str:
    """Return a model's name without the folders of the machine that it was read from."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name
