"""Training translation models: data, batches by tokens, smoothing, averages, sequence teachers."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import plmcc
from plmcc.data.collate import PadPairs
from plmcc.diagnostics import PlmccError
from plmcc.models.source import load_source
from plmcc.pipeline.run import run
from plmcc.recipe.load import Recipe, Sequences, parse_recipe
from plmcc.training import sequences as translation
from plmcc.training.schedule import Average, TokenBatches, points
from plmcc.training.sequences import with_teacher_targets

PAIRS = [
    ("ein hund läuft", "a dog runs"),
    ("eine katze schläft", "a cat sleeps"),
    ("der mann liest ein buch", "the man reads a book"),
    ("die frau singt", "the woman sings"),
    ("ein kind spielt im park", "a child plays in the park"),
    ("der hund schläft", "the dog sleeps"),
    ("die katze spielt", "the cat plays"),
    ("ein mann singt im park", "a man sings in the park"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pre-trained-looking Marian with a tokenizer of the words above."""
    folder = tmp_path_factory.mktemp("translator")
    words = sorted({word for pair in PAIRS for text in pair for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config = MarianConfig(
        vocab_size=len(vocabulary),
        d_model=32,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=1,
        decoder_start_token_id=0,
        dropout=0.0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MarianMTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """The pairs as line-aligned files, compressed as corpora are."""
    files = (tmp_path / "train.de.gz", tmp_path / "train.en.gz")
    for column, file in enumerate(files):
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.writelines(f"{pair[column]}\n" for pair in PAIRS)
    return files


def recipe(texts: tuple[Path, Path], train: str = "", distill: str = "", more: str = "") -> Recipe:
    text = f"""
plmcc: 1
task: translation
stages:
  - name: merge
    passes: [{{compressed_attention: {{warm_start_steps: 20}}}}]
    train:
      data: {{train: {texts[0]}, target: {texts[1]}, max_length: 24}}
      {distill}
      {train}
{more}
"""
    return parse_recipe(text, load_torch=True)


def test_a_merged_model_learns_pairs_by_heart_and_reloads(
    model_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    train = (
        "tokens_per_batch: 32\n      average_last: 2\n      arguments: {num_train_epochs: 150, "
        "learning_rate: 5.0e-3, label_smoothing_factor: 0.1, lr_scheduler_type: inverse_sqrt, "
        "warmup_steps: 20}"
    )
    figure = f"evaluate: [{{metric: bleu, data: {texts[0]}, target: {texts[1]}, num_beams: 2}}]"
    asked = recipe(texts, train, more=figure)
    result = plmcc.apply(asked, model_folder, tmp_path / "out")
    assert result.metrics[0]["before"] < 20
    assert result.metrics[0]["after"] > 90
    code = (
        "import sys, plmcc, transformers as t\n"
        "m = t.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "k = t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "x = k(['die katze spielt'], return_tensors='pt')\n"
        "ids = m.generate(x['input_ids'], attention_mask=x['attention_mask'], max_new_tokens=8)\n"
        "print(k.decode(ids[0], skip_special_tokens=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "the cat plays", done.stderr


def test_what_is_not_saved_is_not_trained(model_folder: Path, texts: tuple[Path, Path]) -> None:
    source = load_source(model_folder, "translation")
    positions = {n: p for n, p in source.model.named_parameters() if "embed_positions" in n}
    before = {name: value.detach().clone() for name, value in positions.items()}
    for value in positions.values():
        value.requires_grad_(True)  # as transformers 5.24 loads them
    plmcc.apply(recipe(texts, "arguments: {max_steps: 2, learning_rate: 0.1}"), source)
    assert len(before) == 2
    assert all(torch.equal(before[name], value) for name, value in positions.items())


def test_batches_by_tokens_hold_every_row_once_and_keep_the_bound() -> None:
    lengths = [3, 9, 4, 4, 7, 30, 2, 5, 8, 6, 4, 4]
    rows = Dataset.from_dict(
        {"input_ids": [[5] * n for n in lengths], "labels": [[5] * (n // 2 + 1) for n in lengths]}
    )
    sampler = TokenBatches(rows, 20, seed=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for batches in epochs:
        assert len(batches) == len(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert max(lengths[row] for row in batch) * len(batch) <= 20 or len(batch) == 1
    assert epochs[0] != epochs[1]
    assert list(TokenBatches(rows, 20, seed=1)) == epochs[0]


def test_label_smoothing_is_torchs_formula(model_folder: Path, texts: tuple[Path, Path]) -> None:
    losses = {}
    for smoothing in (0.0, 0.3):
        train = (
            "tokens_per_batch: 400\n      arguments: {max_steps: 1, logging_steps: 1, "
            f"learning_rate: 1.0e-9, label_smoothing_factor: {smoothing}}}"
        )
        source = load_source(model_folder)
        result = run(recipe(texts, train), source, lambda _: None)
        losses[smoothing] = result.training["merge"][0]["loss"]
        tokenizer = source.need_tokenizer("the test")
        ids = [tokenizer(pair[i])["input_ids"] for pair in PAIRS for i in (0, 1)]
        rows = [{"input_ids": a, "labels": b} for a, b in zip(ids[::2], ids[1::2], strict=True)]
        batch = PadPairs(0, 0)(rows)
        with torch.no_grad():
            logits = source.model(**batch).logits
        expected = F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=smoothing
        )
        assert losses[smoothing] == pytest.approx(float(expected), abs=2e-3)
    assert losses[0.0] != pytest.approx(losses[0.3], abs=1e-3)


def test_the_decoder_reads_the_start_token_and_the_target_without_its_end() -> None:
    batch = PadPairs(pad=0, start=7)(
        [{"input_ids": [4, 5, 1], "labels": [8, 9, 1]}, {"input_ids": [4, 1], "labels": [6, 1]}]
    )
    assert batch["decoder_input_ids"].tolist() == [[7, 8, 9], [7, 6, 0]]
    assert batch["labels"].tolist() == [[8, 9, 1], [6, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_an_average_is_the_mean_of_the_last_points() -> None:
    assert points(2, 40, 4) == [40, 30]
    assert points(3, 60, 1) == [60, 50, 40]
    assert points(0, 60, 1) == []
    average = Average(2)
    average.points = {1, 2}
    linear = nn.Linear(2, 2)
    seen = []
    for step in (1, 2, 3):
        nn.init.constant_(linear.weight, float(step))
        seen.append(linear.weight.detach().clone())
        state: Any = type("State", (), {"global_step": step})
        average.on_step_end(None, state, None, model=linear)  # type: ignore[arg-type]
    average.finish(linear)
    assert torch.equal(linear.weight, (seen[0] + seen[1]) / 2)


def test_a_teachers_translations_are_made_once_and_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: PreTrainedModel = MarianMTModel.from_pretrained(model_folder)
    rows = Dataset.from_dict({"input_ids": [[3, 4, 1], [5, 1]], "labels": [[3, 1], [4, 1]]})
    settings = Sequences(num_beams=2, max_new_tokens=6, cache=str(tmp_path / "kept"))
    first = with_teacher_targets(rows, teacher, settings)
    single = [
        teacher.generate(torch.tensor([ids]), num_beams=2, max_new_tokens=6)[0, 1:].tolist()  # type: ignore[operator]
        for ids in ([3, 4, 1], [5, 1])
    ]
    assert first["labels"][:] == [ids[: ids.index(1) + 1] if 1 in ids else ids for ids in single]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(translation, "generated", never)
    assert with_teacher_targets(rows, teacher, settings)["labels"][:] == first["labels"][:]
    assert [f.suffix for f in (tmp_path / "kept").iterdir()] == [".json"]  # nothing unfinished
    with pytest.raises(AssertionError, match="asked again"):  # another search, another key
        with_teacher_targets(rows, teacher, settings.model_copy(update={"num_beams": 3}))
    with torch.no_grad():
        next(teacher.parameters()).add_(1.0)
    with pytest.raises(AssertionError, match="asked again"):  # another teacher
        with_teacher_targets(rows, teacher, settings)


def test_a_teacher_with_much_to_translate_is_compiled_for_that_while(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.programs import Uncompiled

    made: list[Uncompiled] = []

    class Programs(Uncompiled):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__(model)
            made.append(self)

    teacher: PreTrainedModel = MarianMTModel.from_pretrained(model_folder)
    rows = Dataset.from_dict({"input_ids": [[3, 4, 1], [5, 1], [6, 7, 8, 1]]})
    search = Sequences(num_beams=2, max_new_tokens=6, cache=str(tmp_path / "eager"))
    eager = with_teacher_targets(rows, teacher, search)["labels"][:]
    assert not made
    monkeypatch.setattr(translation, "CompiledPrograms", Programs)
    monkeypatch.setattr(translation, "_MANY", 3)
    again = search.model_copy(update={"cache": str(tmp_path / "compiled")})
    assert with_teacher_targets(rows, teacher, again)["labels"][:] == eager
    assert made
    assert made[0].steps
    assert "generate" not in vars(teacher)


def test_words_and_sequences_of_a_teacher_are_learnt_without_targets(
    model_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    distill = (
        "distill: {logits: 1.0, temperature: 1.0, hidden_states: 1.0, "
        f"sequence: {{num_beams: 2, max_new_tokens: 8, cache: {tmp_path / 'kept'}}}}}"
    )
    train = "arguments: {num_train_epochs: 4, learning_rate: 3.0e-3, logging_steps: 1}"
    asked = recipe(texts, train, distill)
    data = asked.steps()[0].train
    assert data is not None
    result = run(asked, load_source(model_folder), lambda _: None)
    losses = [entry["loss"] for entry in result.training["merge"] if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("short", "not aligned"),
        ("pooled", "no pooled output"),
        ("no target", "no translations"),
        ("both", "cannot be combined with"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    change: str, words: str, model_folder: Path, texts: tuple[Path, Path]
) -> None:
    train, distill = "arguments: {max_steps: 1}", ""
    if change == "short":
        with gzip.open(texts[1], "wt", encoding="utf-8") as stream:
            stream.write("one line\n")
    if change == "pooled":
        distill = "distill: {pooled: 1.0}"
    if change == "both":
        train = "tokens_per_batch: 64\n      arguments: {per_device_train_batch_size: 4}"
    with pytest.raises(PlmccError, match=words):
        _run_changed(change, model_folder, texts, train, distill)


def _run_changed(
    change: str, model_folder: Path, texts: tuple[Path, Path], train: str, distill: str
) -> None:
    asked = recipe(texts, train, distill)
    if change == "no target":
        asked = parse_recipe(
            f"plmcc: 1\ntask: translation\npasses: [compressed_attention]\n"
            f"train: {{data: {{train: {texts[0]}}}, arguments: {{max_steps: 1}}}}\n",
            load_torch=True,
        )
    run(asked, load_source(model_folder), lambda _: None)
