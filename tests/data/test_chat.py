"""Conversations: what the assistant says is learned, in each form that a template has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from plmcc.data.chat import as_text
from plmcc.data.collate import collator
from plmcc.data.encoding import encode, packed
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError
from plmcc.recipe.sections import Distill
from plmcc.training.distillation import Distillation
from support.tiny_models import tiny

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
REWRITING = (  # what is not the last message is written in another way
    "{% for m in messages %}{% if loop.last %}<|last|> {% endif %}"
    "<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
)
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4 w5"},
    {"role": "user", "content": "w3 w4 w5"},
    {"role": "assistant", "content": "w6"},
]


@pytest.fixture
def tokenizer() -> Any:
    words = ["[PAD]", "<|user|>", "<|assistant|>", "<|end|>", "<|last|>", "[UNK]"]
    words += [f"w{i}" for i in range(60)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "eos_token": "<|end|>", "unk_token": "[UNK]"}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.chat_template = CHATML
    return made


def rows(folder: Path, *chats: list[dict[str, str]]) -> Any:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return load_rows(str(file))


def learned(tokenizer: Any, columns: Any) -> list[str]:
    return [
        " ".join(tokenizer.convert_ids_to_tokens([i for i in labels if i != -100]))
        for labels in columns["labels"]
    ]


def test_what_the_assistant_says_is_learned_with_its_end(tokenizer: Any, tmp_path: Path) -> None:
    found = as_text(rows(tmp_path, CHAT, CHAT[:2]), tokenizer)
    columns = encode(found, "text-generation", tokenizer, 100)
    said = ["w3 w4 w5 <|end|> w6 <|end|>", "w3 w4 w5 <|end|>"]
    assert learned(tokenizer, columns) == said
    for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_a_template_that_writes_earlier_messages_anew(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = REWRITING
    before = {"role": "user", "content": "w3 w4 w5"}  # what somebody else says is no answer
    columns = encode(
        as_text(rows(tmp_path, [before, *CHAT]), tokenizer), "text-generation", tokenizer, 100
    )
    assert learned(tokenizer, columns) == ["w3 w4 w5 <|end|> w6 <|end|>"]
    places = [i for i, label in enumerate(columns["labels"][0]) if label != -100]
    assert places[0] > 8


def test_batches_are_padded_with_their_labels(tokenizer: Any, tmp_path: Path) -> None:
    found = as_text(rows(tmp_path, CHAT, CHAT[:2]), tokenizer)
    columns = encode(found, "text-generation", tokenizer, 100)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = collator("text-generation", tokenizer)([dict(row) for row in columns])
        assert batch["labels"].shape == batch["input_ids"].shape
        real = batch["labels"] != -100
        assert torch.equal(batch["labels"][real], batch["input_ids"][real])
        assert not (real & (batch["attention_mask"] == 0)).any()


def test_packed_conversations_keep_their_labels(tokenizer: Any, tmp_path: Path) -> None:
    question = [{"role": "user", "content": " ".join(["w9"] * 30)}, CHAT[3]]
    found = as_text(rows(tmp_path, CHAT, question, CHAT), tokenizer)
    windows = packed(found, tokenizer, 8)
    assert set(map(len, windows["input_ids"])) == {8}
    assert all(any(i != -100 for i in labels) for labels in windows["labels"])
    assert len(windows) < 8  # those that are all question are left out
    assert " ".join(learned(tokenizer, windows)).startswith("w3 w4 w5 <|end|> w6")


def test_conversations_that_are_cut_before_an_answer(tokenizer: Any, tmp_path: Path) -> None:
    question = [{"role": "user", "content": " ".join(["w9"] * 30)}, CHAT[3]]
    found = as_text(rows(tmp_path, CHAT, question), tokenizer)
    assert len(encode(found, "text-generation", tokenizer, 16)) == 1
    with pytest.raises(PlmccError, match="no conversation has an answer"):
        encode(as_text(rows(tmp_path, question), tokenizer), "text-generation", tokenizer, 16)


def test_without_an_assistant_all_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    found = as_text(rows(tmp_path, [CHAT[0]]), tokenizer)
    assert not found.learned
    assert "labels" not in encode(found, "text-generation", tokenizer, 16).column_names


def test_a_sample_keeps_what_is_learned_beside_its_rows(tokenizer: Any, tmp_path: Path) -> None:
    found = as_text(rows(tmp_path, CHAT, CHAT[:2], CHAT, CHAT[:2]), tokenizer).spread(2)
    columns = encode(found, "text-generation", tokenizer, 100)
    assert learned(tokenizer, columns) == ["w3 w4 w5 <|end|> w6 <|end|>"] * 2


def test_distillation_follows_the_teacher_where_the_assistant_speaks(
    tokenizer: Any, tmp_path: Path
) -> None:
    model: Any = tiny("llama")
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.add_(torch.randn_like(teacher.lm_head.weight))
    found = as_text(rows(tmp_path, CHAT, CHAT[:2]), tokenizer)
    columns = encode(found, "text-generation", tokenizer, 100)
    batch = collator("text-generation", tokenizer)([dict(row) for row in columns])
    settings = Distill(logits=1.0, temperature=1.0, task=0.0)
    from plmcc.data.pooling import Pooling

    distill = Distillation(model, teacher, settings, Pooling(), "text-generation")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine, theirs = model(**inputs), teacher(**inputs)
        loss = distill.loss(batch, mine, theirs)
    divergence = torch.nn.functional.kl_div(
        mine.logits.log_softmax(-1),
        theirs.logits.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    judged = torch.zeros_like(divergence, dtype=torch.bool)
    judged[:, :-1] = batch["labels"][:, 1:] != -100
    for row, last in enumerate(batch["attention_mask"].sum(1).tolist()):
        judged[row, last - 1] = True  # what would follow is known to no one
    assert float(loss) == pytest.approx(float(divergence[judged].mean()), rel=1e-4)
