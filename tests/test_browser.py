"""The report in a real browser: Chromium lays it out, and says what it sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import data, result, text

__all__ = ["data", "result", "text"]  # fixtures

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
WIDTH, HEIGHT = 1200, 4000
LOOK = """
<script>
window.onerror = (message) => { document.body.dataset.error = message; };
window.onload = () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const all = (name) => [...document.querySelectorAll(name)];
  document.body.dataset.seen = JSON.stringify({
    title: document.title, pictures: all("svg").map(box), tables: all("table").map(box),
    wide: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType("resource").map((e) => e.name),
    texts: all("svg text").map(e => [e.textContent, ...box(e)]),
  });
};
</script></body>"""

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")


def browse(page: Path, *arguments: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"]
    command += ["--hide-scrollbars", "--force-device-scale-factor=1"]
    done = subprocess.run([*command, *arguments, page.as_uri()], capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def page(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("browser") / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def seen(page: Path, text: str) -> dict[str, Any]:
    looked = page.with_name("looked.html")
    assert text.count("</body>") == 1
    looked.write_text(text.replace("</body>", LOOK), encoding="utf-8")
    found = browse(looked, "--dump-dom")
    assert "data-error" not in found
    (values,) = re.findall(r'data-seen="([^"]*)"', found)
    values = json.loads(unescape(values))
    assert isinstance(values, dict)
    return values


def test_pictures_and_tables_have_their_place(seen: dict[str, Any]) -> None:
    assert seen["title"]
    assert len(seen["pictures"]) >= 4
    assert len(seen["tables"]) >= 2
    for x, _, width, height in seen["pictures"]:
        assert width > 200
        assert height > 100
        assert x >= 0
        assert x + width <= WIDTH
    assert seen["wide"] <= WIDTH  # nothing sticks out
    boxes = sorted(seen["pictures"] + seen["tables"], key=lambda box: box[1])
    assert all(box[2] > 0 and box[3] > 0 for box in boxes)


def test_the_words_in_pictures_lie_in_them(seen: dict[str, Any]) -> None:
    assert len(seen["texts"]) > 20
    for words, x, y, width, height in seen["texts"]:
        inside = any(
            left - 1 <= x and top - 1 <= y
            and x + width <= left + wide + 1 and y + height <= top + high + 1
            for left, top, wide, high in seen["pictures"]
        )  # fmt: skip
        assert inside, words


def test_nothing_is_fetched(seen: dict[str, Any]) -> None:
    assert seen["loaded"] == []


def test_there_is_something_to_look_at(page: Path, seen: dict[str, Any]) -> None:
    shot = page.with_suffix(".png")
    browse(page, f"--screenshot={shot}")
    looked = 0
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    for x, y, width, height in seen["pictures"]:
        part = pixels[int(y) : int(y + height), int(x) : int(x + width)]
        if y + height > HEIGHT:
            continue
        looked += 1
        coloured = part.max(-1) - part.min(-1) > 40  # not white, grey or black
        assert coloured.mean() > 0.002
    assert looked >= 4
