"""Heads that people have: one class, several labels at once, a number; of texts and of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.data.classification import label_sets, new_head, targets_of
from plmcc.data.pooling import Pooling
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.recipe.load import Distill
from plmcc.training.distillation import Distillation
from support.tokenizers import words

NAMES = ("sports", "business", "art")
MULTI = "multi_label_classification"


def config(**options: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {
        "initializer_range": 0.2,
        "intermediate_size": 64,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    }
    return transformers.BertConfig(**sizes, **options)


def named(names: tuple[str, ...] = NAMES, **options: Any) -> Any:
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return config(**labels, **options)


def model_of(made: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.BertForSequenceClassification(made)
    model.train(False)
    return model


def text_of(index: int) -> str:
    """A row of class index % 3: its first word says which."""
    return f"w{index % 3} w{10 + index % 7} w{20 + index % 5}"


FORMS: dict[str, Any] = {
    "names": lambda one, two: {"label": [NAMES[one], NAMES[two]]},
    "ids": lambda one, two: {"label": [one, two]},
    "indicators": lambda one, two: {"label": [int(i in (one, two)) for i in range(3)]},
    "text": lambda one, two: {"label": f"{NAMES[one]}|{NAMES[two]}"},
    "commas": lambda one, two: {"label": f"{NAMES[two]}, {NAMES[one]}"},
    "a list in a text": lambda one, two: {"label": f"['{NAMES[one]}', '{NAMES[two]}']"},
    "columns": lambda one, two: {n: int(i in (one, two)) for i, n in enumerate(NAMES)},
}


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("form", FORMS)
def test_several_labels_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    pairs = [(0, 1), (1, 2), (0, 0), (2, 0)]
    file = written(tmp_path, [{"text": "w1", **FORMS[form](*pair)} for pair in pairs])
    label = list(NAMES) if form == "columns" else None
    found = label_sets(load_rows(file, label=label), named(problem_type=MULTI))
    assert found == [[int(i in pair) for i in range(3)] for pair in pairs]


def test_a_row_may_have_no_label_at_all(tmp_path: Path) -> None:
    labels: list[Any] = [[], None, [1]]
    rows = [{"text": "w1", "label": label} for label in labels]
    found = label_sets(load_rows(written(tmp_path, rows)), named(problem_type=MULTI))
    assert found == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("label", "head", "message", "hint"),
    [
        (["sport"], named(problem_type=MULTI), "no label like that of line 2", "`sports`"),
        ([0, 3], named(problem_type=MULTI), "no label like that of line 2", ""),
        (["sports"], named(), "the model's head predicts one class", "problem_type"),
        ("good", config(num_labels=1), "the label of line 2 is not a number", ""),
        (1.5, config(num_labels=2, problem_type="regression"), "several numbers", ""),
    ],
)
def test_labels_that_do_not_fit_the_head(
    label: Any, head: Any, message: str, hint: str, tmp_path: Path
) -> None:
    fitting: Any = [] if isinstance(label, list) else 0.5
    rows = [{"text": "w1", "label": fitting}, {"text": "w2", "label": label}]
    if isinstance(label, str):
        rows[0]["label"] = "0.5"
    with pytest.raises(PlmccError, match=message) as caught:
        targets_of(load_rows(written(tmp_path, rows)), head)
    assert hint in caught.value.diagnostics[0].hint


def test_columns_of_labels_hold_0_and_1(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,sports,art\nw1,1,0\nw2,yes,1\n")
    with pytest.raises(PlmccError, match="does not hold 0 or 1 in line 3") as caught:
        load_rows(str(tmp_path / "rows.csv"), label=["sports", "art"])
    assert caught.value.diagnostics[0].allowed == "0 or 1"


@pytest.mark.parametrize(
    ("labels", "number", "expected"),
    [
        (["b", "a"], False, {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}),
        ([0, 4], False, {"num_labels": 5}),
        ([0.0, 2.0], False, {"num_labels": 3}),
        ([0.5, 1.0], False, {"num_labels": 1, "problem_type": "regression"}),
        ([1, 5], True, {"num_labels": 1, "problem_type": "regression"}),
        ([[1, 0, 0], [0, 1, 1]], False, {"num_labels": 3, "problem_type": MULTI}),
        ([[2], [0, 3]], False, {"num_labels": 4, "problem_type": MULTI}),
    ],
)
def test_a_new_head_is_what_the_labels_are(
    labels: list[Any], number: bool, expected: dict[str, Any], tmp_path: Path
) -> None:
    rows = load_rows(written(tmp_path, [{"text": "w1", "label": label} for label in labels]))
    assert new_head(rows, None, number) == expected


def test_metrics_are_those_of_an_independent_judge(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text_a": text_of(i), "text_b": text_of(2 * i), "label": i % 3} for i in range(40)
    ]
    model, original = model_of(named(problem_type=MULTI), 1), model_of(named(problem_type=MULTI), 2)
    with torch.no_grad():
        for one in (model, original):
            one.get_parameter("classifier.weight").mul_(20)  # decisions of both kinds
    sets = [{**row, "label": [row["label"], 0]} for row in rows]
    loaded = load_rows(written(tmp_path, sets))
    evaluator = Evaluator(model, words(), Pooling(), original, 40)
    given = words()([r["text_a"] for r in rows], [r["text_b"] for r in rows], padding=True)
    batch = {name: torch.tensor(value) for name, value in given.items()}
    with torch.no_grad():
        mine, theirs = (one(**batch).logits for one in (model, original))
    truths = [[int(j in (i % 3, 0)) for j in range(3)] for i in range(40)]
    decided = (torch.sigmoid(mine) > 0.5).int().tolist()
    for metric, average in (("f1", "micro"), ("f1_micro", "micro"), ("f1_macro", "macro")):
        expected = 100 * metrics.f1_score(truths, decided, average=average, zero_division=0.0)
        assert evaluator.compute(metric, loaded) == pytest.approx(expected)
    assert 0 < expected < 100
    assert evaluator.compute("accuracy", loaded) == pytest.approx(
        100 * metrics.accuracy_score(truths, decided)
    )
    same = ((mine > 0) == (theirs > 0)).float().mean()
    assert evaluator.compute("fidelity", loaded) == pytest.approx(100 * float(same))
    p, q = torch.sigmoid(theirs).double(), torch.sigmoid(mine).double()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert evaluator.compute("kl_divergence", loaded) == pytest.approx(
        float(each.sum(-1).mean()), rel=1e-4
    )

    number, other = model_of(config(num_labels=1), 1), model_of(config(num_labels=1), 2)
    loaded = load_rows(written(tmp_path, [{**row, "label": row["label"] / 2} for row in rows]))
    evaluator = Evaluator(number, words(), Pooling(), other, 40)
    with torch.no_grad():
        found, wanted = (one(**batch).logits[:, 0].numpy() for one in (number, other))
    labels = [row["label"] / 2 for row in rows]
    expected = metrics.mean_squared_error(labels, found)
    assert evaluator.compute("mse", loaded) == pytest.approx(expected)
    assert evaluator.compute("spearman", loaded) == pytest.approx(
        100 * stats.spearmanr(found, labels)[0]
    )
    expected = max(0.0, metrics.r2_score(wanted, found))
    assert evaluator.compute("fidelity", loaded) == pytest.approx(100 * expected)
    for metric in ("accuracy", "kl_divergence", "f1"):
        with pytest.raises(PlmccError, match="not a metric of a head that predicts a number"):
            evaluator.compute(metric, loaded)


@pytest.mark.parametrize("options", [{"problem_type": MULTI}, {}], ids=["labels", "number"])
def test_a_head_follows_a_teacher_of_its_kind(options: dict[str, Any]) -> None:
    made = named(**options) if options else config(num_labels=1)
    student, teacher = model_of(made, 1), model_of(made, 2)
    ids = torch.arange(5, 17).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chosen = Distill(logits=1.0, temperature=2.0)
    distill = Distillation(student, teacher, chosen, Pooling(), "text-classification")
    with torch.no_grad():
        student.get_parameter("classifier.weight").mul_(20)
        outputs = [one(**batch) for one in (student, teacher)]
        found = float(distill.loss(batch, *outputs))
    mine, theirs = (output.logits.double() for output in outputs)
    if options:
        q, p = torch.sigmoid(mine / 2), torch.sigmoid(theirs / 2)
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        expected = 4 * float(each.sum(-1).mean())
    else:
        expected = float((mine - theirs).square().mean())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0
    other = model_of(config(num_labels=5))
    with pytest.raises(PlmccError, match="predicts something else"):
        Distillation(student, other, chosen, Pooling(), "text-classification")


RECIPE = """\
plmcc: 1
task: text-classification
passes: [{{drop_layers: {{targets: encoder, keep: 1}}}}]
train:
  data: {{train: rows.jsonl, text: {text}, label: {label}}}
  {distill}
  dropout: false
  arguments:
    {{max_steps: 150, per_device_train_batch_size: 16, learning_rate: 0.003, use_cpu: true}}
evaluate:
  - {{metric: {metric}, data: rows.jsonl, text: {text}, label: {label}}}
  - {{metric: fidelity, data: rows.jsonl, text: {text}}}
"""


@pytest.mark.parametrize(
    ("kind", "metric"), [("names", "f1_macro"), ("columns", "accuracy"), ("number", "spearman")]
)
@pytest.mark.parametrize("base", [False, True], ids=["its head", "a new head"])
def test_a_classifier_learns_and_is_loaded(
    kind: str, metric: str, base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts with several labels at once, and of pairs with a number: a cross-encoder."""
    monkeypatch.chdir(tmp_path)
    made: Any = config(num_labels=1) if kind == "number" else named(problem_type=MULTI)
    model = model_of(made)
    part: Any = model.base_model if base else model
    part.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = []
    for index in range(48):
        one, two = index % 3, index // 3 % 2
        row: dict[str, Any] = {"a": f"w{one} w{10 + index % 7}"}
        if kind == "number":
            row |= {"b": f"w{5 + two} w{20 + index % 5}", "label": one / 2 + two / 4}
        else:
            row["a"] += f" w{5 + two}"
            names = [NAMES[one % 2], NAMES[2]][: 1 + two]
            row |= {n: int(n in names) for n in NAMES} if kind == "columns" else {"label": names}
        rows.append(row)
    written(tmp_path, rows)
    label = f"[{', '.join(NAMES)}]" if kind == "columns" else "label"
    text = "[a, b]" if kind == "number" else "a"
    distill = "" if base else "distill: {logits: 0.001, task: 1.0}"
    filled = RECIPE.format(text=text, label=label, metric=metric, distill=distill)
    (tmp_path / "recipe.yaml").write_text(filled)
    command = ["apply", "recipe.yaml", "model", "-o", "out"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    scored = report["metrics"][0]
    assert scored["after"] > 90
    assert (scored["before"] is None) == base  # a random head has no metrics
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.problem_type in ((MULTI,) if kind != "number" else ("regression", None))
    if kind != "number":
        assert set(loaded.config.id2label.values()) == set(NAMES)
