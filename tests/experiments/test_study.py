"""`plmcc search`: trials, what is left out without training, going on, and the recipe it writes."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plmcc.artifact.size import component_bytes
from plmcc.cli import search as cli_search
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.pipeline.compiler import source_of
from plmcc.pipeline.run import run as carry_out
from plmcc.recipe.load import load_recipe
from support.tiny_models import tiny
from support.tokenizers import words

pytest.importorskip("optuna", reason="the extra `search` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
CODES = "passes.0.compositional_codes"
HEAD = """\
plmcc: 1
passes: [compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}]
"""
RECIPE = (
    HEAD
    + """\
train:
  data: {train: texts.txt, max_length: 16}
  distill: {teacher: original, logits: 1.0}
  arguments: {max_steps: 2, per_device_train_batch_size: 4}
evaluate: [{metric: fidelity, data: texts.txt}]
search:
  passes.0.compositional_codes.codebooks: [2, 4, 8]
"""
)
LIMIT = 87_000
"""Bytes; the original has 92,556, of which codes of 8 codebooks save less than enough."""
TARGET = ["--target", f"size<={LIMIT}B,drop<=100", "--format", "json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    for name in ("bert", "gpt2"):
        tiny(name).save_pretrained(made / name)
        words().save_pretrained(made / name)
    (made / "there").mkdir()
    (made / "there/r.yaml").write_text(RECIPE)
    texts = (" ".join(f"w{(i * j) % 94}" for j in range(1, 9)) for i in range(24))
    (made / "there/texts.txt").write_text("\n".join(texts))
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    """What the command prints; its paths are those of another folder than the tests'."""
    given = ["search", "there/r.yaml", "bert", "-o", "out", *TARGET]
    with chdir(folder):
        done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def search(folder: Path, text: str, *arguments: str, model: str = "bert") -> Result:
    """Run the command in this process."""
    (folder / "there/other.yaml").write_text(text)
    given = ["search", str(folder / "there/other.yaml"), str(folder / model), *arguments]
    return CliRunner().invoke(app, given)


def trials(result: Result, code: int = 0) -> list[dict[str, Any]]:
    assert result.exit_code == code, result.exception
    listed: list[dict[str, Any]] = json.loads(result.stdout)["trials"]
    return listed


def sentence(result: Result) -> str:
    assert isinstance(result.exception, PlmccError), result.exception
    return result.exception.render()


def test_every_choice_is_tried_and_the_smallest_that_reaches_the_target_is_chosen(
    found: Any,
) -> None:
    by_codebooks = {t["values"][f"{CODES}.codebooks"]: t for t in found["trials"]}
    assert by_codebooks.keys() == {2, 4, 8}
    assert (by_codebooks[2]["met"], by_codebooks[4]["met"]) == (True, True)
    assert found["chosen"] == by_codebooks[2]["number"]
    assert found["original"]["quality"] == pytest.approx(100)
    assert by_codebooks[4]["metrics"]["size"] > by_codebooks[2]["metrics"]["size"]
    for trial in (by_codebooks[2], by_codebooks[4]):
        assert trial["metrics"]["drop"] == pytest.approx(100 - trial["metrics"]["quality"])
    # The plan is enough to see that it is too large.
    assert "the plan shows" in by_codebooks[8]["reason"]
    assert by_codebooks[8]["metrics"].keys() == {"size", "parameters"}
    assert by_codebooks[8]["metrics"]["size"] > LIMIT


def test_the_recipe_is_ready_to_apply_from_anywhere(
    found: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = folder / "out/recipe.yaml"
    recipe = load_recipe(file, load_torch=True)
    assert recipe.search is None
    assert recipe.name == "r"
    assert recipe.passes[0].model_dump()["codebooks"] == 2
    source = source_of(recipe, str(folder / "bert"), file.parent)
    result = carry_out(recipe, source, lambda _: None, file.parent)
    metrics = next(t for t in found["trials"] if t["number"] == found["chosen"])["metrics"]
    assert sum(component_bytes(result.model).values()) == metrics["size"]
    assert result.metrics[0]["after"] == pytest.approx(metrics["quality"])


def test_the_page_shows_the_front(found: Any, folder: Path) -> None:
    page = (folder / "out/search.html").read_text()
    assert 'id="front"' in page
    assert f">trial {found['chosen']}<" in page
    assert json.loads((folder / "out/search.json").read_text()) == found


def test_the_same_command_goes_on_and_has_nothing_left_to_do(found: Any, folder: Path) -> None:
    given = [str(folder / "there/r.yaml"), str(folder / "bert"), "-o", str(folder / "out")]
    done = CliRunner().invoke(app, ["search", *given, *TARGET])
    assert trials(done) == found["trials"]
    other = CliRunner().invoke(app, ["search", *given, "--target", "size<=99kB"])
    assert "contains a search with another recipe" in sentence(other)


def test_nothing_reaches_the_target(folder: Path, tmp_path: Path) -> None:
    text = HEAD + "evaluate: [{metric: fidelity, data: texts.txt}]\n"
    text += f"search: {{{CODES}.codebooks: [2, 4]}}\n"
    done = search(folder, text, "-o", str(tmp_path / "o"), "--target", "size<=90kB,drop<=-50")
    said = sentence(done)
    assert "error PLM505: none of 2 trials reaches the target" in said
    assert "nearest is trial" in said
    assert "codebooks" in done.stdout
    assert not (tmp_path / "o/recipe.yaml").exists()
    assert (tmp_path / "o/search.html").exists()


RANGES = (
    HEAD
    + f"""\
evaluate: [{{metric: fidelity, data: texts.txt}}]
search:
  {CODES}.codebooks: {{low: 2, high: 6}}
  {CODES}.temperature: {{low: 1, high: 4, log: true}}
"""
)


def test_a_search_that_was_stopped_tries_what_it_would_have_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plmcc.experiments import study as tune

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    given = ["--target", "drop<=100", "--format", "json", "--seed", "3", "--trials"]
    whole = trials(search(folder, RANGES, "-o", str(tmp_path / "a"), *given, "3"))
    assert len(whole) == 3
    assert all(isinstance(t["values"][f"{CODES}.codebooks"], int) for t in whole)
    assert not all(t["values"][f"{CODES}.temperature"].is_integer() for t in whole)
    folder_b = ["-o", str(tmp_path / "b")]
    trials(search(folder, RANGES, *folder_b, *given, "1"))
    with monkeypatch.context() as patch:
        patch.setattr(tune, "run_trial", stopped)
        ended = search(folder, RANGES, *folder_b, *given, "3")
    assert ended.exit_code == 130
    assert "the same command continues" in ended.stderr
    again = trials(search(folder, RANGES, *folder_b, *given, "2"))
    assert [t["values"] for t in again] == [t["values"] for t in whole[:2]]
    assert [t["metrics"] for t in again] == [t["metrics"] for t in whole[:2]]


def test_no_trial_is_repeated_while_others_are_left(folder: Path, tmp_path: Path) -> None:
    text = HEAD + "evaluate: [{metric: fidelity, data: texts.txt}]\n"
    text += f"search: {{{CODES}.codebooks: {{low: 2, high: 16}}}}\n"
    given = ["--target", "size<=1kB", "--format", "json", "--trials", "14"]
    done = search(folder, text, "-o", str(tmp_path / "o"), *given)
    assert isinstance(done.exception, PlmccError)  # the plan shows that all are too large
    listed = json.loads(done.stdout)["trials"]
    assert len({trial["values"][f"{CODES}.codebooks"] for trial in listed}) == len(listed) == 14


def test_values_that_do_not_go_together_are_a_trial_with_a_reason(
    folder: Path, tmp_path: Path
) -> None:
    text = HEAD.replace(", rounds: 0", "") + "evaluate: [{metric: perplexity, data: texts.txt}]\n"
    text += f"search: {{{CODES}.initialization: [product, paper], {CODES}.rounds: [0, 3]}}\n"
    text = text.replace("codebooks: 4", "codebooks: 4, epochs: 1")
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    given = [
        "--target",
        "size<=0.999x",
        "--format",
        "json",
        "--storage",
        storage,
        "--timeout",
        "60",
    ]
    done = search(folder, text, "-o", str(tmp_path / "o"), *given, model="gpt2")
    made = trials(done)
    refused = [t for t in made if t["reason"]]
    assert len(made) == 4
    assert refused
    assert all("PLM107" in t["reason"] for t in refused)
    original = json.loads(done.stdout)["original"]["quality"]
    for trial in (t for t in made if not t["reason"]):
        # Of a perplexity, more is worse.
        assert trial["metrics"]["drop"] == pytest.approx(trial["metrics"]["quality"] - original)
    chosen = made[json.loads(done.stdout)["chosen"]]
    assert chosen["metrics"]["quality"] == min(
        t["metrics"]["quality"] for t in made if not t["reason"]
    )
    assert not (tmp_path / "o/search.db").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (("search:", "#"), [], "has no `search` section"),
        (("evaluate:", "#"), [], "has no `evaluate` section"),
        (("", ""), ["--target", "siz<=3MB"], "did you mean `size`?"),
        (("", ""), ["-o", "there"], "contains no search to continue"),
        (("", ""), ["-o", "there/r.yaml"], "the output directory is a file"),
        (("", ""), ["--storage", "nosql://me:secret@host/x"], "database of the search cannot be"),
        (("texts.txt", "text.txt"), [], "text.txt: error PLM301"),
        (("", ""), ["--set", "seed=x"], "--set seed=x"),
    ],
)
def test_mistakes_are_one_paragraph(
    change: tuple[str, str],
    arguments: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    text = RECIPE.replace("  passes.0.compositional_codes.codebooks: [2, 4, 8]\n", "")
    text += f"  {CODES}.codebooks: [2, 4]\n"
    lines = [line for line in text.split("\n") if not (change[1] == "#" and change[0] in line)]
    text = "\n".join(lines).replace(*change) if change[1] != "#" else "\n".join(lines)
    if change == ("search:", "#"):
        text = text.replace(f"  {CODES}.codebooks: [2, 4]", "")
    given = ["--target", "drop<=1", "-o", str(tmp_path / "o"), *arguments]
    done = search(folder, text, *given)
    assert said in sentence(done)
    assert "secret" not in sentence(done)
    assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())


def test_without_optuna_it_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_search, "find_spec", lambda _: None)
    done = search(folder, RECIPE, "--target", "drop<=1", "-o", str(tmp_path / "o"))
    assert "pip install 'plmcc[search]'" in sentence(done)
