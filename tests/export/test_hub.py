"""ONNX files in the layout of servers, read with onnxruntime and tokenizers alone."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, BertModel
from typer.testing import CliRunner, Result

import plmcc
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.export.hub import FILES, export_hub
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
TEXTS = ["w1 w2 w3 w4 w5", "w7 w8", " ".join(f"w{i}" for i in range(9, 29))]
"""The last one is longer than the sentence encoder reads."""
READER = """
import json, sys
import numpy, onnxruntime, tokenizers
folder, name, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
if tokenizer.padding is None:
    tokenizer.enable_padding()
made = tokenizer.encode_batch(texts)
ids, mask, types = (numpy.array([getattr(m, n) for m in made], dtype=numpy.int64)
                    for n in ("ids", "attention_mask", "type_ids"))
session = onnxruntime.InferenceSession(f"{folder}/onnx/{name}")
given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
asked = [port.name for port in session.get_inputs()]
names = [port.name for port in session.get_outputs()]
found = session.run(names, {n: given[n] for n in asked})
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps({n: v.tolist() for n, v in zip(names, found)}))
"""


def read(folder: Path, name: str, texts: list[str] = TEXTS) -> dict[str, np.ndarray]:
    """What a server computes, in a process without torch."""
    command = [sys.executable, "-c", READER, str(folder), name, json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {key: np.array(value) for key, value in json.loads(done.stdout).items()}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with a projection, a compressed one made from it, and a classifier."""
    library = pytest.importorskip("sentence_transformers")
    made = tmp_path_factory.mktemp("hub")
    config: Any = tiny("bert").config
    torch.manual_seed(0)
    for name, model in (
        ("bare", BertModel(config)),
        ("classifier", BertForSequenceClassification(config)),
    ):
        model.save_pretrained(made / name)
        words().save_pretrained(made / name)
    parts = library.sentence_transformer.modules
    encoder = parts.Transformer(str(made / "bare"), max_seq_length=12)
    modules = [encoder, parts.Pooling(32), parts.Dense(32, 16), parts.Normalize()]
    library.SentenceTransformer(modules=modules, device="cpu").save(str(made / "sentences"))
    (made / "text.txt").write_text("\n".join(TEXTS * 9))
    text = "plmcc: 1\npasses:\n  - prune_vocabulary: {text: text.txt}\n"
    text += "  - compositional_codes: {codebooks: 4, codewords: 4, rounds: 0}\n"
    text += "lower: {quantize: int8}\n"
    plmcc.apply(
        parse_recipe(text, load_torch=True), made / "sentences", made / "compressed", base=made
    )
    return made


def test_sentence_transformers_is_told_that_it_needs_plmcc(folder: Path, tmp_path: Path) -> None:
    name = "config_sentence_transformers.json"
    values = json.loads((folder / "compressed" / name).read_text())
    assert values["requirements"] == {"plmcc": f">={importlib.metadata.version('plmcc')}"}
    code = "import sys; sys.modules['plmcc'] = None; import importlib.metadata as m\n"
    code += "real = m.version\n"
    code += "def version(n):\n if n == 'plmcc': raise m.PackageNotFoundError(n)\n return real(n)\n"
    code += "m.version = version; from sentence_transformers import SentenceTransformer\n"
    code += f"SentenceTransformer({str(folder / 'compressed')!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "plmcc" in done.stderr.splitlines()[-1]
    assert "ImportError" in done.stderr
    dense = ["export", str(folder / "compressed"), "--to", "dense", "-o", str(tmp_path / "dense")]
    made = CliRunner().invoke(app, dense)
    assert made.exit_code == 0, made.exception
    assert "requirements" not in json.loads((tmp_path / "dense" / name).read_text())


@pytest.mark.parametrize("name", ["sentences", "compressed"])
def test_a_server_gets_the_vectors_of_the_sentence_encoder(
    name: str, folder: Path, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    done = run(str(folder / name), "--to", "onnx", "--layout", "hub", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.exception
    expected = library.SentenceTransformer(str(folder / name), device="cpu").encode(TEXTS)
    assert expected.shape == (3, 16)
    cosines = {}
    for precision, file in FILES.items():
        found = read(tmp_path / "out", file)
        assert list(found) == ["token_embeddings", "sentence_embedding"]
        assert found["token_embeddings"].shape[-1] == 32
        vectors = found["sentence_embedding"]
        cosines[precision] = (vectors * expected).sum(-1).min()
        if precision == "fp32":
            assert np.abs(vectors - expected).max() < 1e-5
    assert cosines["int8"] > 0.98
    assert cosines["q4"] > 0.8
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == "bert"
    assert "quantization_config" not in values
    assert (tmp_path / "out/modules.json").exists()
    assert not list((tmp_path / "out").rglob("*.safetensors.index.json"))
    sizes = {p: (tmp_path / "out/onnx" / f).stat().st_size for p, f in FILES.items()}
    assert sizes["int8"] < sizes["fp32"]


def test_classifiers_and_bare_encoders_have_the_outputs_of_their_models(
    folder: Path, tmp_path: Path
) -> None:
    batch = words()(TEXTS, padding=True, truncation=True, return_tensors="pt")
    kinds: list[tuple[str, Any, str]] = [
        ("classifier", BertForSequenceClassification, "logits"),
        ("bare", BertModel, "last_hidden_state"),
    ]
    for name, kind, output in kinds:
        files = export_hub(str(folder / name), tmp_path / name, precisions=["fp32"])
        assert [file.name for file in files] == ["onnx/model.onnx"]
        assert [file.name for file in (tmp_path / name / "onnx").iterdir()] == ["model.onnx"]
        found = read(tmp_path / name, "model.onnx")
        model = kind.from_pretrained(folder / name)
        with torch.no_grad():
            expected = model(**batch)[output]
        assert np.abs(found[output] - expected.numpy()).max() < 1e-5


def test_only_the_int8_file_is_written_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    export_hub(str(folder / "bare"), tmp_path / "out", precisions=["int8"])
    assert [file.name for file in (tmp_path / "out/onnx").iterdir()] == ["model_quantized.onnx"]
    with pytest.raises(PlmccError, match="the output directory exists"):
        export_hub(str(folder / "bare"), tmp_path / "out", precisions=["int8"])
    export_hub(str(folder / "bare"), tmp_path / "out", precisions=["fp32"], overwrite=True)
    assert [file.name for file in (tmp_path / "out/onnx").iterdir()] == ["model.onnx"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(PlmccError, match="was not written by this command"):
        export_hub(str(folder / "bare"), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onnx", "--layout", "hubb"], "did you mean `hub`?"),
        (["--to", "onnx", "--layout", "hub", "--precision", "int9"], "unknown precision"),
        (["--to", "aoti", "--layout", "hub"], "needs `--to onnx --layout hub`"),
        (["--to", "onnx", "--precision", "int8"], "needs `--to onnx --layout hub`"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    done = run(str(folder / "bare"), "-o", str(tmp_path / "out"), *arguments)
    assert isinstance(done.exception, PlmccError)
    assert said in done.exception.render()


@pytest.mark.parametrize("precision", list(FILES))
def test_outputs_that_are_no_numbers_are_not_written(precision: str, tmp_path: Path) -> None:
    config: Any = tiny("bert").config
    model = BertModel(config)
    model.get_parameter("encoder.layer.0.output.dense.bias").data[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    with pytest.raises(PlmccError, match="computes something else"):
        export_hub(str(tmp_path / "model"), tmp_path / "out", precisions=[precision])
    assert not (tmp_path / "out").exists()


def test_models_that_write_text_are_refused(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    words().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PlmccError, match="only encoders of text"):
        export_hub(str(tmp_path / "gpt2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
