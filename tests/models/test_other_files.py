"""What is beside the weights of a model comes along, and `apply` and `verify` prove it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import AutoModel, AutoTokenizer

import plmcc
from plmcc.artifact.verify import prove
from plmcc.catalog import registry as catalog
from plmcc.data import pooling as poolings
from plmcc.models.other_files import copy_other_files, other_files
from plmcc.models.source import load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from support.tiny_models import tiny
from support.tokenizers import words

CODES = CompositionalCodes(codebooks=8, codewords=16, initialization="product")
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10 w11 w12"]


def bert() -> Any:
    return tiny("bert").base_model


def encoder(folder: Path, *later: Any, **settings: Any) -> Path:
    """A tiny BERT as a SentenceTransformer."""
    base = folder.with_name("base")
    bert().save_pretrained(base)
    words().save_pretrained(base)
    inner = SentenceTransformer(str(base), device="cpu")[0]
    SentenceTransformer(modules=[inner, *later], device="cpu", **settings).save_pretrained(
        str(folder)
    )
    shutil.rmtree(base)
    return folder


def lossless() -> Any:
    """A pass that changes no output: it prunes nothing, and stores the layers as sparse."""
    kind: Any = catalog.load("movement_pruning")
    return kind(method="magnitude", density=1.0, storage="bitmask")


def pairs(folder: Path) -> Path:
    """Labeled pairs whose second text is longer than the first."""
    lines = [f"w{i} w{i + 3}\tw{(7 * i) % 90} w{i + 1} w{i + 2}\t{(i * i) % 11}" for i in range(40)]
    file = folder / "pairs.tsv"
    file.write_text("text_a\ttext_b\tlabel\n" + "\n".join(lines) + "\n")
    return file


CHAINS: dict[str, tuple[Any, ...]] = {
    "dense": (lambda: Pooling(32, pooling_mode="mean"), lambda: Dense(32, 16)),
    "layer norm": (lambda: Pooling(32, pooling_mode="cls"), lambda: LayerNorm(32)),
    "last token": (lambda: Pooling(32, pooling_mode="lasttoken"),),
    "two poolings": (lambda: Pooling(32, pooling_mode=("mean", "max")), lambda: Dense(64, 8)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_modules_of_sentence_transformers_come_along(chain: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = encoder(tmp_path / "model", *(make() for make in CHAINS[chain]))
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    data = str(pairs(tmp_path))
    metric = plmcc.Evaluate(metric="spearman", data=data, text=["text_a", "text_b"], label="label")
    recipe = plmcc.Recipe(passes=[lossless()], evaluate=[metric])
    result = plmcc.apply(recipe, folder, tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(model.encode(TEXTS) - expected).max() < 1e-5
    assert result.metrics[0]["after"] == pytest.approx(figure(model, Path(data)), abs=1e-3)
    assert prove(tmp_path / "out").unknown == []


def figure(model: SentenceTransformer, file: Path) -> float:
    """Spearman correlation in percent, as a user of the library computes it."""
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    first, second = (model.encode([row[i] for row in rows]) for i in (0, 1))
    found = model.similarity_pairwise(first, second)
    return 100 * float(spearmanr(found, [float(row[2]) for row in rows])[0])


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("include", [True, False], ids=["with prompt", "prompt left out"])
def test_figures_are_those_of_encode(measure: str, include: bool, tmp_path: Path) -> None:
    settings = {"prompts": {"query": "w1 w2 "}, "default_prompt_name": "query"}
    pooled = Pooling(32, pooling_mode="mean", include_prompt=include)
    folder = encoder(tmp_path / "model", pooled, similarity_fn_name=measure, **settings)
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_seq_length": 6}))
    source = load_source(folder)
    assert source.max_length(100) == 6
    assert "the prompt 'w1 w2 '" in source.notes[-1]
    data = pairs(tmp_path)
    metric = plmcc.Evaluate(metric="spearman", data=str(data))
    result = plmcc.apply(plmcc.Recipe(passes=[CODES], evaluate=[metric]), folder, tmp_path / "out")
    for when, where in (("before", folder), ("after", tmp_path / "out")):
        model = SentenceTransformer(str(where), device="cpu")
        assert result.metrics[0][when] == pytest.approx(figure(model, data), abs=1e-3)


def test_a_truncated_vector_is_measured_as_such(tmp_path: Path) -> None:
    states, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.long)
    whole, cut = poolings.Pooling(), poolings.Pooling(dims=5)
    assert torch.equal(cut(states, mask), whole(states, mask)[:, :5])
    assert torch.allclose(cut.unit(states, mask).norm(dim=-1), torch.ones(2))


def test_distillation_goes_through_the_modules(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", Pooling(32, pooling_mode="mean"), Dense(32, 4))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(32)))
    arguments = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    train = plmcc.Train(
        data=plmcc.Data(train=str(text)), distill=plmcc.Distill(pooled=1.0), arguments=arguments
    )
    metric = plmcc.Evaluate(metric="fidelity", data=str(text))
    rough = CompositionalCodes(codebooks=2, codewords=4, initialization="product")
    untrained = plmcc.apply(plmcc.Recipe(passes=[rough], evaluate=[metric]), folder)
    trained = plmcc.apply(plmcc.Recipe(passes=[rough], train=train, evaluate=[metric]), folder)
    assert trained.metrics[0]["after"] > untrained.metrics[0]["after"]


def test_code_of_the_model_in_its_modules_is_refused(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", Pooling(32, pooling_mode="mean"), Dense(32, 4))
    file = folder / "modules.json"
    file.write_text(file.read_text().replace(Dense.__module__, "custom_st"))
    with pytest.raises(plmcc.PlmccError, match="code of the model's own"):
        load_source(folder)


def test_a_cross_encoder_gives_the_same_scores(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    CrossEncoder(str(tmp_path / "base"), num_labels=1).save_pretrained(str(tmp_path / "model"))
    given = [("w1 w2", "w3"), ("w4", "w5 w6")]
    expected = CrossEncoder(str(tmp_path / "model")).predict(given)
    plmcc.apply(plmcc.Recipe(passes=[lossless()]), tmp_path / "model", tmp_path / "out")
    assert abs(CrossEncoder(str(tmp_path / "out")).predict(given) - expected).max() < 1e-5
    assert "vectors" in json.loads((tmp_path / "out/text_probes.json").read_text())


def plain(folder: Path) -> Path:
    """A tiny BERT with its tokenizer."""
    bert().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


BESIDE = {
    "LICENSE": "free",
    "NOTICE": "by us",
    "source.spm": "pieces",
    "bpe.codes": "a b",
    "vocab-src.vocab": "a 1",
    "additional_chat_templates/tool.jinja": "{{ messages }}",
    "license.md": "free",
    "images/logo.svg": "<svg/>",
}
BEHIND = {
    "onnx/model.onnx": "weights",
    "onnx/config.json": "weights",
    "checkpoint-5/optimizer.pt": "weights",
    "helper.py": "code",
    "features.h5": "weights",
    "state.pkl": "pickled",
}


def test_everything_but_other_weights_and_code_comes_along(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    for name in (*BESIDE, *BEHIND, "flax_model.msgpack", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(BESIDE.get(name, "x"))
    found = other_files(folder)
    assert set(BESIDE) <= {str(path) for path in found.copied}
    assert {"onnx/", "checkpoint-5/", "helper.py", "features.h5", "state.pkl"} == dict(
        found.left
    ).keys()
    result = plmcc.apply(plmcc.Recipe(passes=[CODES]), folder, tmp_path / "out")
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text
    for name in (*BEHIND, "flax_model.msgpack", ".git/HEAD"):
        assert not (tmp_path / "out" / name).exists()
    notes = " ".join(result.source.notes)
    for name in ("onnx/", "helper.py", "state.pkl"):
        assert name in notes


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_code_comes_along_with_consent_only(keep: bool, tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_my.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = "raise SystemExit('this code must not run')\n"
    (folder / "modeling_my.py").write_text(code)
    out = tmp_path / "out"
    plmcc.apply(plmcc.Recipe(passes=[CODES]), folder, out, keep_code=keep)
    assert (out / "modeling_my.py").exists() is keep
    named = [
        name
        for name in ("config.json", "tokenizer_config.json")
        if "auto_map" in (out / name).read_text()
    ]
    assert len(named) == (2 if keep else 0)
    if not keep:  # as scripts for such models do
        AutoModel.from_pretrained(out, trust_remote_code=True)
        AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def test_pickled_weights_of_a_module_become_safetensors(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", Pooling(32, pooling_mode="mean"), Dense(32, 16))
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    from safetensors.torch import load_file

    weights = folder / "2_Dense/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    plmcc.apply(plmcc.Recipe(passes=[lossless()]), folder, tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("*.bin")]
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert abs(found - expected).max() < 1e-5


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(plmcc.PlmccError, match="merge it into the model first"):
        plmcc.apply(plmcc.Recipe(passes=[CODES]), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_in_the_artifact_is_found(tmp_path: Path) -> None:
    plmcc.apply(plmcc.Recipe(passes=[CODES]), plain(tmp_path / "model"), tmp_path / "out")
    file = tmp_path / "out/tokenizer.json"
    values = json.loads(file.read_text())
    values["post_processor"] = None
    file.write_text(json.dumps(values))
    (tmp_path / "out/plmcc.lock.json").unlink()
    from plmcc.artifact import text_probes

    with pytest.raises(plmcc.PlmccError, match="gives other ids"):
        text_probes.check(tmp_path / "out")
    probes = tmp_path / "out" / text_probes.FILE
    kept = probes.read_text()
    for broken in ("{", "[]", '{"texts": ["a"], "ids": []}', '{"texts": 3}'):
        probes.write_text(broken)
        with pytest.raises(plmcc.PlmccError, match="PLM402: the recorded texts cannot be read"):
            text_probes.check(tmp_path / "out")
    probes.write_text(kept)
    file.unlink()
    (tmp_path / "out/tokenizer_config.json").unlink()
    with pytest.raises(plmcc.PlmccError, match="the tokenizer of the artifact"):
        text_probes.check(tmp_path / "out")


def test_links_that_leave_the_directory_stay_behind(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not for others")
    model = tmp_path / "models--a--b/snapshots/main"
    blobs = tmp_path / "models--a--b/blobs"
    for folder in (model, blobs):
        folder.mkdir(parents=True)
    (blobs / "1234").write_text("of the cache")
    (model / "inside.txt").write_text("of the model")
    (model / "notes.txt").symlink_to(secret)
    (model / "again.txt").symlink_to("inside.txt")
    (model / "cached.txt").symlink_to("../../blobs/1234")
    (model / "folder").symlink_to(tmp_path)
    found = other_files(model)
    assert [str(name) for name in found.copied] == ["again.txt", "cached.txt", "inside.txt"]
    assert found.left == (("notes.txt", "a link that leads out of the directory"),)
    copy_other_files(found, model, tmp_path)
    assert not (tmp_path / "notes.txt").exists()
