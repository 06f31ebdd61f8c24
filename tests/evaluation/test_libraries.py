"""Scores by mteb and lm_eval, on local data."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner, Result

import plmcc
from plmcc.cli.app import app
from plmcc.data.pooling import Pooling
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.libraries import _Encoder
from plmcc.models.source import load_source
from plmcc.recipe.load import parse_recipe
from plmcc.recipe.metrics import lower_is_better
from support.tiny_models import tiny
from support.tokenizers import words

TASK = """\
task: rhymes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["w1", "w2"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("libraries")
    for name, kind in (("bert", "bert"), ("llama", "llama")):
        model: Any = tiny(kind)
        (model.base_model if kind == "bert" else model).save_pretrained(made / name)
        tokenizer = words()
        if kind == "llama":  # nothing behind a text, as tokenizers of language models
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="$A", pair="$A $B"
            )
        tokenizer.save_pretrained(made / name)
    (made / "tasks").mkdir()
    rows = [{"text": f"w{i} w{i + 1}", "label": i % 2} for i in range(12)]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (made / "tasks/rhymes.yaml").write_text(TASK.format(file=made / "rows.jsonl"))
    return made


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments, "--format", "json"])


@pytest.mark.filterwarnings("ignore")  # those of lm_eval
def test_lm_eval_scores_a_task_of_a_folder(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = ["--metric", "lm_eval:rhymes", "--tasks", str(folder / "tasks")]
    done = evaluate(str(folder / "llama"), *asked)
    assert done.exit_code == 0, done.exception or done.output
    found = json.loads(done.stdout)["metrics"][0]["values"][0]
    source = load_source(folder / "llama")
    right = 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses = [_loss(source, row["text"], choice) for choice in ("w1", "w2")]
        right += losses.index(min(losses)) == row["label"]
    assert found == pytest.approx(100 * right / 12)


def _loss(source: Any, context: str, choice: str) -> float:
    """The loss of one token behind a context."""
    ids = source.tokenizer(f"{context} {choice}", return_tensors="pt", add_special_tokens=False)
    logits = source.model(input_ids=ids["input_ids"]).logits[0, -2].log_softmax(-1)
    return -float(logits[ids["input_ids"][0, -1]])


@pytest.mark.filterwarnings("ignore")  # those of mteb
def test_mteb_scores_the_vectors_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mteb = pytest.importorskip("mteb")
    rows = [(f"w{i} w{i + 2}", f"w{i + 1} w3", i % 5) for i in range(20)]
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    kind = type(mteb.get_task("STSBenchmark"))
    local: dict[str, Any] = {"path": "csv", "data_files": {"test": str(tmp_path / "test.csv")}}
    local["revision"] = "local"
    changed = kind.metadata.model_copy(update={"dataset": local})
    monkeypatch.setattr(kind, "metadata", changed)
    done = evaluate(str(folder / "bert"), "--metric", "mteb:STSBenchmark")
    assert done.exit_code == 0, done.exception or done.output
    found = json.loads(done.stdout)["metrics"][0]["values"][0]
    source = load_source(folder / "bert")
    evaluator = Evaluator(source.model, words(), source.pooling)
    one, two = evaluator.embed([row[0] for row in rows]), evaluator.embed([row[1] for row in rows])
    scores = source.pooling.similarity(one, two)
    expected = 100 * spearmanr(scores, [row[2] for row in rows])[0]
    assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("library", "model", "metric", "said"),
    [
        ("lm_eval", "llama", "lm_eval:rymes", "did you mean `rhymes`"),
        ("lm_eval", "llama", "lm_eval:rhymes/f1", "has no such metric"),
        ("lm_eval", "bert", "lm_eval:rhymes", "is not a metric of"),
        ("mteb", "bert", "mteb:STSBenchmrk", "mteb has no such task"),
        ("json", "bert", "nltk:bleu", "unknown metric"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_task_is_one_sentence(
    folder: Path, library: str, model: str, metric: str, said: str
) -> None:
    pytest.importorskip(library)
    tasks = ["--tasks", str(folder / "tasks")] if metric.startswith("lm_eval") else []
    done = evaluate(str(folder / model), "--metric", metric, *tasks)
    assert isinstance(done.exception, PlmccError), done.exception
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("metric: perplexity", "needs the key `data`"),
        ("metric: lm_eval:hellaswag, data: x.txt", "`data` has no effect"),
        ("metric: mteb:STS22, tasks: folder", "`tasks` has no effect"),
        ("metric: perplexity, data: x.txt, tasks: folder", "`tasks` has no effect"),
        ("metric: perplexty, data: x.txt", "perplexity"),
    ],
)
def test_a_section_names_what_its_metric_needs(section: str, said: str) -> None:
    text = f"plmcc: 1\npasses: [quantized_linears: {{}}]\nevaluate: [{{{section}}}]\n"
    with pytest.raises(PlmccError, match=said):
        parse_recipe(text, load_torch=True)


def test_a_missing_folder_of_tasks_is_named(folder: Path) -> None:
    done = evaluate(str(folder / "llama"), "--metric", "lm_eval:rhymes", "--tasks", "nowhere")
    assert "there is no such folder" in str(done.exception)


def test_which_way_a_metric_goes() -> None:
    assert lower_is_better("lm_eval:wikitext/word_perplexity")
    assert lower_is_better("perplexity")
    assert not lower_is_better("lm_eval:perplexity_quiz/acc")


@pytest.mark.filterwarnings("ignore")  # those of lm_eval
def test_a_recipe_reports_a_score_before_and_after(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = f"{{metric: lm_eval:rhymes, tasks: {folder}/tasks}}"
    text = f"plmcc: 1\npasses: [drop_layers: {{keep: 1, select: even}}]\nevaluate: [{asked}]\n"
    plmcc.apply(parse_recipe(text, load_torch=True), folder / "llama", tmp_path / "out")
    [found] = json.loads((tmp_path / "out/report.json").read_text())["metrics"]
    assert found["metric"] == "lm_eval:rhymes"
    assert found["before"] is not None
    assert found["after"] is not None
    card = (tmp_path / "out/README.md").read_text()
    assert "type: lm_eval:rhymes" in card
    assert "lm_eval:rhymes" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
def test_mteb_compares_vectors_as_the_model_does(measure: str) -> None:
    pooling = Pooling(measure=measure)
    encoder = _Encoder(
        lambda texts: torch.zeros(len(texts), 3), pooling, pytest.importorskip("mteb")
    )
    one, two = torch.randn(2, 3), torch.randn(4, 3)
    found = encoder.similarity(one.numpy(), two.numpy())
    for i in range(2):
        for j in range(4):
            assert torch.allclose(
                found[i, j], pooling.similarity(one[i : i + 1], two[j : j + 1])[0]
            )
