"""int8 linear layers: close to the original, the head untied, the same compiled ahead of time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plmcc.cli.app import app
from plmcc.export import exporter as quantize
from support.tiny_models import inputs, tiny

IN_A_PROCESS = """
import sys, torch, plmcc
sys.modules["torchao"] = sys.modules["transformers"] = None
ids = torch.tensor([[7, 9, 8, 1], [9, 10, 11, 1]])
model = plmcc.Exported(sys.argv[1])
found = model.generate(ids, torch.ones_like(ids), num_beams=2, max_new_tokens=9)
print(found.tolist())
"""


@pytest.fixture(autouse=True)
def has_torchao() -> None:
    pytest.importorskip("torchao", reason="the extra `quantize` is not installed")


@pytest.mark.parametrize("name", ["bert", "gpt2", "mbart", "t5"])
def test_outputs_stay_close_and_the_table_stays(name: str) -> None:
    model: Any = tiny(name).eval()
    table = model.get_input_embeddings().weight.detach().clone()
    int8: Any = quantize.quantize(copy.deepcopy(model))
    models: list[Any] = [model, int8]
    with torch.no_grad():
        before, after = (m(**inputs(name)).logits for m in models)
    assert 0 < (before - after).norm() < 0.05 * before.norm()
    assert torch.equal(int8.get_input_embeddings().weight, table)


@pytest.mark.exhaustive  # it compiles the integer kernels of two programs
def test_an_int8_export_runs_without_torchao(tmp_path: Path) -> None:
    model: Any = tiny("mbart").eval()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as done:
        app(["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--int8"])
    assert done.value.code == 0
    ids = torch.tensor([[7, 9, 8, 1], [9, 10, 11, 1]])
    int8: Any = quantize.quantize(model)
    expected = int8.generate(ids, num_beams=2, max_new_tokens=9)
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "out")]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == str(expected.tolist()), run.stderr[-2000:]
