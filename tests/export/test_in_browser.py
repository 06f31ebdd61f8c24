"""ONNX files in the layout of servers, in a headless Chromium with onnxruntime-web.

`npm install --ignore-scripts onnxruntime-web`; PLMCC_NODE_MODULES names the folder `node_modules`.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertForSequenceClassification, BertModel

from plmcc.evaluation.evaluator import Evaluator
from plmcc.export.hub import FILES, export_hub
from plmcc.models.source import load_source
from support.tiny_models import tiny
from support.tokenizers import words

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PACKAGES = Path(os.environ.get("PLMCC_NODE_MODULES", "nowhere"))
pytestmark = pytest.mark.skipif(
    not BROWSER or not (PACKAGES / "onnxruntime-web").is_dir(),
    reason="there is no Chromium here, or no onnxruntime-web in PLMCC_NODE_MODULES",
)
TEXT = "w1 w2 w3 w4"
PAGE = """<!DOCTYPE html><html><body><script type="module">
import * as ort from "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
ort.env.wasm.numThreads = 1;
try {
  const session = await ort.InferenceSession.create("/model/onnx/FILE");
  const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt),
                                           [1, values.length]);
  const given = GIVEN, feeds = {};
  for (const name of session.inputNames) feeds[name] = whole(given[name]);
  const found = await session.run(feeds);
  const plain = Object.entries(found).map(([name, value]) => [name, Array.from(value.data)]);
  document.body.dataset.found = JSON.stringify(Object.fromEntries(plain));
} catch (problem) { document.body.dataset.error = String(problem); }
</script></body></html>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    (tmp_path / "node_modules").symlink_to(PACKAGES.resolve())
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def browsed(folder: Path, address: str, file: str, given: dict[str, list[int]]) -> dict[str, Any]:
    page = PAGE.replace("FILE", file).replace("GIVEN", json.dumps(given))
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"{address}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    failed = re.search('data-error="([^"]*)"', done.stdout)
    assert failed is None, failed
    seen = re.search('data-found="([^"]*)"', done.stdout)
    assert seen is not None, done.stdout[-2000:]
    values: dict[str, Any] = json.loads(unescape(seen[1]))
    return values


@pytest.mark.parametrize("precision", FILES)
@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_a_browser_computes_what_the_model_computes(
    kind: Any, precision: str, served: tuple[Path, str]
) -> None:
    folder, address = served
    kind(tiny("bert").config).save_pretrained(folder / "source")
    words().save_pretrained(folder / "source")
    export_hub(str(folder / "source"), folder / "model", precisions=[precision])
    source = load_source(folder / "source")
    encoded = source.need_tokenizer("this")(TEXT, return_token_type_ids=True)
    given = {name: list(encoded[name]) for name in encoded}
    found = browsed(folder, address, FILES[precision], given)
    evaluator = Evaluator(source.model, words(), source.pooling)
    if kind is BertModel:
        states = np.array(found["last_hidden_state"]).reshape(len(given["input_ids"]), -1)
        mine, theirs = states.mean(0), evaluator.embed([TEXT])[0].numpy()
    else:
        mine, theirs = np.array(found["logits"]), evaluator.logits([[TEXT]])[0].numpy()
    if precision == "fp32":
        assert np.abs(mine - theirs).max() < 1e-4
    cosine = float(mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs))
    assert cosine > (0.9 if precision == "q4" else 0.99)
