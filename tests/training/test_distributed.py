from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from plmcc import Pipeline
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.utils import distributed
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

# The texts are of one length, so that halves of a batch weigh alike, and nothing is dropped out.
# Adam would make a full step of the sign of a gradient that is nothing but rounding.
RECIPE = """\
plmcc: 1
name: ranks
task: sentence-similarity
stages:
  - name: codes
    passes: [{{compositional_codes: {{codebooks: 4, codewords: 8, rounds: 0}}}}]
    train:
      data: {{train: text.txt}}
      dropout: false
      distill: {{teacher: original, hidden_states: 1.0, pooled: 1.0}}
      arguments: {{max_steps: 8, save_strategy: steps, save_steps: 3, learning_rate: 0.1,
                  optim: sgd, per_device_train_batch_size: {size}}}
  - name: prune
    passes: [{{movement_pruning: {{method: magnitude, density: 0.7}}}}]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    lines = (" ".join(f"w{(7 * i + 3 * j) % 94}" for j in range(6)) for i in range(64))
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    base: Any = tiny("bert").base_model
    base.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def apply(model: Path, name: str, size: int, *launcher: str) -> subprocess.CompletedProcess[str]:
    file = model.parent / f"{name}.yaml"
    file.write_text(RECIPE.format(size=size))
    command = [sys.executable, *launcher, "-m", "plmcc.cli", "apply", str(file), str(model), "-o"]
    command.append(str(model.parent / name))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no gloo here")
def test_two_processes_make_what_one_makes(model: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = apply(model, "two", 8, *launcher)
    assert two.returncode == 0, two.stderr
    one = apply(model, "one", 16)
    assert one.returncode == 0, one.stderr
    assert two.stdout.count("written to") == 1  # one of them speaks
    found, expected = (load_file(model.parent / n / "model.safetensors") for n in ("two", "one"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key].float(), value.float(), rtol=1e-5, atol=1e-5), key
    assert not torch.equal(expected["embeddings.word_embeddings.codebooks"], started(model))


def started(model: Path) -> torch.Tensor:
    """The codebooks before the training."""
    loaded = AutoModel.from_pretrained(model)
    codes = CompositionalCodes(codebooks=4, codewords=8, rounds=0)
    Pipeline([codes])(loaded)
    books: torch.Tensor = loaded.get_input_embeddings().codebooks.detach()
    return books


ONE_OF_EACH_PASS = (
    "codes, tied",
    "binary",
    "factors",
    "adaptive",
    "movement",
    "movement, sensitivity",
    "soft movement",
    "l0",
    "compressed attention",
    "fewer layers",
    "low rank",
    "shared layers",
    "optimum",
    "int8",
)
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no gloo here")
def test_all_processes_end_with_the_same_model() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ONE_OF_EACH_PASS]
    cases += [("adaptive, budget", CHECKPOINTED), ("adaptive", {"max_steps": 8})]
    given = [json.dumps(case) for case in cases]

    def process(rank: int) -> subprocess.CompletedProcess[str]:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        texts = {key: str(value) for key, value in (numbers | {"MASTER_PORT": port}).items()}
        texts["MASTER_ADDR"] = "127.0.0.1"
        folder = Path(__file__).parents[1]
        return run_module("support.devices.agreement", given, cwd=folder, env=os.environ | texts)

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    printed = [one.stdout.splitlines() for one in (first, second)]  # the Trainer prints too
    digests = [dict(json.loads(x) for x in lines if x.startswith("[")) for lines in printed]
    assert digests[0] == digests[1]
    assert digests[0].keys() == {name for name, _ in cases}


def test_processes_wait_for_the_one_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing and proving a large model takes longer than the ten minutes of torch."""
    given: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "PartialState", lambda **options: given.append(options))
    distributed.init()
    assert given[0]["timeout"] > timedelta(hours=2)
