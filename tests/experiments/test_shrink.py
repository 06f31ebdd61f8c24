"""`plmcc shrink` and `plmcc advise`: what is planned, tried and chosen, the verdict, going on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel
from typer.testing import CliRunner, Result

import plmcc
from plmcc.cli.app import app
from plmcc.data.rows import Rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.onnx_files import opened, running, speeds
from plmcc.experiments import selection, trial
from plmcc.experiments import shrink as engine
from plmcc.experiments.candidates import candidates, shipped
from plmcc.experiments.goal import parse_goal
from plmcc.export.hub import export_hub
from plmcc.models.source import Source, load_source
from plmcc.recipe.load import load_recipe, parse_recipe
from plmcc.vectors.load import load
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
RECIPE = """\
plmcc: 1
shrink: {}
passes: [compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}]
train:
  data: {train: TEXT, max_length: 16}
  distill: {teacher: original, pooled: 1.0}
  arguments: {max_steps: 2, per_device_train_batch_size: 4}
search:
  passes.0.compositional_codes.codebooks: [2, 4, 8]
"""
PRUNED = """\
plmcc: 1
shrink: {table: 0.1}
passes: [prune_vocabulary: {text: TEXT}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shrink")
    config: Any = tiny("bert").config
    BertModel(config).save_pretrained(made / "bert")
    words().save_pretrained(made / "bert")
    BertForSequenceClassification(config).save_pretrained(made / "classifier")
    words().save_pretrained(made / "classifier")
    lines = [" ".join(f"w{(i * j) % 80}" for j in range(1, 9)) for i in range(80)]
    (made / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [f"{i % 2}\t{line}" for i, line in enumerate(lines)]
    (made / "rows.tsv").write_text("\n".join(["label\ttext", *rows]), encoding="utf-8")
    for name, text in (("codes", RECIPE), ("pruned", PRUNED)):
        (made / f"{name}.yaml").write_text(text, encoding="utf-8")
    return made


def recipe_of(folder: Path, name: str) -> str:
    own = folder / f"{name}.yaml"
    return str(own if own.exists() else next(f for f in shipped() if f.stem == name))


def run(folder: Path, *arguments: str, model: str = "bert") -> Result:
    """Run the command in this process, on the recipes of the folder."""
    own = [item for name in ("codes", "pruned") for item in ("--recipe", f"{folder / name}.yaml")]
    return CliRunner().invoke(app, ["shrink", str(folder / model), *own, *arguments])


def shrunk(folder: Path, *arguments: str, code: int = 0, model: str = "bert") -> dict[str, Any]:
    text = ["--text", str(folder / "text.txt"), "--format", "json"]
    done = run(folder, *text, *arguments, model=model)
    assert done.exit_code == code, done.exception or done.output
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def on_disk(folder: Path) -> int:
    """Bytes of the files that a server needs."""
    ours = ("report", "plmcc.lock", "probes", "text_probes", "recipe.yaml", "README", "papers")
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(ours)]
    return sum(file.stat().st_size for file in files)


def test_the_smallest_candidate_that_is_good_enough_is_chosen(folder: Path, tmp_path: Path) -> None:
    found = shrunk(folder, "--target", "drop<=100", "-o", str(tmp_path / "out"))
    tried = {one["title"]: one for one in found["candidates"]}
    assert found["verdict"] == "ACCEPT"
    assert found["metric"] == "fidelity"
    assert found["chosen"] == min(tried, key=lambda title: tried[title]["size"])
    assert found["measured"]["size"] == pytest.approx(on_disk(tmp_path / "out"), rel=0.1)
    assert found["measured"]["size"] < found["original"]["size"]
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0
    made = load_recipe(tmp_path / "out/recipe.yaml")
    assert made.train is not None
    assert made.search is None
    held_out = (tmp_path / "out.shrink/held_out.txt").read_text().splitlines()
    rest = (tmp_path / "out.shrink/text.txt").read_text().splitlines()
    lines = (folder / "text.txt").read_text().splitlines()
    assert len(held_out) == 4
    assert sorted(held_out + rest) == sorted(lines)


def test_sizes_are_planned_as_they_are_measured(folder: Path, tmp_path: Path) -> None:
    given = ["--effort", "quick", "--target", "size<=0.9x", "-o", str(tmp_path / "out")]
    found = shrunk(folder, *given)
    planned = next(one for one in found["candidates"] if one["title"] == found["chosen"])
    # A configuration has more to say of a compressed model.
    assert planned["size"] == pytest.approx(found["measured"]["size"], abs=2000)
    best = max(
        (one["metrics"]["quality"], -one["size"]) for one in found["candidates"] if one["metrics"]
    )
    assert (planned["metrics"]["quality"], -planned["size"]) == best
    assert not (tmp_path / "out/recipe.yaml").read_text().count("max_steps")


def test_what_nothing_reaches_is_said_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    given = ["-o", str(tmp_path / "out"), "--target"]
    found = shrunk(folder, *given, "size<=1kB", code=1)
    assert found["verdict"] == "INFEASIBLE"
    assert "the nearest is codes (codebooks 2)" in found["words"]
    found = shrunk(folder, *given, "drop<=-50", "--effort", "quick", code=1)
    assert found["verdict"] == "INFEASIBLE"
    assert "none of the 4 candidates that were tried (of 4)" in found["words"]
    assert "the nearest is" in found["words"]
    assert not (tmp_path / "out").exists()
    found = shrunk(folder, *given, "drop<=-50", code=1)
    assert found["verdict"] == "REGRESSION"
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_dry_run_only_plans(folder: Path, tmp_path: Path) -> None:
    given = ["--dry-run", "-o", str(tmp_path / "out")]
    done = run(folder, "--text", str(folder / "text.txt"), *given)
    assert done.exit_code == 0
    assert "codebooks 2" in done.stdout
    assert "4 candidates; nothing was tried" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = trial.run_trial

    def stopped(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(selection, "run_trial", stopped)
    given = ["--text", str(folder / "text.txt"), "-o", str(tmp_path / "out")]
    ended = run(folder, *given, "--target", "drop<=100", "--effort", "quick")
    assert ended.exit_code == 130
    found = shrunk(folder, *given[2:], "--target", "drop<=100", "--effort", "quick")
    tried = sum(bool(one["metrics"]) for one in found["candidates"])
    assert len(calls) == tried + 1  # the one that was stopped
    assert not list(tmp_path.glob(".out*"))
    found = shrunk(folder, *given[2:], "--target", "drop<=90", "--overwrite", "--effort", "quick")
    assert found["verdict"] == "ACCEPT"


def test_labeled_data_judge_a_classifier(folder: Path, tmp_path: Path) -> None:
    data = ["--data", str(folder / "rows.tsv"), "--target", "drop<=100", "--effort", "quick"]
    found = shrunk(folder, *data, "-o", str(tmp_path / "out"), model="classifier")
    assert found["metric"] == "accuracy"
    assert found["verdict"] == "ACCEPT"
    assert not (tmp_path / "out.shrink/held_out.txt").exists()


def test_a_model_in_memory_is_shrunk_from_python(folder: Path, tmp_path: Path) -> None:
    config: Any = tiny("bert").config
    source = Source(BertModel(config), "feature-extraction", "bert", words())
    given: dict[str, Any] = {"effort": "quick", "recipes": [folder / "codes.yaml"]}
    text = str(folder / "text.txt")
    found = plmcc.shrink(source, text, "drop<=100", output=tmp_path / "out", **given)
    assert found.verdict == "ACCEPT"
    assert found.result is not None
    assert plmcc.load(tmp_path / "out").num_parameters() < source.model.num_parameters()
    bare: Any = BertModel(config)
    other = plmcc.shrink(
        bare, text, "drop<=100", output=tmp_path / "bare", tokenizer=words(), **given
    )
    assert other.verdict == "ACCEPT"
    with pytest.raises(PlmccError, match="the output directory exists"):
        plmcc.shrink(source, text, output=tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "sise<=3MB"], "did you mean `size`?"),
        (["--effort", "fast"], "unknown effort"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--data", "nowhere.tsv"], "nowhere.tsv"),
        (["--metric", "bleu"], "bleu is not a metric of"),
        (["--metric", "spaerman"], "did you mean `spearman`?"),
        (["--metric", "spearman"], "add --data FILE"),
        (["--column", "text"], "--column"),
        (["--data", "ROWS", *("--column", "text") * 3], "one or two texts"),
        (["--data", "ROWS", "--label", "lable"], "lable"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["-o", "INSIDE"], "inside"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    inside = str(folder / "bert/small")
    named = {"INSIDE": inside, "ROWS": str(folder / "rows.tsv")}
    arguments = [named.get(one, one) for one in arguments]
    given = ["--text", str(folder / "text.txt"), "-o", str(tmp_path / "out"), *arguments]
    done = run(folder, *given)
    assert isinstance(done.exception, PlmccError), done.exception
    assert said in done.exception.render()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    for given, said in (
        ([], "add --text FILE"),
        (["--text", str(folder / "text.txt")], "add -o DIR"),
    ):
        done = run(folder, *given)
        assert isinstance(done.exception, PlmccError)
        assert said in done.exception.render()
    (tmp_path / "short.txt").write_text("w1 w2\n" * 5)
    done = run(folder, "--text", str(tmp_path / "short.txt"), "-o", str(tmp_path / "out"))
    assert isinstance(done.exception, PlmccError)
    assert "too short to hold a part of it out" in done.exception.render()
    (tmp_path / "other.txt").write_text("\u1230\u120b\u121d \u12d3\n" * 50, encoding="utf-8")
    done = run(folder, "--text", str(tmp_path / "other.txt"), "-o", str(tmp_path / "out"))
    assert isinstance(done.exception, PlmccError)
    assert "100% of the text as unknown tokens" in done.exception.render()
    assert {file.name for file in tmp_path.iterdir()} == {"short.txt", "other.txt"}


def test_trials_are_judged_by_a_sample_of_sorted_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (folder / "rows.tsv").read_text().splitlines()
    (tmp_path / "sorted.tsv").write_text("\n".join([lines[0], *sorted(lines[1:])]))
    seen: list[set[float]] = []
    monkeypatch.setattr(selection, "_ROWS", 10)

    real = Evaluator.compute

    def compute(self: Evaluator, metric: str, rows: Rows) -> float:
        seen.append(set(rows.numbers()) if len(rows) == 10 else set())
        return real(self, metric, rows)

    monkeypatch.setattr(Evaluator, "compute", compute)
    data = ["--data", str(tmp_path / "sorted.tsv"), "--target", "drop<=100", "--effort", "quick"]
    shrunk(folder, *data, "-o", str(tmp_path / "out"), model="classifier")
    trials = [labels for labels in seen if labels]
    assert len(trials) >= 3
    assert all(labels == {0.0, 1.0} for labels in trials)


def test_what_lies_beside_the_output_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.shrink").mkdir()
    (tmp_path / "out.shrink/notes.txt").write_text("keep")
    done = run(folder, "--text", str(folder / "text.txt"), "-o", str(tmp_path / "out"))
    assert isinstance(done.exception, PlmccError)
    assert "there is something else" in done.exception.render()
    assert [file.name for file in (tmp_path / "out.shrink").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ("max_steps: 2", {"max_steps": 8}),
        ("num_train_epochs: 1", {"num_train_epochs": 4}),
        ("learning_rate: 1.0e-4", {"num_train_epochs": 12}),
    ],
)
def test_the_best_effort_trains_four_times_as_long(arguments: str, length: dict[str, int]) -> None:
    text = RECIPE.replace("max_steps: 2", arguments)
    made = selection.trained(parse_recipe(text), engine.STEPS["best"])
    assert made.train is not None
    assert length.items() <= made.train.arguments.items()
    assert selection.trained(made, 0).train is None


def test_a_planned_size_is_in_the_dtype_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text(PRUNED + "dtype: float16\n")
    source = load_source(folder / "bert", meta=True)
    text = [str(folder / "text.txt")]
    (whole,) = candidates(source, text, [folder / "pruned.yaml"])
    (half,) = candidates(source, text, [tmp_path / "half.yaml"])
    assert half.parameters == whole.parameters
    assert whole.size - half.size == pytest.approx(2 * whole.parameters, rel=0.01)


def test_a_python_call_checks_its_arguments(folder: Path, tmp_path: Path) -> None:
    model: Any = BertModel.from_pretrained(folder / "bert")
    text, out = folder / "text.txt", tmp_path / "out"
    wrong: Any = "hmm"
    with pytest.raises(PlmccError, match="unknown effort"):
        plmcc.shrink(folder / "bert", text, output=out, effort=wrong)
    with pytest.raises(PlmccError, match="data: bogus"):
        plmcc.shrink(folder / "bert", text, output=out, data={"data": "x.tsv", "bogus": 1})
    with pytest.raises(PlmccError, match="pass `tokenizer=`"):
        plmcc.shrink(model, text, output=out)


def test_the_safest_candidate_is_tried_where_the_small_ones_fail(
    folder: Path, tmp_path: Path
) -> None:
    """Larger candidates of another recipe are not always better."""
    given = ["--target", "drop<=5", "--effort", "quick", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(
        app,
        ["shrink", str(folder / "bert"), "--text", str(folder / "text.txt"), *given]
        + [
            item
            for name in ("int8", "codes", "pruned")
            for item in ("--recipe", recipe_of(folder, name))
        ],
    )
    assert done.exit_code == 0, done.exception or done.output
    assert "ACCEPT" in done.stdout


def test_every_shipped_recipe_says_what_it_is_for() -> None:
    files = shipped()
    assert len(files) >= 8
    for file in files:
        recipe = load_recipe(file)
        assert recipe.shrink is not None
        assert recipe.name == file.stem
        assert file.read_text(encoding="utf-8").startswith("# ")


def test_recipes_that_do_not_fit_say_why(folder: Path) -> None:
    source = load_source(folder / "classifier", meta=True)
    found = candidates(source, [str(folder / "text.txt")])
    usable = {one.name for one in found if one.recipe is not None}
    assert {"int8", "vocabulary", "vocabulary-int8"} <= usable
    reasons = {one.name: one.reason for one in found if one.recipe is None}
    assert "it is for sentence-similarity" in reasons["embedding-codes-int8"]
    sizes = [one.size for one in found if one.recipe is not None]
    assert sizes == sorted(sizes)
    bare = candidates(source, [])
    assert "add --text" in next(one.reason for one in bare if one.name == "vocabulary")


def test_advice_shows_where_the_bytes_and_the_time_are(folder: Path) -> None:
    given = ["advise", str(folder / "bert"), "--format", "json"]
    done = CliRunner().invoke(app, [*given, "--text", str(folder / "text.txt")])
    assert done.exit_code == 0, done.exception
    values = json.loads(done.stdout)
    files = (folder / "bert/model.safetensors").stat().st_size
    parts = {one["name"]: one for one in values["components"]}
    assert sum(one["bytes"] for one in parts.values()) == values["size"]
    assert abs(values["size"] - files) < 20_000  # the tokenizer; a file of weights has a header
    assert parts["encoder.layer"]["operations"] > 0.5
    assert sum(one["operations"] or 0 for one in parts.values()) == pytest.approx(1)
    assert any(one["name"] == "vocabulary-int8" for one in values["candidates"])
    plain = CliRunner().invoke(app, given[:2])
    assert "next: plmcc shrink" in plain.stdout


def test_with_a_limit_of_speed_an_onnx_file_is_measured_and_written(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    data = ["--data", str(folder / "rows.tsv"), "--effort", "quick"]
    target = ["--target", "size<=1MB,speed>=0.01", "-o", str(tmp_path / "out")]
    found = shrunk(folder, *data, *target, model="classifier")
    assert (found["verdict"], found["runtime"]) == ("ACCEPT", "onnx")
    export = tmp_path / "out.onnx"
    files = [file for file in export.rglob("*") if file.is_file()]
    assert found["measured"]["size"] == sum(file.stat().st_size for file in files)
    assert found["measured"]["speed"] > 0
    # The quality is that of the file, as anyone would compute it.
    session = opened(export / "onnx/model_quantized.onnx")
    tokenizer = AutoTokenizer.from_pretrained(export)
    rows = [line.split("\t") for line in (folder / "rows.tsv").read_text().splitlines()[1:]]
    right = 0
    for label, text in rows:
        given = tokenizer([text], return_tensors="np", return_token_type_ids=True)
        fed = {port.name: given[port.name] for port in session.get_inputs()}
        right += int(session.run(["logits"], fed)[0].argmax()) == int(label)
    assert found["measured"]["quality"] == pytest.approx(100 * right / len(rows))


def test_a_model_runs_by_its_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export_hub(str(folder / "bert"), tmp_path / "out", precisions=["fp32"])
    source = load_source(folder / "bert")
    texts = ["w1 w2 w3", "w4"]
    served = running(source.model, tmp_path / "out/onnx/model.onnx")
    one, two = (
        Evaluator(model, source.need_tokenizer("this"), source.pooling).embed(texts)
        for model in (source.model, served)
    )
    assert torch.allclose(one, two, atol=1e-5)
    file = tmp_path / "out/onnx/model.onnx"
    ratios = speeds(file, file, source.model, seconds=0.5)
    assert all(0.2 < ratio < 5 for ratio in ratios.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runtime", "tensorrt"], "auto, torch, onnx"),
        (["--runtime", "onnx"], "only encoders of text do"),
    ],
)
def test_a_runtime_that_cannot_be_is_refused(
    folder: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    words().save_pretrained(tmp_path / "gpt2")
    text = ["--text", str(folder / "text.txt"), "-o", str(tmp_path / "out")]
    done = run(folder, *text, *arguments, model=str(tmp_path / "gpt2"))
    assert done.exit_code != 0
    assert said in str(done.exception)
    assert not (tmp_path / "out").exists()


VECTORS = """\
plmcc: 1
shrink: {table: 0.99}
passes: [compositional_codes: {width: 2, codewords: 16, initialization: product}]
search:
  passes.0.compositional_codes.width: [1, 2, 4]
"""


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 16, generator=random).tolist()
    lines = [f"v{i} {' '.join(f'{x:.4f}' for x in row)}" for i, row in enumerate(rows)]
    (tmp_path / "vectors.txt").write_text("\n".join(["300 16", *lines]) + "\n")
    (tmp_path / "vectors.yaml").write_text(VECTORS)
    return tmp_path


def test_word_vectors_are_judged_by_their_own_words(vectors: Path) -> None:
    recipes = ["--recipe", str(vectors / "vectors.yaml"), "--target", "drop<=25"]
    command = ["shrink", str(vectors / "vectors.txt"), *recipes, "-o", str(vectors / "out")]
    done = CliRunner().invoke(app, [*command, "--format", "json"])
    assert done.exit_code == 0, done.exception or done.output
    found = json.loads(done.stdout)
    assert (found["verdict"], found["metric"]) == ("ACCEPT", "fidelity")
    one, two = load(vectors / "vectors.txt"), load(vectors / "out")
    names = [f"v{i}" for i in range(300)]
    first, second = (torch.tensor(np.stack([v[n] for n in names])) for v in (one, two))
    expected = 100 * float(torch.nn.functional.cosine_similarity(first, second).mean())
    assert found["measured"]["quality"] == pytest.approx(expected, abs=1e-3)
    assert expected > 75


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--runtime", "onnx"], "word vectors are looked up, and not run"),
        (["--text", "plain.txt"], "results of word vectors are judged by their words"),
    ],
)
def test_what_word_vectors_have_no_use_for_is_refused(
    vectors: Path, more: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(vectors)
    (vectors / "plain.txt").write_text("v1 v2\n" * 60)
    command = ["shrink", "vectors.txt", "--recipe", "vectors.yaml", "-o", "out", *more]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, PlmccError), done.exception
    assert said in str(done.exception)
    assert not (vectors / "out").exists()


def test_pairs_with_a_word_that_has_no_vector_are_refused(vectors: Path) -> None:
    (vectors / "pairs.tsv").write_text("a\tb\tscore\nv1\tv2\t3\nv1\tnobody\t2\nv3\tv4\t1\n")
    asked = ["--recipe", str(vectors / "vectors.yaml"), "--data", str(vectors / "pairs.tsv")]
    columns = ["--column", "a", "--column", "b", "--label", "score", "-o", str(vectors / "out")]
    done = CliRunner().invoke(app, ["shrink", str(vectors / "vectors.txt"), *asked, *columns])
    assert "words without a vector" in str(done.exception)
    assert not (vectors / "out").exists()


def test_a_text_in_the_place_of_the_model_is_told_apart(folder: Path, tmp_path: Path) -> None:
    command = ["shrink", str(folder / "text.txt"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert "name a model: a file here is one of word vectors" in str(done.exception)


@pytest.mark.parametrize(
    ("target", "chosen"), [("speed>=2,drop<=5", "c"), ("speed>=2,drop<=30", "a"), ("speed>=2", "c")]
)
def test_with_a_limit_of_speed_any_that_was_tried_may_be_chosen(
    target: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tried: larger codes were not the better ones."""
    measured = {
        "a": (6.9, 21.0),
        "b": (2.6, 5.0),
        "c": (2.3, 5.0),
        "d": (2.2, 6.0),
        "e": (1.1, 1.0),
    }
    usable: Any = [
        SimpleNamespace(name="codes", key=key, size=size) for size, key in enumerate("abcde")
    ]

    def tried(self: selection.Selection, one: Any, source: object) -> None:
        speed, drop = measured[one.key]
        self.done[one.key] = {"size": one.size, "speed": speed, "drop": drop, "quality": 90 - drop}

    monkeypatch.setattr(selection.Selection, "_try", tried)
    judged: Any = SimpleNamespace(metric="accuracy")
    goal = parse_goal(target)
    trials = selection.Selection("m", goal, judged, "quick", tmp_path, usable, lambda _: None)
    source: Any = object()
    assert trials.choose(usable, source).key == chosen
    assert set(trials.done) == {"a", "c", "d", "e"}
