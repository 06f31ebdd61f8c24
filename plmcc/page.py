"""report.html: what was done as one page that needs no other file, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from plmcc.overview import overview
from plmcc.pictures import Pictured, curves, draw, drawable

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; }
svg { height: auto; margin: 1em; max-width: 100%; }
"""
_MISSING = "Pictures need matplotlib: pip install 'plmcc[report]'"
NO_PICTURES = f"<p>{escape(_MISSING)}</p>"


def page(values: Mapping[str, Any], pictures: Sequence[Pictured]) -> str:
    """Return the page.

    Args:
        values: what `plmcc.report.report` returns.
        pictures: what the passes hand over to draw.
    """
    title = f"{values['recipe']}: {values['model']}"
    return document(title, [*_pictures(values, pictures), *_tables(values)])


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs no other file, of parts in HTML."""
    title = escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _pictures(values: Mapping[str, Any], pictures: Sequence[Pictured]) -> Iterator[str]:
    trained = any(curves(log) for log in values["training"].values())
    if not (pictures or trained or values["bytes_before"]):
        return
    yield "<h2>Pictures</h2>"
    if drawable():
        yield from overview(values)
        yield from draw(pictures, values["training"])
    else:
        yield NO_PICTURES


def _tables(values: Mapping[str, Any]) -> Iterator[str]:
    before, after = values["bytes_before"], values["bytes_after"]
    parts = [(name, before.get(name, 0), after.get(name, 0)) for name in {**before, **after}]
    parts.append(("all tensors", sum(before.values()), sum(after.values())))
    yield table("Bytes", ("", "before", "after"), parts)
    metrics = [
        (f"{m['metric']} on {m['data']}", m["before"], m["after"]) for m in values["metrics"]
    ]
    yield table("Figures", ("", "before", "after"), metrics)
    latency = [tuple(row.values()) for row in values["latency"]]
    yield table("Latency", tuple(values["latency"][0]) if latency else (), latency)
    yield _training(values["training"])
    yield _sites(values["sites"])
    misses = [(miss["path"], miss["reason"]) for miss in values["misses"]]
    yield table("Left as it was", ("", "because"), misses)


def _training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    rows = [
        (f"{name}, stage {stage}", pairs[0][1], pairs[-1][1], int(pairs[-1][0]))
        for stage, log in training.items()
        for name, pairs in curves(log).items()
    ]
    return table("Training", ("", "first", "last", "at step"), rows)


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for site in sites for name in site["figures"]))
    rows = [
        (site["paths"][0], site["pass"], *(site["figures"].get(name) for name in names))
        for site in sites
    ]
    return table("Rewritten", ("", "pass", *names), rows)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a heading; nothing where it would have no rows."""
    if not rows:
        return ""
    lines = ["".join(f"<td>{escape(_text(cell))}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<table>\n<tr>{top}</tr>\n{body}</table>"


def _text(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,.0f}" if isinstance(value, float) else str(value)
