"""Wrong data are refused by `plmcc check --data` and `apply`, with a place and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError

NAMES = {"0": "cold", "1": "hot"}
HEADS: dict[str, dict[str, Any]] = {
    "text-classification": {"architectures": ["BertForSequenceClassification"], "id2label": NAMES},
    "several labels": {
        "architectures": ["BertForSequenceClassification"],
        "id2label": NAMES,
        "problem_type": "multi_label_classification",
    },
    "a number": {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}},
    "token-classification": {
        "architectures": ["BertForTokenClassification"],
        "id2label": {"0": "O", "1": "B-PER"},
    },
    "question-answering": {"architectures": ["BertForQuestionAnswering"]},
    "sentence-similarity": {"architectures": ["BertModel"]},
    "translation": {"architectures": ["MarianMTModel"]},
    "text-generation": {"architectures": ["LlamaForCausalLM"]},
    "fill-mask": {"architectures": ["BertForMaskedLM"]},
}
RIGHT: dict[str, tuple[str, str, str]] = {
    "text-classification": ("rows.csv", "text,label\nw1 w2,hot\nw3,0\n", "accuracy"),
    "several labels": ("rows.jsonl", '{"text": "w1", "label": ["hot", "cold"]}\n', "f1"),
    "a number": ("rows.csv", "premise,hypothesis,score\nw1,w2,0.5\n", "mse"),
    "token-classification": ("rows.conll", "w1 O\nw2 B-PER\n\nw3 O\n", "accuracy"),
    "question-answering": (
        "rows.jsonl",
        '{"question": "w1?", "context": "w2 w3", '
        '"answers": {"text": ["w3"], "answer_start": [3]}}\n',
        "f1",
    ),
    "sentence-similarity": ("rows.tsv", "text_a\ttext_b\tscore\nw1\tw2\t4.5\n", "spearman"),
    "translation": ("rows.tsv", "source\ttarget\nw1\tw2\n", "chrf"),
    "text-generation": ("rows.txt", "w1 w2\nw3\n", "perplexity"),
    "fill-mask": ("rows.txt", "w1 w2\nw3\n", "perplexity"),
}
_QUESTION = RIGHT["question-answering"][1]
# task, file, content, further keys of `data`, code and part of the message
WRONG: list[tuple[str, str, str, str, str]] = [
    ("text-classification", "rows.csv", "text,label\nw1,warm\n", "", "label like that of line 2"),
    ("text-classification", "rows.csv", "text,label\nw1,hott\n", "", "did you mean `hot`?"),
    ("text-classification", "rows.csv", "text,label\nw1,2\n", "", "whole numbers 0 to 1"),
    ("text-classification", "rows.csv", "text,label\nw1,\n", "", "line 2 has no label"),
    ("text-classification", "rows.csv", "text,label\nw1, w2,hot\n", "", "PLM301"),
    ("text-classification", "rows.csv", "body,label\nw1,hot\n", "", "text column is unknown"),
    ("text-classification", "rows.csv", "body,y\nw1,1\n", "text: boddy", "did you mean `body`"),
    ("text-classification", "rows.csv", "text,y\nw1,1\n", "label: z", "no column `z`"),
    ("text-classification", "rows.csv", "text,label\n", "", "PLM301"),
    ("text-classification", "rows.csv", "", "", "the file is empty"),
    ("text-classification", "rows.xlsx", "w1", "", "not supported"),
    ("text-classification", "rows.jsonl", '{"text": "w1", "label"', "", "PLM301"),
    ("text-classification", "rows.jsonl", '{"text": 3, "label": 1}\n', "", "not contain text"),
    ("text-classification", "rows.csv", "text,verdict\nw1,hot\n", "", "labels are needed"),
    ("text-classification", "rows.jsonl", '{"text": "w"}\n{"text" 1}\n', "", "rows.jsonl:2"),
    ("text-classification", "rows.jsonl", '{"text": 3}\n{"text": "w"}\n', "", "in row 1"),
    ("several labels", "rows.jsonl", '{"text": "w", "label": ["wam"]}\n', "", "line 1"),
    ("several labels", "rows.jsonl", '{"text": "w", "label": [3]}\n', "", "whole numbers 0 to 1"),
    ("text-classification", "rows.jsonl", '{"text": "w", "label": Infinity}\n', "", "PLM30"),
    ("several labels", "rows.csv", "text,cold,hot\nw1,1,yes\n", "label: [cold, hot]", "0 or 1"),
    ("several labels", "rows.csv", "text,cold\nw1,1\n", "label: [cold, hot]", "no column `hot`"),
    ("a number", "rows.csv", "text,label\nw1,good\n", "", "line 2 is not a number"),
    ("a number", "rows.csv", "text,label\nw1,0.5\nw2,\n", "", "line 3 has no label"),
    ("a number", "rows.csv", "text,label\nw1,0.5\nw2,nan\n", "", "line 3 is not a number"),
    ("a number", "rows.jsonl", '{"text": "w", "label": Infinity}\n', "", "PLM30"),
    ("token-classification", "rows.conll", "w1 O\nw2 B-PRE\n", "", "`B-PER`"),
    ("token-classification", "rows.conll", "w1 O\nw2\n", "", "PLM30"),
    ("token-classification", "rows.conll", "\n\n", "", "PLM301"),
    (
        "token-classification",
        "rows.jsonl",
        '{"tokens": ["w1", "w2"], "labels": ["O"]}\n',
        "",
        "one label for each word",
    ),
    (
        "token-classification",
        "rows.jsonl",
        '{"words_": ["w1"], "labels": ["O"]}\n',
        "",
        "column of words",
    ),
    ("token-classification", "rows.conll", "w1 O\n", "label: [a, b]", "one column of labels"),
    ("question-answering", "rows.jsonl", '{"question": "w1?"}\n', "", "no column `context`"),
    (
        "question-answering",
        "rows.jsonl",
        _QUESTION.replace('"text": ["w3"]', '"text": "w3"'),
        "",
        "PLM30",
    ),
    ("question-answering", "rows.jsonl", _QUESTION, "text: question", "two columns of text"),
    ("question-answering", "rows.json", '{"data": [{"paragraphs": 3}]}', "", "PLM30"),
    ("sentence-similarity", "rows.tsv", "text_a\ttext_b\tscore\nw1\tw2\tlow\n", "", "not a number"),
    ("sentence-similarity", "rows.tsv", "text\tscore\nw1\t1\n", "", "two columns of text"),
    ("sentence-similarity", "rows.tsv", "text_a\ttext_b\nw1\tw2\n", "", "labels are needed"),
    ("sentence-similarity", "rows.tsv", "text_a\ttext_b\tscore\nw1\t1\n", "", "rows.tsv:2"),
    ("translation", "rows.tsv", "source\ttarget\nw1\n", "", "rows.tsv:2"),
    ("translation", "rows.txt", "w1\nw2\n", "target: other.txt", "not aligned"),
    ("translation", "rows.txt", "w1\nw2\n", "target: nowhere.txt", "does not exist"),
    ("text-generation", "rows.txt", "\n \n", "", "every row is empty"),
    ("text-generation", "rows.jsonl", '{"body": "w1"}\n', "", "text column is unknown"),
    ("fill-mask", "rows.txt", "", "", "the file is empty"),
    ("fill-mask", "rows.csv", "text\nw1\n", "text: [text, txet]", "did you mean `text`"),
]


def write(folder: Path, task: str, file: str, content: str, keys: str, metric: str) -> list[str]:
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(HEADS[task]))
    if task == "sentence-similarity":
        (folder / "model/modules.json").write_text("[]")
    (folder / file).write_text(content)
    (folder / "other.txt").write_text("w1\n")
    data = f"data: {file}" + (f", {keys}" if keys else "")
    (folder / "recipe.yaml").write_text(
        "plmcc: 1\npasses: [{drop_layers: {targets: layers, keep: 1, select: even}}]\n"
        f"evaluate: [{{metric: {metric}, {data}}}]\n"
    )
    return [str(folder / "recipe.yaml"), str(folder / "model")]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("task", RIGHT)
def test_right_data_are_counted(task: str, tmp_path: Path) -> None:
    file, content, metric = RIGHT[task]
    given = write(tmp_path, task, file, content, "", metric)
    assert "rows of data" in run("check", *given, "--data")
    found = json.loads(run("check", *given, "--data", "--format", "json"))
    assert found["ok"]
    assert found["rows"] > 0


@pytest.mark.parametrize(("task", "file", "content", "keys", "message"), WRONG)
@pytest.mark.parametrize("command", ["check", "apply"])
def test_wrong_data_are_refused(
    command: str, task: str, file: str, content: str, keys: str, message: str, tmp_path: Path
) -> None:
    """Before the model is looked at: there are no weights here."""
    given = write(tmp_path, task, file, content, keys, RIGHT[task][2])
    more = ["--data"] if command == "check" else ["-o", str(tmp_path / "out")]
    with pytest.raises(PlmccError) as caught:
        run(command, *given, *more)
    assert message in str(caught.value)
    assert str(caught.value.diagnostics[0].location)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", RIGHT)
def test_a_metric_of_another_head_is_placed(task: str, tmp_path: Path) -> None:
    file, content, _ = RIGHT[task]
    other = "mse" if task != "a number" else "accuracy"
    given = write(tmp_path, task, file, content, "", other)
    with pytest.raises(PlmccError, match=f"{other} is not a metric of") as caught:
        run("check", *given, "--data")
    location: Any = caught.value.diagnostics[0].location
    assert (location.line, location.column) == (3, 21)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    given = write(tmp_path, "text-classification", "rows.csv", "text,label\nw1,warm\n", "", "mse")
    recipe = Path(given[0])
    more = "evaluate: [{metric: accuracy, data: nowhere.csv}, "
    recipe.write_text(recipe.read_text().replace("evaluate: [", more))
    with pytest.raises(PlmccError) as caught:
        run("check", *given, "--data")
    messages = " | ".join(one.message for one in caught.value.diagnostics)
    assert "label like that of line 2" in messages
    assert "does not exist" in messages
    assert "mse is not a metric of" in messages


def test_a_question_is_learned_only_with_its_answer_in_place(tmp_path: Path) -> None:
    wrong = _QUESTION.replace("[3]", "[2]")
    recipe, model = write(tmp_path, "question-answering", "rows.jsonl", wrong, "", "f1")
    assert "rows of data" in run("check", recipe, model, "--data")  # only its text is judged
    with Path(recipe).open("a") as file:
        file.write("train: {data: {train: rows.jsonl}, arguments: {max_steps: 1}}\n")
    with pytest.raises(PlmccError, match="not at character 2"):
        run("check", recipe, model, "--data")


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    recipe, model = write(tmp_path, "fill-mask", "rows.txt", "w1\n", "", "perplexity")
    (Path(model) / "config.json").write_text("{")
    with pytest.raises(PlmccError, match=r"config\.json cannot be read"):
        run("check", recipe, model, "--data")


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    rows = '{"messages": [{"role": "user", "content": "a"}]}\n'
    recipe, model = write(tmp_path, "text-generation", "rows.jsonl", rows, "", "perplexity")
    (Path(model) / "tokenizer_config.json").write_text("{}")
    with pytest.raises(PlmccError, match="no chat template"):
        run("check", recipe, model, "--data")
    (Path(model) / "chat_template.jinja").write_text("x")
    assert "1 rows of data" in run("check", recipe, model, "--data")


def test_what_the_data_are_for_has_to_be_known(tmp_path: Path) -> None:
    recipe, _ = write(tmp_path, "fill-mask", "rows.txt", "w1\n", "", "perplexity")
    with pytest.raises(PlmccError, match="what the data are for is unknown"):
        run("check", recipe, "--data")
    assert "1 rows of data" in run("check", recipe, "--data", "--set", "task=fill-mask")


def test_torch_is_not_imported_for_it(tmp_path: Path) -> None:
    given = write(tmp_path, "text-classification", *WRONG[0][1:4], "accuracy")
    code = (
        "import sys\nfrom plmcc.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = ["apply", *given, "-o", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["1", "[]"], done.stderr
    assert "label like that of line 2" in done.stderr


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        (None, "out", "no model is given"),
        ("modell", "out", "did you mean"),
        ("recipe.yaml", "out", "this is a file, but a model is a directory"),
        ("model", "model", "the output directory exists"),
        ("model", "rows.txt", "the output directory is a file"),
    ],
)
def test_what_needs_no_model_is_refused_without_torch(
    model: str | None, output: str, message: str, tmp_path: Path
) -> None:
    recipe, _ = write(tmp_path, "fill-mask", "rows.txt", "w1\n", "", "perplexity")
    names = [] if model is None else [str(tmp_path / model)]
    code = (
        "import sys\nfrom plmcc.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "apply", recipe, *names, "-o", str(tmp_path / output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["1", "[]"], done.stderr
    assert message in done.stderr
