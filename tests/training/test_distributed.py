from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from plmcc import Pipeline
from plmcc.passes.compositional_codes import CompositionalCodes
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
