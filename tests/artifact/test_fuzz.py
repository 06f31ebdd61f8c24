"""Artifacts whose config somebody has edited: refused in a sentence, or loaded; no hang, no large
allocation.

`PLMCC_FUZZ=4000 PLMCC_FUZZ_SEED=1 pytest tests/artifact/test_fuzz.py` tries more, and others.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plmcc
from plmcc.artifact import lock as seal
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.attack

MUTATIONS = int(os.environ.get("PLMCC_FUZZ", "600"))
RECIPE = """\
plmcc: 1
stages:
  - name: pruned
    passes: [{movement_pruning: {method: magnitude, granularity: structured, density: 0.5}}]
  - name: tables
    passes: [{adaptive_codes: {lengths: [4, 8], bits_per_word: 7, epochs: 1}}]
"""
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**6,
    10**12,
    10**30,
    0.5,
    -1e308,
    float("nan"),
    "",
    "x",
    "os.system",
    "../../etc/passwd",
    "x" * 10_000,
    [],
    [[]],
    [10**12] * 3,
    {},
    {"a": {}},
    "float128",
    "meta",
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny("marian").save_pretrained(folder / "m")
    words().save_pretrained(folder / "m")
    plmcc.apply(parse_recipe(RECIPE, load_torch=True), folder / "m", folder / "out")
    (folder / "out" / seal.LOCK).unlink()
    return folder / "out"


def locations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from locations(inner, (*path, key))


def mutated(config: Any, drawn: random.Random) -> tuple[Any, str]:
    """A config with one value changed, removed, doubled or moved."""
    config = copy.deepcopy(config)
    path = drawn.choice(list(locations(config)))
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    kind = drawn.choice(["strange", "strange", "strange", "gone", "twice"])
    what = f"{'.'.join(map(str, path))} {kind}"
    if kind == "gone":
        del holder[path[-1]]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path[-1]]))
    else:
        holder[path[-1]] = drawn.choice(STRANGE)
        what += f" {str(holder[path[-1]])[:40]}"
    return config, what


def test_edited_configs_load_or_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    config = json.loads((artifact / "config.json").read_text())
    drawn = random.Random(int(os.environ.get("PLMCC_FUZZ_SEED", "0")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    broken, slow = [], []
    for _ in range(MUTATIONS):
        changed, what = mutated(config, drawn)
        (folder / "config.json").write_text(json.dumps(changed))
        start = time.perf_counter()
        try:
            plmcc.load(folder)
        except PlmccError:
            pass
        except Exception as problem:
            broken.append(f"{what}: {type(problem).__name__}: {str(problem)[:200]}")
        if time.perf_counter() - start > 10:
            slow.append(what)
    assert broken == []
    assert slow == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((n, 10**9) for n in ("vocab_size", "encoder_layers", "d_model")),
        *(("max_position_embeddings", n) for n in (10**6, 10**9)),
    ],
)
def test_huge_sizes_are_refused_before_anything_is_allocated(
    artifact: Path, tmp_path: Path, name: str, size: int
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    config = json.loads((artifact / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: size}))
    start = time.process_time()  # not of the clock: other processes may be busy
    with pytest.raises(PlmccError):
        plmcc.load(folder)
    assert time.process_time() - start < 20
