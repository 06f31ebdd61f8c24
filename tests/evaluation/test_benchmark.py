"""`plmcc bench`: two models in turn, their memory, and plain words."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import plmcc
from plmcc.cli.measure import _print
from plmcc.evaluation import benchmark
from plmcc.evaluation.benchmark import Benchmark, Footprint, verdict
from plmcc.evaluation.decoding import measure_decoding
from plmcc.evaluation.latency import Latency
from plmcc.recipe.load import parse_recipe
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    tiny("bert").save_pretrained(made / "m")
    words().save_pretrained(made / "m")
    recipe = "plmcc: 1\npasses:\n  - drop_layers: {targets: encoder, keep: 1}\n"
    plmcc.apply(parse_recipe(recipe, load_torch=True), made / "m", made / "out")
    return made


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["bench", *arguments], cwd=folder)


def test_two_models_are_timed_in_two_modes(folder: Path) -> None:
    sizes = ["--batch", "8", "--length", "16", "--seconds", "1"]
    done = run(folder, "out", "--baseline", "m", *sizes, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["mode"], r["batch"]) for r in found["rows"]] == [
        ("eager", 8),
        ("compiled", 8),
    ]
    assert found["graph_breaks"] == 0
    assert all(r["ratio"] > 0 for r in found["rows"])
    for name in ("footprint", "baseline_footprint"):
        assert found[name]["load_seconds"] > 0
        assert 50e6 < found[name]["peak_bytes"] < 20e9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out", "--baseline", "m", "--mode", "quick"], "unknown mode"),
        (["oud", "--baseline", "m"], "the directory does not exist"),
        (["out", "--baseline", "m", "--length", "49"], "at most 40"),
        (["out", "--baseline", "absent"], "no such directory"),
    ],
)
def test_mistakes_are_one_paragraph(folder: Path, arguments: list[str], said: str) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def found(*ratios: float) -> Benchmark:
    rows = [Latency("eager", i, 8, 1.0, ratio, ratio, 0.02) for i, ratio in enumerate(ratios)]
    foot = Footprint(1.0, 1)
    return Benchmark("a", "b", "cpu", 1, rows, foot, foot, 0, 0)


def test_the_verdict_is_in_plain_words() -> None:
    assert verdict(found(1.01, 0.99)).startswith("No speed-up: it is as fast")
    assert verdict(found(1.2, 1.0)).startswith("No speed-up: slower, up to 1.20 times")
    assert verdict(found(0.5, 0.8)).startswith("Faster everywhere: up to 2.00 times")
    assert verdict(found(0.5, 1.0)).startswith("Faster in some settings: up to 2.00")
    assert "slower in others, up to 1.50 times (eager, batch 1" in verdict(found(0.5, 1.5))


@pytest.mark.parametrize("kind", ["llama", "marian"])
def test_generation_is_timed_prompt_and_tokens_apart(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that waits in each call takes longer for each token, and so long."""
    model, slow = tiny(kind), tiny(kind)
    forward = slow.forward

    def waits(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(slow, "forward", waits)
    [row] = measure_decoding(model, slow, (2,), 8, seconds=0.2, tokens=4)
    assert (row.batch, row.length, row.tokens) == (2, 8, 4)
    assert row.decode_ratio > 1.5
    assert row.tokens_per_second[1] < 2 / 0.02
    assert row.prefill[1] > 0.02


def test_a_model_that_generates_gets_a_table_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(benchmark, "_fresh", lambda *_: Footprint(1.0, 1))
    place = str(tmp_path / "m")
    made = benchmark.bench(tmp_path / "m", place, (1,), (8,), ("eager",), 0.1)
    assert [(one.batch, one.length) for one in made.decoding] == [(1, 8)]
    _print(made, "words")
    told = capsys.readouterr().out
    assert "tokens/s" in told
    assert "first token" in told
    said: list[str] = []
    longest = 40  # what the tokenizer says
    long = benchmark.bench(tmp_path / "m", place, (1,), (longest,), ("eager",), 0.1, said.append)
    assert long.decoding == []
    assert f"no room to generate after {longest} tokens" in said
