"""What somebody can write into an artifact, and seal again: refused in a sentence, soon, and by
every command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import plmcc
from plmcc.artifact import lock as seal
from plmcc.artifact.verify import prove
from plmcc.diagnostics import PlmccError
from plmcc.models.source import load_source
from plmcc.planning.diff import diff
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.attack
CODES = "compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}"
STOCK = "drop_layers: {targets: encoder, keep: 1}"
COMMANDS: dict[str, Callable[[Path], object]] = {
    "verify": prove,
    "load": plmcc.load,
    "diff": lambda folder: diff(str(folder), str(folder)),
    "apply": load_source,
    "plan": lambda folder: load_source(folder, meta=True),
}
WRONG: dict[str, dict[str, Any]] = {
    "50 million labels": {"num_labels": 50_000_000},
    "10,000 layers": {"num_hidden_layers": 10_000},
    "900 layers": {"num_hidden_layers": 900},
    "a layer more": {"num_hidden_layers": 4},
    "an activation that is none": {"hidden_act": "os.system"},
    "an activation that is a number": {"hidden_act": 7},
    "a dtype that is none": {"dtype": "float128"},
    "a dtype of 8 bits": {"dtype": "float8_e4m3fn"},
    "architectures as text": {"architectures": "BertForMaskedLM", "hidden_size": 48},
    "a number as architecture": {"architectures": [7], "hidden_size": 48},
    "a class that is no model": {"architectures": ["AutoTokenizer"], "hidden_size": 48},
    "layers as text": {"num_hidden_layers": "two"},
    "a list of layers": {"num_hidden_layers": [2]},
    "no heads": {"num_attention_heads": 0},
    "a large model": {"hidden_size": 2**20, "num_attention_heads": 1},
    "many positions": {"max_position_embeddings": 10**9},
    "a negative size": {"vocab_size": -5},
    "another base": {"base_model_type": "gpt2", "model_type": "gpt2"},
}


def made(recipe: str, folder: Path) -> Path:
    tiny("bert").save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    text = f"plmcc: 1\npasses: [{{{recipe}}}]\n"
    plmcc.apply(parse_recipe(text, load_torch=True), folder / "model", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module", params=[CODES, STOCK], ids=["codes", "ordinary checkpoint"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(request.param, tmp_path_factory.mktemp("attack"))


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def resealed(folder: Path, **changes: Any) -> None:
    """Change the config, and write the lock again."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    kept = {k: v for k, v in changes.items() if k in values or not k.endswith("model_type")}
    file.write_text(json.dumps(values | kept))
    seal.write(folder, seal.read(folder))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_config_that_fits_nothing_is_refused(wrong: str, command: str, copy: Path) -> None:
    resealed(copy, **WRONG[wrong])
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        COMMANDS[command](copy)
    except PlmccError as problem:
        told = str(problem)
        assert "Traceback" not in told
        assert len(told) < 1500
    else:
        assert command in ("plan", "diff"), "tensors that no file holds were made up"
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: 1 GiB


def test_the_seal_is_looked_at_before_the_config(copy: Path) -> None:
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": 50_000_000}))
    start = time.process_time()
    with pytest.raises(PlmccError, match="changed after it was written"):
        prove(copy)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"base_model_type": "roberta"}])
def test_nothing_is_random_without_a_lock(change: dict[str, Any], tmp_path: Path) -> None:
    folder = made(CODES, tmp_path)
    (folder / seal.LOCK).unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for load in (plmcc.load, AutoModel.from_pretrained, load_source):
        with pytest.raises(PlmccError):
            load(folder)


def test_a_missing_tensor_is_refused_in_every_way_of_loading(tmp_path: Path) -> None:
    folder = made(CODES, tmp_path)
    (folder / seal.LOCK).unlink()
    whole = load_file(folder / "model.safetensors")
    gone = next(name for name in whole if "attention.self.query.weight" in name)
    del whole[gone]
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    for load in (plmcc.load, AutoModel.from_pretrained, load_source):
        with pytest.raises(PlmccError, match=r"attention\.self\.query\.weight"):
            load(folder)


@pytest.mark.parametrize("name", ["plmcc.lock.json", "config.json", "text_probes.json"])
def test_a_pipe_is_no_file_of_an_artifact(name: str, copy: Path) -> None:
    if not (copy / name).exists():
        name = next(file.name for file in copy.glob("*probes*.json"))
    (copy / name).unlink()
    os.mkfifo(copy / name)
    for command in COMMANDS.values():
        with suppress(PlmccError):  # and nothing else: no command waits for who writes to the pipe
            command(copy)
    with pytest.raises(PlmccError):
        prove(copy)


@pytest.mark.parametrize("name", ["config.json", "plmcc.lock.json", "tokenizer_config.json"])
def test_json_that_is_nested_deep_is_a_sentence(name: str, copy: Path) -> None:
    (copy / name).write_text("[" * 100_000 + "]" * 100_000)
    for command in COMMANDS.values():
        with suppress(PlmccError):
            command(copy)
    with pytest.raises(PlmccError):
        prove(copy)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}{}{}{}", b"\xff" * 8])
def test_headers_of_weights_that_are_none(content: bytes, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(content)
    seal.write(copy, seal.read(copy))
    for name, command in COMMANDS.items():
        if name not in ("plan", "diff"):
            with pytest.raises(PlmccError):
                command(copy)
