"""report.html: what was done as one page that needs no other file: card, charts, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from plmcc.report.charts import SiteChart, curves, draw
from plmcc.report.overview import AFTER, BEFORE, errors, overview
from plmcc.report.style import STYLE
from plmcc.report.summary import Summary
from plmcc.report.words import megabytes, milliseconds, model_name, number, times

_JOINT = re.compile(r"([._/])(?=[a-z])")


def page(values: Mapping[str, Any], charts: Sequence[SiteChart]) -> str:
    """Return the page.

    Args:
        values: what `plmcc.report.documents.report` returns.
        charts: what the passes hand over to draw.
    """
    summary = Summary.of(values)
    title = f"{values['recipe']}: {model_name(values['model'])}"
    drawn = "".join(overview(summary))
    parts = [_card(values, summary)]
    parts += [f'<h2>Charts</h2>\n<div class="charts">{drawn}</div>'] if drawn else []
    notes = [f"<li>{escape(note)}</li>" for note in values["notes"]]
    parts += [f"<h2>Notes</h2>\n<ul>{''.join(notes)}</ul>"] if notes else []
    parts += [*_tables(summary), *_details(values, summary, charts)]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs no other file, of parts in HTML."""
    title = escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _card(values: Mapping[str, object], summary: Summary) -> str:
    size = _arrow(megabytes(summary.before), megabytes(summary.after))
    tiles = [_tile("Size", [(size, times(summary.before, summary.after))])]
    rows = [
        (_arrow(number(one.before), number(one.after)), f"{one.label}, change {one.change}")
        if one.before is not None
        else (number(one.after), one.label)
        for one in summary.metrics
    ]
    tiles += [_tile("Quality", rows)] if rows else []
    speed = [(row.words, f"{row.setting}: time {row.change}") for row in summary.speed]
    tiles.append(_tile("Speed", speed or [("not measured", "")]))
    tiles.append(_tile("Runs with", list(_places(values))))
    verdict = f'<p class="verdict">{escape(summary.verdict())}</p>'
    return f'<section class="card">{verdict}<div class="tiles">{"".join(tiles)}</div></section>'


def _arrow(before: str, after: str) -> str:
    return _whole(f"{before} → {after}")


def _whole(text: str) -> str:
    """Text that stays on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _places(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the result runs, and where it was measured."""
    yield " and ".join(values["loads_with"]), "from_pretrained, on CPU or GPU"
    for name in values["exports"]:
        yield name, f"without its Python code: the folder {name}"
    machine = values["hardware"]
    gpu = "no GPU" if machine["gpu"] == "none" else machine["gpu"]
    if values["latency"]:
        threads = f"{machine['threads']} thread" + ("s" if machine["threads"] != 1 else "")
        yield "", f"measured on {machine['system']}, {machine['machine']}, {threads}, {gpu}"


def _tile(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Rows of something large and something small."""
    lines = []
    for large, small in rows:
        big = f'<p class="big">{escape(large)}</p>' if large else ""
        about = f'<p class="small">{escape(small)}</p>' if small else ""
        lines.append(f'<div class="row">{big}{about}</div>')
    return f'<div class="tile"><h3>{escape(title)}</h3>{"".join(lines)}</div>'


def _tables(summary: Summary) -> Iterator[str]:
    parts = [(part.label, part.before, part.after) for part in summary.components]
    parts.append(("all tensors", summary.before, summary.after))
    sizes = [(n, _whole(megabytes(b)), _whole(megabytes(a)), times(b, a)) for n, b, a in parts]
    yield table("Size", ("component", BEFORE, AFTER, "change"), sizes)
    metrics = [
        (one.label, number(one.before), number(one.after), one.change) for one in summary.metrics
    ]
    yield table("Quality", ("metric", BEFORE, AFTER, "change"), metrics)
    latency = [
        (row.setting, *map(_whole, map(milliseconds, (row.original, row.compressed))), row.change)
        for row in summary.speed
    ]
    yield table("Latency", ("setting", BEFORE, AFTER, "change"), latency)


def _details(
    values: Mapping[str, Any], summary: Summary, charts: Sequence[SiteChart]
) -> Iterator[str]:
    """What only some readers look for, folded."""
    training = values["training"]
    drawn = [*errors(values["sites"], summary.components), *draw(charts, training)]
    opened = [
        ("Charts of passes and training", [f'<div class="charts">{"".join(drawn)}</div>'], drawn),
        _listing("Training", ("", "first", "last", "at step"), _training(training)),
        _sites(values["sites"]),
        _listing("Size of each module", ("", "bytes before", "bytes after"), _bytes(values)),
        _listing(
            "Left as it was",
            ("", "because"),
            [(miss["path"], miss["reason"]) for miss in values["misses"]],
        ),
    ]
    if any(rows for *_, rows in opened):
        yield "<h2>Details</h2>"
    yield from (fold(f"{title} ({len(rows)})", body) for title, body, rows in opened if rows)


_Listing = tuple[str, Sequence[str], Sequence[object]]


def _listing(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> _Listing:
    return title, [_grid(header, rows)] if rows else [], rows


def _bytes(values: Mapping[str, Any]) -> list[tuple[object, ...]]:
    before, after = values["bytes_before"], values["bytes_after"]
    names = {**before, **after}
    return [(name, f"{before.get(name, 0):,}", f"{after.get(name, 0):,}") for name in names]


def _training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> list[tuple[object, ...]]:
    return [
        (f"{name}, stage {stage}", pairs[0][1], pairs[-1][1], int(pairs[-1][0]))
        for stage, log in training.items()
        for name, pairs in curves(log).items()
    ]


def _sites(sites: Sequence[Mapping[str, Any]]) -> _Listing:
    names = list(dict.fromkeys(name for site in sites for name in site["statistics"]))
    rows = [
        (site["paths"][0], site["pass"], *(site["statistics"].get(name) for name in names))
        for site in sites
    ]
    return _listing("Rewritten modules", ("", "pass", *names), rows)


def fold(title: str, parts: Sequence[str]) -> str:
    """Return parts in HTML that a click on the title shows."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a heading; nothing where it would have no rows."""
    return f"<h2>{escape(title)}</h2>\n{_grid(header, rows)}" if rows else ""


def _grid(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [[_text(cell) for cell in row] for row in rows]
    kinds = [' class="text"' if _is_text(column) else "" for column in zip(*lines, strict=True)]
    top = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kinds, header, strict=True))
    body = ""
    for line in lines:
        cells = [f"<td{k}>{_breakable(cell)}</td>" for k, cell in zip(kinds, line, strict=True)]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="scroll"><table>\n<tr>{top}</tr>\n{body}</table></div>'


def _breakable(text: str) -> str:
    """Escaped text that may go on in the next line within a path."""
    return _JOINT.sub(r"\1<wbr>", escape(text))


def _is_text(cells: Sequence[str]) -> bool:
    """Whether no cell of a column holds a number."""
    return not any(cell.lstrip("+-x ")[:1].isdigit() for cell in cells)


def _text(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,.0f}" if isinstance(value, float) else str(value)
