"""Ordinary checkpoints go through CTranslate2's own converter."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plmcc
from plmcc.models.source import load_source
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

ctranslate2 = pytest.importorskip("ctranslate2")
LAYERS = "passes: [{drop_layers: {keep: 1, targets: decoder, select: even}}]"


def applied(kind: str, passes: str, folder: Path) -> Path:
    tiny(kind).save_pretrained(folder / "model")
    tokenizer: Any = words()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(30)))
    text = passes.replace("TEXT", str(folder / "text.txt"))
    recipe = parse_recipe(f"plmcc: 1\n{text}\n", load_torch=True)
    plmcc.apply(recipe, folder / "model", folder / "out")
    return folder / "out"


def converted(folder: Path) -> str:
    converters = importlib.import_module("ctranslate2.converters")
    target = str(folder.with_name("ct2"))
    converters.TransformersConverter(str(folder)).convert(target)
    return target


@pytest.mark.parametrize("passes", [LAYERS, "passes: [{prune_vocabulary: {text: TEXT}}]"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_computes_the_same(kind: str, passes: str, tmp_path: Path) -> None:
    out = applied(kind, passes, tmp_path)
    source = load_source(out)
    tokenizer: Any = source.need_tokenizer("this")
    ids = tokenizer("w1 w2 w3 w4", add_special_tokens=False)["input_ids"]
    generator = ctranslate2.Generator(converted(out))
    found = generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)])
    with torch.no_grad():
        expected = source.model(torch.tensor([ids])).logits
    mine = np.array(found.to_device(ctranslate2.Device.cpu))
    assert np.abs(mine[..., : expected.shape[-1]] - expected.numpy()).max() < 1e-4


def test_a_translation_model_gives_the_same_scores(tmp_path: Path) -> None:
    out = applied("t5", LAYERS, tmp_path)
    source = load_source(out)
    tokenizer: Any = source.need_tokenizer("this")
    text, target = "w1 w2 w3", "w5 w6"
    ids, wanted = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, target))
    pieces = [tokenizer.convert_ids_to_tokens(part) for part in (ids, wanted)]
    [score] = ctranslate2.Translator(converted(out)).score_batch([pieces[0]], [pieces[1]])
    start = source.model.config.decoder_start_token_id
    with torch.no_grad():
        logits = source.model(
            torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *wanted]])
        ).logits[0]
    expected = logits.log_softmax(-1)[range(len(wanted)), wanted]
    assert np.allclose(score.log_probs[: len(wanted)], expected, atol=1e-4)
