"""Static models as ordinary encoders: a table of token vectors whose mean is a text's vector.

`StaticEmbedding` of sentence-transformers, and model2vec, keep a table and a tokenizer and no
config of transformers. They are written once as a model of one table with mean pooling, to which
every pass on tables applies, and which sentence-transformers loads like any encoder.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from plmcc.data.pooling import MODULES
from plmcc.diagnostics import error
from plmcc.models.other_files import leaves
from plmcc.utils.files import read_json
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

_STATIC = "StaticEmbedding"
_LIBRARY = "sentence_transformers.models"
_TABLES = ("embedding.weight", "embeddings", "embedding")
_PADS = ("[PAD]", "<pad>", "<|pad|>")
_POOLING = "plmcc_pooling"


def is_static(folder: Path) -> bool:
    """Say whether a directory is a static model."""
    modules = _json(folder / MODULES)
    first = modules[0] if isinstance(modules, list) and modules else {}
    kind = str(first.get("type", "")) if isinstance(first, dict) else ""
    return kind.rpartition(".")[2] == _STATIC or _is_model2vec(folder)


def _is_model2vec(folder: Path) -> bool:
    values = _json(folder / "config.json")
    return isinstance(values, dict) and values.get("model_type") == "model2vec"


def _json(file: Path) -> object:
    try:
        return read_json(file) if file.is_file() else None
    except (OSError, ValueError):
        return None


@cache
def as_encoder(folder: Path) -> Path:
    """Write a static model as a directory that transformers loads; it is removed at exit.

    Raises:
        PlmccError: table or tokenizer cannot be read.
    """
    from plmcc.vectors.model import WordVectors, WordVectorsConfig

    modules = _json(folder / MODULES)
    listed = [one for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    inner = _inside(folder, listed[0]) if listed else folder
    try:
        tensors = load_file(inner / "model.safetensors")
        raw = Tokenizer.from_file(str(inner / "tokenizer.json"))
        table_VD = _table(tensors, raw)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as problem:
        message = f"this static model cannot be read: {first_line(problem)}"
        raise error("PLM401", message, str(folder)) from None
    except Exception as problem:  # of the tokenizers library, which has no other class
        message = f"its tokenizer cannot be read: {first_line(problem)}"
        raise error("PLM401", message, str(inner / "tokenizer.json")) from None
    made = Path(tempfile.mkdtemp(prefix="plmcc-static-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    config = WordVectorsConfig(vocab_size=len(table_VD), hidden_size=table_VD.shape[1])
    config.architectures = [WordVectors.__name__]
    with torch.device("meta"):
        model = WordVectors(config)
    model.set_input_embeddings(nn.Embedding.from_pretrained(table_VD))
    model.save_pretrained(made)
    _write_tokenizer(raw, made)
    _write_modules(folder, listed, made)
    return made


def _inside(folder: Path, module: Values) -> Path:
    """The folder of a module; a model from somebody else could name any other.

    Raises:
        PlmccError: it is not in the directory of the model.
    """
    found = folder / str(module.get("path") or "")
    if not found.resolve().is_relative_to(folder.resolve()):
        message = "a module is not in the directory of the model"
        raise error("PLM401", message, str(folder / MODULES), got=str(module.get("path")))
    return found


def _table(tensors: dict[str, Tensor], raw: Tokenizer) -> Tensor:
    """The vector of every token (V, D), float32; of model2vec times its weight."""
    stored = next(tensors[name] for name in _TABLES if name in tensors).float()
    if "mapping" in tensors:
        stored = stored[tensors["mapping"].long()]
    if "weights" in tensors:
        stored = stored * tensors["weights"].float()[:, None]
    if "embeddings" in tensors:  # model2vec leaves unknown tokens out of the mean
        unknown = (json.loads(raw.to_str())["model"] or {}).get("unk_token")
        index = raw.token_to_id(unknown) if unknown else None
        if index is not None:
            stored[index] = 0
    return stored.contiguous()


def _write_tokenizer(raw: Tokenizer, folder: Path) -> None:
    """Nothing is put around a text, and nothing but the mask says what is padding."""
    raw.no_padding()
    raw.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    vocabulary = raw.get_vocab()
    special = {"pad_token": next((name for name in _PADS if name in vocabulary), None)}
    model: Values = json.loads(raw.to_str())["model"]
    unknown = model.get("unk_token") or _by_id(vocabulary, model.get("unk_id"))
    special["unk_token"] = unknown if unknown in vocabulary else None
    special = {name: token for name, token in special.items() if token is not None}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


def _by_id(vocabulary: dict[str, int], index: object) -> str | None:
    return next((token for token, number in vocabulary.items() if number == index), None)


def _write_modules(folder: Path, listed: list[Values], made: Path) -> None:
    """Mean pooling takes the place of the static module; what follows it stays."""
    pooling = made / _POOLING
    pooling.mkdir()
    width = read_json(made / "config.json")["hidden_size"]
    settings = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (pooling / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    modules = [("", f"{_LIBRARY}.Transformer"), (_POOLING, f"{_LIBRARY}.Pooling")]
    for values in listed[1:]:
        path = _inside(folder, values).relative_to(folder)
        modules.append((path.as_posix(), str(values.get("type"))))
        for file in (folder / path).rglob("*") if path.name else ():
            if file.is_file() and not leaves(file, folder):
                copy = made / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    if not listed and _normalizes(folder):
        modules.append(("plmcc_normalize", f"{_LIBRARY}.Normalize"))
    written = [
        {"idx": index, "name": str(index), "path": path, "type": kind}
        for index, (path, kind) in enumerate(modules)
    ]
    (made / MODULES).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for name in ("config_sentence_transformers.json", "README.md", "LICENSE"):
        if (folder / name).is_file() and not leaves(folder / name, folder):
            shutil.copy(folder / name, made / name)


def _normalizes(folder: Path) -> bool:
    values = _json(folder / "config.json")
    return isinstance(values, dict) and bool(values.get("normalize"))
