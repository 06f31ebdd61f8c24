"""Single integers of tensors that somebody has changed: refused, or harmless; never a crash.

`PLMCC_FUZZ=20000 pytest tests/artifact/test_integers.py` tries more, evenly of all kinds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import plmcc
from plmcc.artifact import lock as seal
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.attack

MUTATIONS = int(os.environ.get("PLMCC_FUZZ", "200")) // 8
PRUNED = "movement_pruning: {{method: magnitude, density: 0.5, storage: {}}}"
KINDS = {
    "csr": PRUNED.format("csr"),
    "int8_csr": PRUNED.format("int8_csr"),
    "bitmask": PRUNED.format("bitmask"),
    "adaptive codes": "adaptive_codes: {lengths: [4, 8], bits_per_word: 7, epochs: 1}",
    "codes of 6 codewords": "compositional_codes: {codebooks: 4, codewords: 6, rounds: 0}",
    "binary codes": "binary_embedding: {bits: 16}",
    "sparse factor": "distilled_factorization: {rank: 4, storage: sparse}",
    "int4": "quantized_linears: {scheme: int4, group: 16}",
}
# In a process of its own: where memory is written outside of tensors, it is this one that dies.
CHILD = """
import json, os, random, sys
from pathlib import Path
import torch, plmcc
from safetensors.torch import load_file, save_file
from plmcc.diagnostics import PlmccError
folder, count = Path(sys.argv[1]), int(sys.argv[2])
whole = load_file(folder / "model.safetensors")
names = sorted(name for name, value in whole.items() if not value.is_floating_point())
drawn = random.Random(int(os.environ.get("PLMCC_FUZZ_SEED", "0")))
refused, ran, broken = 0, 0, []
for _ in range(count):
    name = drawn.choice(names)
    value = whole[name].clone()
    kind = torch.iinfo(value.dtype)
    index = drawn.randrange(value.numel())
    to = drawn.choice([kind.min, kind.max, 0, 1, kind.max // 2, drawn.randint(kind.min, kind.max)])
    flat = value.flatten()
    flat[index] = to
    changed = {**whole, name: flat.view(value.shape)}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    try:
        model = plmcc.load(folder)
        with torch.no_grad():
            ids = torch.arange(12).view(2, 6)
            kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model(input_ids=ids, **kwargs)
        ran += 1
    except PlmccError:
        refused += 1
    except Exception as problem:
        broken.append(f"{name}[{index}] = {to}: {type(problem).__name__}: {str(problem)[:100]}")
print(json.dumps({"refused": refused, "ran": ran, "broken": broken}))
"""


def artifact(kind: str, folder: Path) -> Path:
    tiny("bert").save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    text = f"plmcc: 1\npasses: [{{{KINDS[kind]}}}]\n"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("plmcc.artifact.verify.in_fresh_process", lambda _: 0.0)
        plmcc.apply(parse_recipe(text, load_torch=True), folder / "model", folder / "out")
    (folder / "out" / seal.LOCK).unlink()
    return folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_integer_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    folder = artifact(kind, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(MUTATIONS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == []
    assert found["refused"] + found["ran"] == MUTATIONS


@pytest.mark.parametrize(
    ("kind", "name", "index", "value", "said"),
    [
        ("csr", "starts", 1, 10**6, "does not rise from 0"),
        ("csr", "starts", 2, -5, "does not rise from 0"),
        ("csr", "columns", 0, 60_000, "are allowed"),
        ("int8_csr", "starts", -1, 10**6, "does not rise from 0"),
        ("bitmask", "mask", 0, "flipped", "names other places"),
        ("adaptive codes", "selector", 0, "flipped", "names other places"),
        ("codes of 6 codewords", "codes", 0, 255, "0 to 5 are allowed"),
        ("sparse factor", "starts", 3, 10**6, "names other places"),
    ],
)
def test_what_no_module_may_be_called_with_is_named(
    kind: str, name: str, index: int, value: Any, said: str, tmp_path: Path
) -> None:
    folder = artifact(kind, tmp_path)
    whole = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(whole) if key.endswith(f".{name}"))
    flat = whole[key].flatten()
    flat[index] = flat[index] ^ 1 if value == "flipped" else value
    save_file({**whole, key: flat.view(whole[key].shape)}, folder / "model.safetensors")
    with pytest.raises(PlmccError, match=said):
        plmcc.load(folder)
