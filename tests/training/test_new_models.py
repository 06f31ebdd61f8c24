"""New translation models from a recipe alone, and what training and figures of them promise."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, TrainerCallback

import plmcc
from plmcc.data.collate import collator
from plmcc.data.encoding import targets
from plmcc.data.pooling import Pooling
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.inference.batches import generated
from plmcc.models.new import new_source, train_tokenizer
from plmcc.models.source import Source
from plmcc.pipeline.datasets import check_end, with_teacher
from plmcc.recipe.load import Data, Distill, Recipe, Train, TrainTokenizer, parse_recipe
from plmcc.training import sequences as translation
from plmcc.training.distillation import Distillation, relative_error
from plmcc.training.loop import TrainingData, train
from plmcc.training.schedule import Average, TokenBatches, points
from support.tiny_models import EOS, VOCAB, tiny
from support.tokenizers import words

SHARED = Path(__file__).parents[3] / "shared"
PAIRS = [
    ("Ein Hund läuft.", "A dog runs."),
    ("Eine Katze schläft.", "A cat sleeps."),
    ("Der Mann liest ein Buch.", "The man reads a book."),
    ("Die Frau singt im Park.", "The woman sings in the park."),
    ("Ein Kind spielt im Garten.", "A child plays in the garden."),
    ("Der Hund schläft im Garten.", "The dog sleeps in the garden."),
    ("Die Katze spielt mit dem Kind.", "The cat plays with the child."),
    ("Zwei Männer singen zusammen.", "Two men sing together."),
]
CONFIG = (
    "{model_type: mbart, d_model: 32, encoder_layers: 1, decoder_layers: 1, dropout: 0.0, "
    "encoder_attention_heads: 4, decoder_attention_heads: 4, encoder_ffn_dim: 64, "
    "decoder_ffn_dim: 64, max_position_embeddings: 32, scale_embedding: true, "
    "activation_function: relu, init_std: 0.1}"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for column, name in enumerate(("train.de", "train.en")):
        lines = "".join(f"{pair[column]}\n" for pair in PAIRS)
        (tmp_path / name).write_text(lines, encoding="utf-8")
    return tmp_path


def scratch(
    config: str = CONFIG,
    tokenizer: str = "{train: [train.de, train.en], vocab_size: 90}",
    train: str = "{max_steps: 2}",
    more: str = "",
) -> str:
    return f"""
plmcc: 1
name: fresh
task: translation
model: {{config: {config}, tokenizer: {tokenizer}}}
train:
  data: {{train: train.de, target: train.en, max_length: 32}}
  tokens_per_batch: 256
  arguments: {train}
{more}
"""


def pairs(count: int = 6) -> Dataset:
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return [*torch.randint(5, VOCAB, (length,), generator=random).tolist(), EOS]

    sources, found = [ids(3 + i % 3) for i in range(count)], [ids(2 + i % 4) for i in range(count)]
    masks = [[1] * len(row) for row in sources]
    return Dataset.from_dict({"input_ids": sources, "attention_mask": masks, "labels": found})


def training_data(
    model: PreTrainedModel, rows: Dataset | None = None, **options: Any
) -> TrainingData:
    collate = collator("translation", words(), model.config)
    return TrainingData("translation", rows or pairs(), collate, **options)


def settings(arguments: dict[str, Any], **options: Any) -> Train:
    return Train(data=Data(train="synthetic"), arguments=arguments, **options)


def test_a_new_model_learns_its_sentences_and_needs_no_plmcc(texts: Path, tmp_path: Path) -> None:
    arguments = (
        "{max_steps: 150, learning_rate: 1.0e-2, lr_scheduler_type: inverse_sqrt, "
        "warmup_steps: 20, logging_steps: 1, label_smoothing_factor: 0.1}"
    )
    metrics = "".join(
        f"  - {{metric: {metric}, data: train.de, target: train.en}}\n"
        for metric in ("bleu", "chrf", "perplexity")
    )
    recipe = parse_recipe(scratch(train=arguments, more=f"evaluate:\n{metrics}"), load_torch=True)
    result = plmcc.apply(recipe, output=tmp_path / "out", base=texts)
    bleu, chrf, perplexity = result.metrics
    assert bleu["before"] is None
    assert bleu["after"] > 90
    assert chrf["after"] > 90
    assert 1 < perplexity["after"] < 3
    rates = {round(e["step"]): e["learning_rate"] for e in result.training["main"] if "loss" in e}
    # The schedule of Vaswani et al.: linear warm-up, then the inverse square root.
    assert rates[11] == pytest.approx(0.5e-2)
    assert rates[121] == pytest.approx(1e-2 * math.sqrt(20 / 120), rel=1e-3)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["metrics"][0]["before"] is None
    assert report["training"]["main"]
    lock = json.loads((tmp_path / "out/plmcc.lock.json").read_text())
    assert lock["base_model"]["files"] == {}
    assert "import plmcc" not in (tmp_path / "out/README.md").read_text()
    code = (
        "import sys; sys.modules['plmcc'] = None\n"
        "from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T\n"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "x = t(['Die Katze spielt mit dem Kind.'], return_tensors='pt')\n"
        "y = m.generate(**x, num_beams=2, max_new_tokens=30)\n"
        "print(t.decode(y[0], skip_special_tokens=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "The cat plays with the child.", done.stderr


@pytest.mark.exhaustive  # it compiles a program; tests/export has the same of a directory
def test_a_recipe_ends_with_an_export(texts: Path, tmp_path: Path) -> None:
    config = CONFIG.replace("}", ", attn_implementation: eager}")
    recipe = parse_recipe(scratch(config, more="lower: {to: [aoti]}\n"), load_torch=True)
    model = plmcc.apply(recipe, output=tmp_path / "out", base=texts).model
    assert model.config._attn_implementation == "eager"
    ids = torch.tensor([[7, 9, 8, EOS], [9, 10, 11, EOS]])
    settings: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 9}
    found = plmcc.Exported(tmp_path / "out/aoti").generate(ids, torch.ones_like(ids), **settings)
    generator: Any = model
    assert torch.equal(found, generator.generate(ids, **settings))


def test_what_writes_text_alone_goes_to_no_runtime() -> None:
    recipe = parse_recipe(
        "plmcc: 1\npasses: [{compositional_codes: {codebooks: 2, codewords: 4}}]\n"
        "lower: {to: [aoti]}\n",
        load_torch=True,
    )
    with pytest.raises(PlmccError, match="PLM401: GPT2LMHeadModel does not go to aoti"):
        plmcc.apply(recipe, tiny("gpt2"))


def test_the_recipe_of_a_new_model_reads_back(texts: Path) -> None:
    recipe = parse_recipe(scratch(), load_torch=True)
    assert parse_recipe(recipe.to_yaml(), load_torch=True) == recipe


def test_weights_are_drawn_by_the_seed(texts: Path) -> None:
    def table(seed: int) -> Tensor:
        torch.rand(3)
        recipe = parse_recipe(scratch() + f"seed: {seed}\n", load_torch=True)
        embeddings: Any = new_source(recipe, texts).model.get_input_embeddings()
        return embeddings.weight.detach().clone()  # type: ignore[no-any-return]

    assert torch.equal(table(1), table(1))
    assert not torch.equal(table(1), table(2))


def test_tokenizer_and_config_agree(texts: Path) -> None:
    source = new_source(parse_recipe(scratch(), load_torch=True), texts)
    tokenizer, config = source.need_tokenizer("the test"), source.model.config
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2]
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert config.forced_eos_token_id == 1
    assert config.vocab_size == len(tokenizer) <= 90
    assert tokenizer.model_max_length == 32
    ids = tokenizer("Der Hund singt.")["input_ids"]
    assert ids[-1] == 1
    assert 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Der Hund singt."


def test_every_text_comes_back_from_its_tokens(texts: Path) -> None:
    tokenizer = train_tokenizer(TrainTokenizer(train="train.*", vocab_size=120), texts)
    for text in [text for pair in PAIRS for text in pair]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_tokenizer_is_taken_from_a_folder(texts: Path) -> None:
    train_tokenizer(TrainTokenizer(train="train.*", vocab_size=100), texts).save_pretrained(
        texts / "pieces"
    )
    source = new_source(parse_recipe(scratch(tokenizer="pieces"), load_torch=True), texts)
    kept = AutoTokenizer.from_pretrained(texts / "pieces").get_vocab()
    assert source.need_tokenizer("the test").get_vocab() == kept


@pytest.mark.parametrize(
    ("change", "code", "message", "help_"),
    [
        ({"config": "{model_type: mbrat}"}, "PLM105", "no such architecture", "`mbart`"),
        ({"config": "{d_model: 32}"}, "PLM102", "`model_type`", "mbart"),
        ({"config": "{model_type: mbart, d_modle: 8}"}, "PLM101", "`d_modle`", "`d_model`"),
        ({"config": "{model_type: mbart, d_model: big}"}, "PLM107", "d_model", ""),
        ({"config": "{model_type: bert}"}, "PLM303", "no such model for translation", ""),
        ({"config": "{model_type: mbart, vocab_size: 5}"}, "PLM303", "more tokens", "vocab_size"),
        ({"tokenizer": "{train: train.de, vocab_size: 16}"}, "PLM303", "alphabet", "increase"),
        ({"tokenizer": "{train: train.fr}"}, "PLM301", "does not exist", "train."),
        ({"tokenizer": "./nowhere"}, "PLM401", "no such model directory", ""),
    ],
)
def test_a_wrong_model_is_refused_where_it_stands(
    change: dict[str, str], code: str, message: str, help_: str, texts: Path
) -> None:
    recipe = parse_recipe(scratch(**change), load_torch=True)
    with pytest.raises(PlmccError, match=message) as caught:
        new_source(recipe, texts)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert help_ in found.hint
    if code in ("PLM101", "PLM102", "PLM105", "PLM107"):
        assert str(found.location).startswith("<recipe>:5:")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("  distill: {logits: 1.0}\n", "is random: nothing can be learned"),
        ("evaluate: [{metric: fidelity, data: train.de}]\n", "which is random here"),
        ("evaluate: [{metric: accuracy, data: train.de, num_beams: 2}]\n", "no effect on accuracy"),
        ("  distill: {teacher: there, sequence: {}, task: 0.5}\n", "`task` has no effect"),
    ],
)
def test_a_recipe_that_cannot_mean_it_is_refused(more: str, message: str) -> None:
    with pytest.raises(PlmccError, match=message):
        parse_recipe(scratch(more=more), load_torch=True)


def test_a_new_model_learns_from_a_teacher_in_a_folder(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = parse_recipe(scratch(train="{max_steps: 60, learning_rate: 1.0e-2}"), load_torch=True)
    plmcc.apply(teacher, output=tmp_path / "teacher", base=texts)
    distill = (
        f"  distill: {{teacher: {tmp_path / 'teacher'}, logits: 1.0, hidden_states: 1.0, "
        f"sequence: {{num_beams: 2, max_new_tokens: 24, cache: {tmp_path / 'kept'}}}}}\n"
    )
    student = scratch(
        tokenizer=str(tmp_path / "teacher"),
        more=distill,
        train="{max_steps: 20, learning_rate: 5.0e-3, logging_steps: 1, bf16: true}",
    )
    result = plmcc.apply(
        parse_recipe(student, load_torch=True), output=tmp_path / "one", base=texts
    )
    losses = [entry["loss"] for entry in result.training["main"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert next(result.model.parameters()).dtype == torch.float32

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(translation, "generated", never)
    again = plmcc.apply(parse_recipe(student, load_torch=True), output=tmp_path / "two", base=texts)
    first, second = (r.model.state_dict() for r in (result, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_that_breaks_off_leaves_no_half_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny("marian")
    asked = plmcc.recipe.load.Sequences(num_beams=1, max_new_tokens=4, cache=str(tmp_path / "kept"))

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(translation, "generated", stops)
        with pytest.raises(KeyboardInterrupt):
            translation.with_teacher_targets(pairs(), teacher, asked)
    assert list((tmp_path / "kept").iterdir()) == []
    (tmp_path / "file").write_text("")
    unwritable = asked.model_copy(update={"cache": str(tmp_path / "file" / "kept")})
    with pytest.raises(PlmccError, match="cannot be cached"):
        translation.with_teacher_targets(pairs(), teacher, unwritable)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_decoder_inputs_are_the_models_own(name: str) -> None:
    model: Any = tiny(name)
    model.config.decoder_start_token_id = {"bart": EOS}.get(name, 0)
    batch = collator("translation", words(), model.config)(list(pairs()))
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert torch.allclose(model(**batch).loss, own.loss, atol=1e-6)


def test_word_level_distillation_is_the_divergence_at_real_targets() -> None:
    model, teacher = tiny("mbart"), tiny("mbart")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = training_data(model).collate(list(pairs(4)))
    distill = Distill(logits=2.0, temperature=3.0)
    found = Distillation(model, teacher, distill, Pooling(), "translation")
    output, theirs = model(**batch), found.teacher_forward(batch)
    terms = []
    for row, label in zip(*torch.nonzero(batch["labels"] != -100, as_tuple=True), strict=True):
        p, q = (F.softmax(o.logits[row, label] / 3.0, -1) for o in (theirs, output))
        terms.append((p * (p.log() - q.log())).sum())
    expected = 2.0 * torch.stack(terms).mean() * 9.0
    assert torch.allclose(found.loss(batch, output, theirs), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["marian", "t5"])
def test_hidden_states_of_decoder_and_encoder_follow_the_teachers(name: str) -> None:
    teacher = tiny(name)
    model = copy.deepcopy(teacher)
    decoder: Any = model.get_decoder()
    if name == "t5":
        decoder.block, model.config.num_decoder_layers = decoder.block[:1], 1
    else:
        decoder.layers, model.config.decoder_layers = decoder.layers[1:], 1
    found = Distillation(model, teacher, Distill(hidden_states=1.0), Pooling(), "translation")
    assert found.layers == {0: 0, 1: 2}
    assert found.encoder_layers == {0: 0, 1: 1, 2: 2}
    batch = training_data(model).collate(list(pairs()))
    output, theirs = model(**batch, output_hidden_states=True), found.teacher_forward(batch)
    real = (batch["labels"] != -100).long()
    last = relative_error(output.decoder_hidden_states[1], theirs.decoder_hidden_states[2], real)
    # The encoders are equal, and so are the embeddings: one of five terms is not zero.
    assert torch.allclose(found.loss(batch, output, theirs), last / 5, rtol=1e-4)
    assert last > 0


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "text-generation"])
def test_label_smoothing_works_for_every_task_with_classes(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[str, Callable[[], PreTrainedModel]] = {
        "fill-mask": lambda: tiny("bert"),
        "text-generation": lambda: tiny("llama"),
        "text-classification": _classifier,
    }
    rows = Dataset.from_dict({"input_ids": [[1, 7, 8, 2]] * 4, "attention_mask": [[1] * 4] * 4})
    if task == "text-classification":
        rows = rows.add_column("labels", [0, 1, 0, 1])
    seen: list[Tensor] = []
    real = F.cross_entropy

    def smoothing(*inputs: Any, **options: Any) -> Tensor:
        if options.get("label_smoothing"):
            seen.append(inputs[1])
        return real(*inputs, **options)

    monkeypatch.setattr(F, "cross_entropy", smoothing)
    arguments = {"max_steps": 1, "label_smoothing_factor": 0.2, "logging_steps": 1}
    given = TrainingData(task, rows, collator(task, words()))
    log = train(kinds[task](), settings(arguments), given, [])
    assert math.isfinite(log[0]["loss"])
    assert len(seen) == 1
    assert len(seen[0]) == {"text-classification": 4, "text-generation": 12}.get(task, 16)


def _classifier() -> PreTrainedModel:
    config: Any = copy.deepcopy(tiny("bert").config)
    config.num_labels = 2
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(config)


def test_labels_that_are_no_classes_are_not_smoothed() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "other_ids": [[1, 2]], "labels": [0.5]})
    given = TrainingData("sentence-similarity", rows, collator("sentence-similarity", words()))
    with pytest.raises(PlmccError, match="could be smoothed"):
        train(tiny("bert"), settings({"label_smoothing_factor": 0.1}), given, [])


class _Snapshots(TrainerCallback):
    """Keeps the table after every step."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        table = rest["model"].get_input_embeddings().weight
        self.seen[state.global_step] = table.detach().clone()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_train_epochs": 4}, [8, 6, 4]),  # two batches an epoch: the last three epochs
        ({"max_steps": 12}, [12, 10, 8]),  # the last half, in steps of 12 / 6
        ({"num_train_epochs": 2}, [4, 3]),  # too few for three points
    ],
)
def test_the_result_is_the_mean_of_its_snapshots(
    arguments: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots, model = _Snapshots(), tiny("marian")
    begins = Average.on_train_begin

    def also(self: Average, args: Any, state: Any, control: Any, **rest: Any) -> None:
        begins(self, args, state, control, **rest)
        rest_of_callbacks.append(sorted(self.points, reverse=True))

    rest_of_callbacks: list[list[int]] = []
    monkeypatch.setattr(Average, "on_train_begin", also)
    ends = Average.on_step_end

    def looks(self: Average, args: Any, state: Any, control: Any, **rest: Any) -> None:
        ends(self, args, state, control, **rest)
        snapshots.on_step_end(args, state, control, **rest)

    monkeypatch.setattr(Average, "on_step_end", looks)
    given = {"per_device_train_batch_size": 3, "learning_rate": 1e-2} | arguments
    train(model, settings(given, average_last=3), training_data(model), [])
    assert rest_of_callbacks == [expected]
    mean = torch.stack([snapshots.seen[step] for step in expected]).mean(0)
    table: Any = model.get_input_embeddings()
    assert torch.allclose(table.weight, mean, atol=1e-7)
    assert not torch.allclose(table.weight, snapshots.seen[max(expected)], atol=1e-4)


def test_points_of_an_average_are_ends_of_epochs_or_spaced() -> None:
    assert points(3, 50, 5.0) == [50, 40, 30]
    assert points(5, 100, 0.0) == [100, 90, 80, 70, 60]
    assert points(2, 25, 2.5) == [25, 19]
    assert points(5, 2, 0.0) == [2, 1]


def test_batches_by_tokens_serve_every_task() -> None:
    texts = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 5, 4)], "labels": [0, 1, 0]})
    assert sorted(row for batch in TokenBatches(texts, 10, 0) for row in batch) == [0, 1, 2]
    compared = texts.add_column("other_ids", [[1] * n for n in (6, 2, 2)])
    for batch in TokenBatches(compared, 24, 0):
        longest = max(
            max(len(compared[i]["input_ids"]), len(compared[i]["other_ids"])) for i in batch
        )
        assert 2 * longest * len(batch) <= 24


def test_the_trainer_sees_every_row_once_an_epoch_and_never_more_tokens() -> None:
    model = tiny("marian")
    rows = pairs(23)
    seen: list[tuple[int, ...]] = []
    given = training_data(model, rows)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        made = given.collate(batch)
        assert max(made["input_ids"].numel(), made["labels"].numel()) <= 24
        seen.extend(tuple(row["input_ids"]) for row in batch)
        return made

    arguments = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    with_bound = settings(arguments, tokens_per_batch=24)
    train(model, with_bound, TrainingData("translation", rows, collate), [])
    assert sorted(seen) == sorted(2 * [tuple(row) for row in rows["input_ids"]])


def test_targets_end_and_keep_their_end_when_cut() -> None:
    assert all(
        ids[-1] == EOS and len(ids) <= 4 for ids in targets(["w1", "w1 w2 w3 w4 w5 w6"], words(), 4)
    )
    bare = words()
    bare.backend_tokenizer.post_processor = None
    assert targets(["w1 w2", "w1 w2 w3 w4 w5"], bare, 4) == [[6, 7, EOS], [6, 7, 8, EOS]]


def test_tokenizers_that_do_not_end_sentences_are_refused() -> None:
    source = replace(Source.of(tiny("marian")), tokenizer=words())
    check_end(source)
    source.need_tokenizer("the test").eos_token = None
    with pytest.raises(PlmccError, match="no translation would end"):
        check_end(source)
    source.need_tokenizer("the test").eos_token = "[CLS]"
    with pytest.raises(PlmccError, match="different tokens"):
        check_end(source)


def test_a_teachers_translations_are_as_long_as_the_student_can_write(tmp_path: Path) -> None:
    model = tiny("bart")  # 48 positions
    rows = training_data(model, pairs(2))

    def taught(**options: Any) -> TrainingData:
        sequence = {"num_beams": 1, "cache": str(tmp_path), **options}
        distill = Distill.model_validate({"sequence": sequence})
        return with_teacher(rows, settings({}, distill=distill), model, Source.of(model))

    assert max(map(len, taught().train["labels"])) <= 48
    with pytest.raises(PlmccError, match="allowed: at most 48"):
        taught(max_new_tokens=49)


def test_more_length_than_the_model_reads_is_said(texts: Path) -> None:
    said: list[str] = []
    recipe = parse_recipe(scratch().replace("max_length: 32", "max_length: 64"), load_torch=True)
    plmcc.apply(recipe, base=texts, log=said.append)
    assert any("`max_length: 64` is more than the model reads" in line for line in said)


def test_speech_models_are_not_trained(texts: Path) -> None:
    recipe = Recipe(train=Train(data=Data(train=str(texts / "train.de"))))
    source = Source.of(tiny("whisper"))
    assert source.task == "translation"
    with pytest.raises(PlmccError, match="do not read text") as caught:
        plmcc.apply(recipe, source)
    assert caught.value.diagnostics[0].code == "PLM303"


@pytest.mark.parametrize("names", [("source", "target"), ("src", "tgt"), ("de", "en")])
def test_columns_of_pairs(names: tuple[str, str], tmp_path: Path) -> None:
    rows = [dict(zip(names, pair, strict=True)) for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(str(tmp_path / "pairs.jsonl"), None if "de" not in names else names)
    assert (found.texts(0)[0], found.texts(1)[0]) == PAIRS[0]


def test_lines_that_are_empty_on_one_side_leave_the_rest_aligned(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("eins\n\ndrei\nvier\n")
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n\n")
    rows = load_rows(str(tmp_path / "a.de"), target=str(tmp_path / "a.en"))
    assert (rows.texts(0), rows.texts(1), rows.skipped) == (["eins", "drei"], ["one", "three"], 2)
    (tmp_path / "a.en").write_text("one\n")
    with pytest.raises(PlmccError, match="not aligned") as caught:
        load_rows(str(tmp_path / "a.de"), target=str(tmp_path / "a.en"))
    (found,) = caught.value.diagnostics
    assert found.code == "PLM301"
    assert "4 rows" in found.got
    assert "1 in" in found.got


def metrics(model: PreTrainedModel, original: PreTrainedModel, folder: Path) -> Evaluator:
    (folder / "s.de").write_text("w1 w2 w3\nw4\nw5 w6\n")
    (folder / "s.en").write_text("w7 w8\nw9 w10 w11\nw12\n")
    return Evaluator(model, words(), Pooling(), original, 40, num_beams=1, max_new_tokens=10)


def test_figures_with_references_are_those_of_the_rows_one_by_one(tmp_path: Path) -> None:
    model, other = tiny("marian"), tiny("marian")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    evaluator = metrics(other, model, tmp_path)
    rows = load_rows(str(tmp_path / "s.de"), target=str(tmp_path / "s.en"))
    losses, same = [], []
    for source, target in zip(rows.texts(0), rows.texts(1), strict=True):
        given, labels = (
            words()(text, return_tensors="pt")["input_ids"] for text in (source, target)
        )
        start = torch.cat([torch.zeros(1, 1, dtype=torch.long), labels[:, :-1]], 1)
        logits = [m(input_ids=given, decoder_input_ids=start).logits[0] for m in (other, model)]
        losses.append(F.cross_entropy(logits[0], labels[0], reduction="none").detach())
        same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
    perplexity = float(torch.cat(losses).mean().exp())
    assert evaluator.compute("perplexity", rows) == pytest.approx(perplexity, rel=1e-4)
    share = 100 * float(torch.cat(same).float().mean())
    assert evaluator.compute("fidelity", rows) == pytest.approx(share)
    assert 0 < share < 100
    assert metrics(model, model, tmp_path).compute("fidelity", rows) == 100


@pytest.mark.parametrize("metric", ["bleu", "chrf", "perplexity", "fidelity"])
def test_figures_without_references_are_refused(metric: str, tmp_path: Path) -> None:
    evaluator = metrics(tiny("marian"), tiny("marian"), tmp_path)
    with pytest.raises(PlmccError, match=r"references|reference translations"):
        evaluator.compute(metric, load_rows(str(tmp_path / "s.de")))


def test_without_sacrebleu_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = metrics(tiny("marian"), tiny("marian"), tmp_path)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    rows = load_rows(str(tmp_path / "s.de"), target=str(tmp_path / "s.en"))
    with pytest.raises(PlmccError, match="needs sacrebleu") as caught:
        evaluator.compute("bleu", rows)
    assert "`eval`" in caught.value.diagnostics[0].hint


@pytest.mark.parametrize("beams", [1, 3])
def test_translations_of_batches_are_those_of_single_sentences(beams: int) -> None:
    model: Any = tiny("mbart")
    sources: list[list[int]] = pairs(7)["input_ids"][:]
    found = generated(model, sources, beams, 200)  # longer than the model has positions
    for ids, source in zip(found, sources, strict=True):
        alone = model.generate(torch.tensor([source]), num_beams=beams, max_new_tokens=47)
        assert ids == alone[0, 1:].tolist()[: len(ids)]
        assert EOS not in ids[:-1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no ../shared beside the project")
def test_the_trained_model_translates_as_well_as_is_known() -> None:
    source = plmcc.models.source.load_source(SHARED / "models/multi30k-de-en")
    assert source.task == "translation"
    files = [str(SHARED / f"data/multi30k/test_2016_flickr.{end}.gz") for end in ("de", "en")]
    rows = load_rows(files[0], target=files[1], limit=24)
    tokenizer = source.need_tokenizer("the test")
    source.model.float()
    evaluator = Evaluator(source.model, tokenizer, source.pooling, None, 128, 2, 60)
    assert 20 < evaluator.compute("bleu", rows) < 50
    assert type(AutoModelForSeq2SeqLM.from_pretrained(source.name)) is type(source.model)
