"""Adapters of peft on compressed models: as on the originals, by peft's own defaults."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from plmcc import Pipeline
from plmcc.passes.binary_embedding import BinaryEmbedding
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.passes.movement_pruning import MovementPruning
from support.tiny_models import tiny

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda **kind: LoraConfig(r=2, **kind),
    "ia3": IA3Config,
    "prompt": lambda **kind: PromptTuningConfig(num_virtual_tokens=3, **kind),
    "p-tuning": lambda **kind: PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, **kind
    ),
    "prefix": lambda **kind: PrefixTuningConfig(num_virtual_tokens=3, **kind),
}
PASSES: dict[str, Callable[[], Any]] = {
    "codes": lambda: CompositionalCodes(codebooks=4, codewords=8, rounds=0),
    "binary": lambda: BinaryEmbedding(bits=24, epochs=1, activation="none"),
    "pruned": lambda: MovementPruning(method="magnitude", density=0.5),
}


def compressed(name: str, chosen: str, folder: Path) -> Callable[[], PreTrainedModel]:
    """How to load a tiny model with a pass."""
    model = tiny(name)
    Pipeline([PASSES[chosen]()])(model)
    model.save_pretrained(folder)
    kind: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return lambda: kind.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(("name", "chosen"), [*product(("llama", "t5"), PASSES), ("gpt2", "codes")])
@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_is_trained_saved_and_loaded(
    config: str, name: str, chosen: str, tmp_path: Path
) -> None:
    load = compressed(name, chosen, tmp_path / "model")
    kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    torch.manual_seed(0)
    model = get_peft_model(load(), CONFIGS[config](task_type=kind))
    ids = torch.arange(5, 17).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
