"""The report in a real browser: Chromium lays it out, and says what it sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WIDTHS, HEIGHT = (400, 1000, 1600), 6000
# A window is not narrower than 500 pixels: the page is looked at in a frame.
FRAME = """<!DOCTYPE html>
<html><head><meta name="color-scheme" content="light dark"></head><body style="margin: 0">
<iframe style="border: 0" width="{width}" height="{height}" srcdoc="{page}"></iframe>
<script>
window.onerror = (message) => {{ document.body.dataset.error = message; }};
window.onload = () => {{
  const seen = frames[0].document, root = seen.documentElement;
  const sides = (r) => [r.x, r.y, r.width, r.height];
  const box = (e) => sides(e.getBoundingClientRect());
  const all = (name) => [...seen.querySelectorAll(name)];
  const lines = (name) => all(name).flatMap((e) => {{
    const range = seen.createRange();
    range.selectNodeContents(e);
    return [...range.getClientRects()].map((r) => [e.textContent, ...sides(r)]);
  }});
  document.body.dataset.seen = JSON.stringify({{
    title: seen.title, charts: all("figure").map(box), tables: all("table").map(box),
    page: root.clientWidth, wide: root.scrollWidth, svgs: all("svg").map(box),
    loaded: frames[0].performance.getEntriesByType("resource").map((e) => e.name),
    texts: all("svg text").map((e) => [e.textContent, ...box(e)]),
    bars: all(".fill").map(box), tracks: all(".track").map(box),
    words: lines("h1, h2, h3, p, figcaption, .key, .label, .value, summary, td, th, svg text"),
    paper: frames[0].getComputedStyle(seen.body).backgroundColor,
  }});
}};
</script></body></html>"""

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")


def browse(page: Path, width: int, *arguments: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{HEIGHT}"]
    command += ["--hide-scrollbars", "--force-device-scale-factor=1"]
    done = subprocess.run(
        [*command, *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def page(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with all that is folded opened."""
    file = tmp_path_factory.mktemp("browser") / "report.html"
    file.write_text(text.replace("<details>", "<details open>"), encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request: pytest.FixtureRequest, page: Path) -> dict[str, Any]:
    return look(page, request.param)


def look(page: Path, width: int, *arguments: str) -> dict[str, Any]:
    text = escape(page.read_text(encoding="utf-8"))
    looked = page.with_name("looked.html")
    looked.write_text(FRAME.format(width=width, height=HEIGHT, page=text), encoding="utf-8")
    found = browse(looked, width, *arguments, "--dump-dom")
    assert "data-error" not in found
    (values,) = re.findall(r'data-seen="([^"]*)"', found)
    values = json.loads(unescape(values))
    assert isinstance(values, dict)
    return values


def test_charts_and_tables_have_their_place(seen: dict[str, Any]) -> None:
    assert seen["title"]
    assert len(seen["charts"]) >= 5
    assert len(seen["svgs"]) >= 3
    assert len(seen["tables"]) >= 3
    for x, _, width, height in seen["charts"]:
        assert width > 200
        assert height > 100
        assert x >= 0
        assert x + width <= seen["page"]
    assert all(box[2] > 0 and box[3] > 0 for box in seen["tables"] + seen["bars"])


def test_nothing_sticks_out(seen: dict[str, Any]) -> None:
    assert seen["page"] in WIDTHS
    assert seen["wide"] <= seen["page"]


def test_bars_lie_in_their_tracks(seen: dict[str, Any]) -> None:
    assert len(seen["bars"]) == len(seen["tracks"]) > 20
    for bar, track in zip(seen["bars"], seen["tracks"], strict=True):
        assert bar[0] >= track[0] - 1
        assert bar[0] + bar[2] <= track[0] + max(track[2], 2) + 1


def test_the_words_in_charts_lie_in_them(seen: dict[str, Any]) -> None:
    assert len(seen["texts"]) > 20
    for words, x, y, width, height in seen["texts"]:
        inside = any(
            left - 1 <= x
            and top - 1 <= y
            and x + width <= left + wide + 1
            and y + height <= top + high + 1
            for left, top, wide, high in seen["svgs"]
        )
        assert inside, words


def test_no_words_lie_on_others(seen: dict[str, Any]) -> None:
    lines = sorted(seen["words"], key=lambda line: line[2])
    assert len(lines) > 100
    for index, (words, x, y, width, height) in enumerate(lines):
        for others, left, top, wide, high in lines[index + 1 :]:
            if top >= y + height - 2:
                break
            across = min(x + width, left + wide) - max(x, left)
            down = min(y + height, top + high) - max(y, top)
            # Boxes of lines are higher than letters, and a part of a text has a box of its own.
            assert across < 2 or down < 0.4 * min(height, high) or words == others, (words, others)


def test_nothing_is_fetched(seen: dict[str, Any]) -> None:
    assert seen["loaded"] == []


def test_the_page_is_dark_for_who_asks_for_it(page: Path) -> None:
    light, dark = (
        look(page, 1000, f"--blink-settings=preferredColorScheme={number}")["paper"]
        for number in (1, 0)
    )
    brightness = [sum(map(int, re.findall(r"\d+", paper)[:3])) for paper in (light, dark)]
    assert brightness[0] > 600
    assert brightness[1] < 150


def test_there_is_something_to_look_at(page: Path) -> None:
    seen = look(page, 1000)
    shot = page.with_suffix(".png")
    browse(page, 1000, f"--screenshot={shot}")
    looked = 0
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    for x, y, width, height in seen["charts"]:
        part = pixels[int(y) : int(y + height), int(x) : int(x + width)]
        if y + height > HEIGHT:
            continue
        looked += 1
        colored = part.max(-1) - part.min(-1) > 40  # not white, gray or black
        assert colored.mean() > 0.002
    assert looked >= 4
