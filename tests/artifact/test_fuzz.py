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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import plmcc
from plmcc.artifact import lock as seal
from plmcc.artifact.verify import prove
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.attack

MUTATIONS = int(os.environ.get("PLMCC_FUZZ", "600"))
STAGES = """\
plmcc: 1
stages:
  - name: pruned
    passes: [{movement_pruning: {method: magnitude, granularity: structured, density: 0.5}}]
  - name: tables
    passes: [{adaptive_codes: {lengths: [4, 8], bits_per_word: 7, epochs: 1}}]
"""
ONE = "plmcc: 1\ncalibrate: {{data: synthetic}}\npasses: [{{{}}}]\n"
KINDS = {
    "stages": STAGES,
    "codes": ONE.format("compositional_codes: {codebooks: 4, codewords: 6, rounds: 0}"),
    "binary": ONE.format("binary_embedding: {bits: 16}"),
    "factors": ONE.format("distilled_factorization: {rank: 4, storage: sparse}"),
    "csr": ONE.format("movement_pruning: {method: magnitude, density: 0.5, storage: csr}"),
    "bitmask": ONE.format("movement_pruning: {method: magnitude, density: 0.5, storage: bitmask}"),
    "low rank": ONE.format("low_rank: {rank: 4}"),
    "int4": ONE.format("quantized_linears: {scheme: int4, group: 16}"),
    "merged attention": ONE.format("compressed_attention: {}"),
    "shared layers": ONE.format("share_layers: {targets: encoder, groups: 1}"),
    "structured": ONE.format("structured_pruning: {target: {parameters: 0.7}}"),
    "fewer layers": ONE.format("drop_layers: {targets: encoder, keep: 1}"),
}
ADDED: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
    "quantization_config": {"quant_method": "torchao", "quant_type": "int8"},
    "_attn_implementation": "kernels-community/evil",
    "attn_implementation": "evil/kernel@main",
    "pruned_heads": {"0": [0, 1]},
    "num_labels": 50_000_000,
    "id2label": {"0": "a" * 100_000},
    "label2id": {"a": 10**12},
    "text_config": {"num_hidden_layers": 10**9},
    "rope_scaling": {"rope_type": "evil", "factor": 1e308},
    "custom_pipelines": {"x": {"impl": "evil.Evil", "pt": ["AutoModel"]}},
    "adapter_config": {"base_model_name_or_path": "/etc"},
    "_name_or_path": "/etc/passwd",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "is_decoder": True,
    "add_cross_attention": True,
    "chunk_size_feed_forward": 10**12,
    "torch_dtype": "float8_e4m3fn",
    "return_dict": False,
    "generation_config": {"max_new_tokens": 10**12},
    "vocab_size": 10**12,
    "num_experts": 10**9,
    "dtype": {"": "x"},
}
FILES: dict[str, bytes] = {
    "modules.json": b'[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]',
    "adapter_config.json": b'{"base_model_name_or_path": "/etc"}',
    "model-00001-of-00001.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "model.safetensors.index.json": b'{"weight_map": {"x": "../../etc/passwd"}}',
    "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR.",
    "modeling_evil.py": b"raise SystemExit",
    "generation_config.json": b'{"max_new_tokens": 1000000000000}',
    "tokenizer.json": b"{}",
    "added_tokens.json": b'{"x": 5}',
    "chat_template.jinja": b"{{ 1 }}",
    "1_Pooling/config.json": b'{"pooling_mode": "evil"}',
    "manifest.json": b'{"plmcc_export": 4}',
    "model.pt2": b"\0",
    "conftest.pyc": b"\0",
}
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


def made(kind: str, folder: Path) -> Path:
    tiny("marian").save_pretrained(folder / "m")
    words().save_pretrained(folder / "m")
    recipe = parse_recipe(KINDS[kind], load_torch=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("plmcc.artifact.verify.in_fresh_process", lambda _: 0.0)
        plmcc.apply(recipe, folder / "m", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made("stages", tmp_path_factory.mktemp("fuzz"))
    (folder / seal.LOCK).unlink()
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("codes", tmp_path_factory.mktemp("sealed"))


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
    kind = drawn.choice(["strange", "strange", "strange", "gone", "twice", "added"])
    if kind == "added":
        key = drawn.choice(sorted(ADDED))
        holder = holder if isinstance(holder, dict) and drawn.random() < 0.3 else config
        holder[key] = drawn.choice([ADDED[key], ADDED[key], drawn.choice(STRANGE)])
        return config, f"{key} added: {str(holder[key])[:40]}"
    what = f"{'.'.join(map(str, path))} {kind}"
    if kind == "gone":
        del holder[path[-1]]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path[-1]]))
    else:
        holder[path[-1]] = drawn.choice(STRANGE)
        what += f" {str(holder[path[-1]])[:40]}"
    return config, what


@pytest.mark.parametrize("kind", KINDS)
def test_edited_configs_load_or_are_refused(kind: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path)
    (folder / seal.LOCK).unlink()
    config = json.loads((folder / "config.json").read_text())
    drawn = random.Random(int(os.environ.get("PLMCC_FUZZ_SEED", "0")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    broken, slow = [], []
    for _ in range(max(1, MUTATIONS // len(KINDS))):
        changed, what = mutated(config, drawn)
        (folder / "config.json").write_text(json.dumps(changed))
        start = time.process_time()  # not of the clock: other processes may be busy
        try:
            plmcc.load(folder)
        except PlmccError:
            pass
        except Exception as problem:
            broken.append(f"{what}: {type(problem).__name__}: {str(problem)[:200]}")
        if time.process_time() - start > 10:
            slow.append(what)
    assert broken == []
    assert slow == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_added_is_refused_or_not_read(
    name: str, sealed: Path, tmp_path: Path
) -> None:
    """Sealed with the others, as anyone can, the artifact does not load as something else."""
    shutil.copytree(sealed, tmp_path / "copy")
    folder = tmp_path / "copy"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(FILES[name])
    with pytest.raises(PlmccError, match=r"not in plmcc\.lock|changed after it"):
        prove(folder)
    seal.write(folder, seal.read(folder))
    with suppress(PlmccError):  # and nothing else
        prove(folder)


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
