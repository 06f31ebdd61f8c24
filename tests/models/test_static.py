"""Static models: tables of token vectors, of sentence-transformers and of model2vec."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

import plmcc
from plmcc.artifact.verify import prove
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.source import load_source
from plmcc.recipe.load import parse_recipe
from support.tokenizers import words

_NEW = "sentence_transformers.sentence_transformer"  # since version 6
modules: Any = importlib.import_module(
    f"{_NEW}.modules" if find_spec(_NEW) else "sentence_transformers.models"
)
TEXTS = ["w1 w2 w3", "w4 w9 w9 w10", "w7"]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    torch.manual_seed(0)
    table = modules.StaticEmbedding(words(), embedding_dim=32)
    SentenceTransformer(modules=[table, modules.Normalize()]).save_pretrained(str(folder))
    return folder


def vectors(folder: Path) -> Any:
    source = load_source(folder)
    evaluator = Evaluator(source.model, source.need_tokenizer("this"), source.pooling)
    return evaluator.embed(TEXTS).numpy()


def applied(passes: str, model: Path, folder: Path) -> Path:
    (folder / "text.txt").write_text("\n".join(TEXTS))
    text = f"plmcc: 1\npasses: [{passes.replace('TEXT', str(folder / 'text.txt'))}]\n"
    plmcc.apply(parse_recipe(text, load_torch=True), model, folder / "out")
    return folder / "out"


def test_vectors_are_those_of_sentence_transformers(static: Path) -> None:
    source = load_source(static)
    assert source.task == "sentence-similarity"
    assert "static model" in source.notes[0]
    assert np.abs(vectors(static) - SentenceTransformer(str(static)).encode(TEXTS)).max() < 1e-6


def test_a_compressed_one_is_a_sentence_transformer(static: Path, tmp_path: Path) -> None:
    codes = "compositional_codes: {width: 2, codewords: 16, initialization: product}"
    out = applied(codes, static, tmp_path)
    prove(out)
    found = SentenceTransformer(str(out)).encode(TEXTS)
    assert np.abs(found - vectors(out)).max() < 1e-6
    original = SentenceTransformer(str(static)).encode(TEXTS)
    assert (found * original).sum(-1).min() > 0.7  # cosines: both are normalized
    assert (out / "model.safetensors").stat().st_size < (
        static / "model.safetensors"
    ).stat().st_size


def test_kept_texts_have_the_same_vectors_after_vocabulary_pruning(
    static: Path, tmp_path: Path
) -> None:
    out = applied("prune_vocabulary: {text: TEXT}", static, tmp_path)
    loads = "import sys, plmcc, transformers as t; t.AutoModel.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", loads, str(out)], check=True, capture_output=True)
    source = load_source(out)
    assert source.model.config.vocab_size < load_source(static).model.config.vocab_size
    original = SentenceTransformer(str(static)).encode(TEXTS)
    assert np.abs(SentenceTransformer(str(out)).encode(TEXTS) - original).max() < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("parts", [set(), {"weights"}, {"weights", "mapping"}])
def test_model2vec_loads(parts: set[str], normalize: bool, tmp_path: Path) -> None:
    raw = words().backend_tokenizer
    size = raw.get_vocab_size()
    random = torch.Generator().manual_seed(0)
    rows = 20 if "mapping" in parts else size
    tensors = {"embeddings": torch.randn(rows, 16, generator=random)}
    if "weights" in parts:
        tensors["weights"] = torch.rand(size, generator=random)
    if "mapping" in parts:
        tensors["mapping"] = torch.randint(0, rows, (size,), generator=random)
    save_file(tensors, tmp_path / "model.safetensors")
    raw.save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": normalize}
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = tensors["embeddings"]
    table = table[tensors["mapping"]] if "mapping" in parts else table
    table = table * tensors["weights"][:, None] if "weights" in parts else table
    expected = []
    for text in TEXTS:
        ids = raw.encode(text, add_special_tokens=False).ids
        mean = table[ids].mean(0)
        expected.append((mean / mean.norm() if normalize else mean).numpy())
    assert np.abs(vectors(tmp_path) - np.stack(expected)).max() < 1e-6
    model2vec = pytest.importorskip("model2vec")
    theirs = model2vec.StaticModel.from_pretrained(tmp_path).encode(TEXTS)
    assert np.abs(vectors(tmp_path) - theirs).max() < 1e-5


@pytest.mark.parametrize(
    ("broken", "said"),
    [("model.safetensors", "cannot be read"), ("tokenizer.json", "cannot be read")],
)
def test_a_broken_one_is_one_sentence(static: Path, tmp_path: Path, broken: str, said: str) -> None:
    for file in static.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(static)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(b"{}" if file.name == broken else file.read_bytes())
    with pytest.raises(PlmccError, match=said):
        load_source(tmp_path)


def copied(static: Path, folder: Path) -> Path:
    shutil.copytree(static, folder)
    return folder


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("path", ["../secret", "/tmp", "1_Normalize/../../secret"])
def test_a_module_outside_of_the_directory_is_refused(
    static: Path, tmp_path: Path, index: int, path: str
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("not for others")
    folder = copied(static, tmp_path / "model")
    listed = json.loads((folder / "modules.json").read_text())
    listed[index]["path"] = path
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(PlmccError, match="not in the directory of the model"):
        load_source(folder)


def test_links_do_not_come_along(static: Path, tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text("not for others")
    folder = copied(static, tmp_path / "model")
    (folder / "README.md").unlink()
    for name in ("README.md", "LICENSE", "1_Normalize/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "key.txt")
    source = load_source(folder)
    assert source.folder is not None
    texts = [f.read_bytes() for f in source.folder.rglob("*") if f.is_file()]
    assert not any(b"not for others" in text for text in texts)
