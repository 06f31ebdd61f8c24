"""The proof that what is beside the weights came along: tokenizer, sentence-transformers modules,
generation settings and processor.

`text_probes.json` in an artifact holds texts, the ids that the tokenizer in memory gave them, and
the vectors that the model in memory gave them. `check` loads the artifact with the public classes
of transformers and sentence-transformers and compares.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from plmcc.data.pooling import MODULES
from plmcc.diagnostics import PlmccError, error
from plmcc.utils.files import read_json
from plmcc.utils.numerics import relative_difference
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

FILE = "text_probes.json"
TEXTS = (
    "The committee will vote on the budget tomorrow, at 10:30 a.m.",
    "Zwei Männer in grünen Jacken überqueren die Straße; c'est déjà l'été.",
    "  Two  spaces,\ta tab and UPPER CASE.",
    "数据压缩 🙂 данные",
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_CROSS_ENCODER = "CrossEncoder"

Embed = Callable[[list[str]], Tensor]
"""Vectors (N, D) of texts; of a cross-encoder, logits of pairs of neighbors."""


def record(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    embed: Embed | None = None,
    original: Path | None = None,
) -> None:
    """Write what tokenizer and model in memory make of some texts into an artifact.

    Args:
        folder: the artifact.
        tokenizer: of the model; None writes nothing.
        embed: for a model of sentence-transformers, its vectors of texts.
        original: the directory of the original, whose processor may need what is not installed.
    """
    if tokenizer is None:
        return
    texts = _readable(tokenizer)
    values: Values = {"texts": texts, "ids": _ids(tokenizer, texts)}
    values["processor"] = original is not None and _has_processor(original)
    if embed is not None:
        values["vectors"] = embed(texts).tolist()
    (folder / FILE).write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def is_cross_encoder(folder: Path) -> bool:
    """Say whether a model directory is a CrossEncoder of sentence-transformers."""
    for name in ("config_sentence_transformers.json", "config.json"):
        file = folder / name
        values = read_json(file) if file.is_file() else {}
        if values.get("model_type") == _CROSS_ENCODER:
            return True
        if name == "config.json" and "activation_fn" in (values.get("sentence_transformers") or {}):
            return True
    return False


def check(folder: Path, bound: float = 1e-4) -> list[str]:
    """Load what is beside the weights of an artifact and compare it with what is recorded.

    Args:
        folder: the artifact.
        bound: largest difference of vectors, relative to their scale.

    Returns:
        What was compared, in words.

    Raises:
        PlmccError: something cannot be loaded, or gives other ids or vectors.
    """
    if not (folder / FILE).is_file():
        return []
    texts, ids, expected_ND, processor = _stored(folder / FILE)
    tokenizer = _loaded(AutoTokenizer, folder, "the tokenizer")
    done = ["token ids"]
    for text, mine, expected in zip(texts, _ids(tokenizer, texts), ids, strict=True):
        if mine != expected:
            message = f"the tokenizer of the artifact gives other ids to {text!r}"
            given, allowed = str(mine[:8]), str(expected[:8])
            raise error("PLM402", message, str(folder), got=given, allowed=allowed)
    if processor:
        _loaded(AutoProcessor, folder, "the processor")
        done.append("processor")
    if (folder / "generation_config.json").is_file():
        _loaded(GenerationConfig, folder, "generation_config.json")
    if expected_ND is not None and find_spec("sentence_transformers") is not None:
        difference = relative_difference(_vectors(folder, texts), expected_ND)
        if not difference <= bound:
            message = "sentence-transformers gives other vectors than the model in memory"
            given = f"a difference of {difference:.3g} of their scale"
            raise error("PLM402", message, str(folder), got=given, allowed=f"at most {bound:g}")
        done.append("sentence vectors")
    return done


def _stored(file: Path) -> tuple[list[str], list[list[int]], Tensor | None, bool]:
    """Texts, their ids and vectors, and whether there is a processor.

    Raises:
        PlmccError: the file holds something else.
    """
    try:
        values = read_json(file)
        texts, ids = [str(text) for text in values["texts"]], list(values["ids"])
        vectors = torch.tensor(values["vectors"]) if "vectors" in values else None
        if len(texts) != len(ids):
            raise ValueError(f"{len(texts)} texts, {len(ids)} lists of ids")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        message = f"the recorded texts cannot be read: {first_line(problem)}"
        raise error("PLM402", message, str(file)) from None
    return texts, ids, vectors, bool(values.get("processor"))


def _readable(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that a tokenizer can read: one without an unknown token knows its own words only."""
    found = []
    for text in (*TEXTS, *sorted(tokenizer.get_vocab())[:8]):
        try:
            _ids(tokenizer, [text])
        except Exception:  # the tokenizers library raises bare exceptions
            continue
        found.append(text)
    return found


def _has_processor(folder: Path) -> bool:
    """Whether a directory has a processor that can be loaded here."""
    if not any((folder / name).is_file() for name in _PROCESSORS):
        return False
    try:
        _loaded(AutoProcessor, folder, "the processor")
    except PlmccError:
        return False
    return True


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [list(map(int, tokenizer(text, verbose=False)["input_ids"])) for text in texts]


def _loaded(kind: Any, folder: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(folder)
    except Exception as problem:  # whatever the libraries raise for files that do not fit
        message = f"{what} of the artifact cannot be loaded: {first_line(problem)}"
        raise error("PLM402", message, str(folder)) from None


def _vectors(folder: Path, texts: list[str]) -> Tensor:
    """The vectors of texts as a user of sentence-transformers gets them."""
    import sentence_transformers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (folder / MODULES).is_file() and not is_cross_encoder(folder):
                encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
                found = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
            else:
                judge = sentence_transformers.CrossEncoder(str(folder), device="cpu")
                pairs = list(pairwise(texts))
                found = judge.predict(
                    pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True
                )
    except PlmccError:
        raise
    except Exception as problem:  # whatever that library makes of a folder
        message = f"sentence-transformers cannot load the artifact: {first_line(problem)}"
        raise error("PLM402", message, str(folder)) from None
    vectors: Tensor = found.float().cpu()
    return vectors
