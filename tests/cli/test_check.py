"""The command line: check, schema, passes; what they print, where, and how fast."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from plmcc.catalog import registry as catalog
from plmcc.catalog.view import details
from plmcc.diagnostics import Location, PlmccError
from plmcc.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
GOOD = "plmcc: 1\npasses: [compositional_codes]\n"
BAD = "plmcc: 1\npasses: [compositional_code]\nsed: 1\n"
RUN = [sys.executable, "-W", "error", "-m", "plmcc.cli"]


def plmcc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    command = [*RUN, *arguments]
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, check=False, encoding="utf-8"
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


def test_check_of_a_good_recipe(recipe: Path) -> None:
    done = plmcc("check", str(recipe))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{recipe}: ok (1 stage, 1 pass)\n"


def test_check_of_a_bad_recipe(recipe: Path) -> None:
    recipe.write_text(BAD)
    done = plmcc("check", str(recipe))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{recipe}:2:10: error PLM110: there is no pass `compositional_code`\n"
        "  2 | passes: [compositional_code]\n"
        "    |          ^^^^^^^^^^^^^^^^^^\n"
        "  allowed: " + done.stderr.split("  allowed: ", 1)[1]
    )
    assert "compositional_codes, compressed_attention" in done.stderr
    assert f"{recipe}:3:1: error PLM101" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_for_programs(recipe: Path) -> None:
    done = plmcc("check", str(recipe), "--format", "json")
    assert json.loads(done.stdout)["ok"] is True
    recipe.write_text(BAD)
    done = plmcc("check", str(recipe), "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert [(d["code"], d["line"], d["column"]) for d in found["diagnostics"]] == [
        ("PLM110", 2, 10),
        ("PLM101", 3, 1),
    ]


@pytest.mark.parametrize("name", catalog.names())
def test_check_finds_a_bad_regular_expression_of_any_pass(name: str, recipe: Path) -> None:
    for given, column in (("re:(", 0), ("[a, re:(]", 4)):
        recipe.write_text(f"plmcc: 1\npasses:\n  - {name}:\n      targets: {given}\n")
        with pytest.raises(PlmccError) as caught:
            load_recipe(recipe)
        found = next(d for d in caught.value.diagnostics if d.code == "PLM107")
        assert isinstance(found.location, Location)
        assert (found.location.line, found.location.column) == (4, 16 + column)
        assert f"\n    | {' ' * (15 + column)}^^^^\n" in found.render()
        assert "`(` is not a regular expression: missing )" in found.message


def test_check_with_changes(recipe: Path) -> None:
    assert plmcc("check", str(recipe), "--set", "seed=1", "--set", "name=x").returncode == 0
    done = plmcc("check", str(recipe), "--set", "seed=x", "--set", "nam=x")
    assert done.returncode == 1
    assert "--set seed=x: error PLM103" in done.stderr
    assert "--set nam=x: error PLM101" in done.stderr


def test_a_terminal_without_unicode(recipe: Path) -> None:
    recipe.write_text("plmcc: 1\n日本: 1\n", encoding="utf-8")
    done = plmcc("check", str(recipe), PYTHONIOENCODING="latin-1")
    assert done.returncode == 1
    assert "unknown key `\\u65e5\\u672c`" in done.stderr
    done = plmcc("passes", "compositional_codes", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "\\u2308log2 K\\u2309" in done.stdout


def test_schema(tmp_path: Path) -> None:
    done = plmcc("schema")
    Draft7Validator.check_schema(json.loads(done.stdout))
    file = tmp_path / "recipe.schema.json"
    assert plmcc("schema", "-o", str(file)).returncode == 0
    assert file.read_text() == done.stdout


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    done = plmcc("schema", "-o", str(tmp_path / "no" / "file"))
    assert done.returncode == 1
    assert "error PLM501: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_passes() -> None:
    done = plmcc("passes")
    assert done.returncode == 0
    assert "compositional_codes" in done.stdout
    text = plmcc("passes", "compositional_codes").stdout
    for words in ("arXiv:1711.01068", "codebooks: integer; >= 1", "hazard: ", "default 32"):
        assert words in text
    details = json.loads(plmcc("passes", "compositional_codes", "--format", "json").stdout)
    options = {option["name"]: option for option in details["options"]}
    assert options["codewords"]["default"] == 16
    assert options["codewords"]["description"]


def test_the_type_of_an_option_names_no_class_of_python() -> None:
    kinds = {
        (name, option["name"]): option["type"]
        for name in catalog.names()
        for option in details(name)["options"]
    }
    assert not [kind for kind in kinds.values() if re.search("[A-Z]", kind)]
    assert kinds["low_rank", "target"] == "{parameters: number} | null"


def test_an_unknown_pass() -> None:
    done = plmcc("passes", "compositional_code")
    assert done.returncode == 1
    assert "did you mean `compositional_codes`?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "check"),
        (["check"], "RECIPE"),
        (["check", "x", "--formt", "json"], "--format"),
        (["check", "x", "--format", "xml"], "json"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], words: str) -> None:
    done = plmcc(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_reader_that_leaves() -> None:
    command = f"{' '.join(RUN)} schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert len(done.stdout) == 10


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("[low_rank]", "`weighting: covariance` measures the inputs of each layer"),
        ("[movement_pruning]", "without training they are equal"),
        ("[{drop_layers: {keep: 2, select: importance}}]", "measures what each layer changes"),
    ],
)
def test_missing_data_and_training_are_mistakes(passes: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"plmcc: 1\npasses: {passes}\n")
    done = plmcc("check", str(file))
    assert done.returncode == 1
    assert f"{file}:2:" in done.stderr
    assert "error PLM303" in done.stderr
    assert said in done.stderr
    assert "hint: add " in done.stderr


WAITS = """
import time

from plmcc.recipe import load


def reads(path):
    print("reading", flush=True)
    time.sleep(60)


load.read_text = reads
from plmcc.cli import main

main()
"""


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")],
)
def test_an_interrupt(tmp_path: Path, sent: signal.Signals, code: int, said: str) -> None:
    waiting = tmp_path / "waits.py"
    waiting.write_text(WAITS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        subprocess.Popen(
            [sys.executable, str(waiting), "check", "recipe.yaml"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts jobs in the background with interrupts ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            # More than once: on a busy machine the first may come while a destructor runs, where
            # Python drops the exception.
            time.sleep(2)
            process.send_signal(sent)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors == f"{said}\n"


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.5), (["check", "RECIPE"], 1.0)])
def test_it_answers_at_once(recipe: Path, arguments: list[str], limit: float) -> None:
    command = [str(recipe) if word == "RECIPE" else word for word in arguments]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert plmcc(*command).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 3 * limit, "three times the promise, for busy machines"


def test_neither_command_imports_torch(recipe: Path) -> None:
    bad = recipe.with_name("bad.yaml")
    bad.write_text(GOOD.replace("]", ": {targets: 're:('}]"))
    code = f"""
import sys
from typer.testing import CliRunner
from plmcc.cli.app import app
bad = {str(bad)!r}
for arguments in (["--help"], ["check", {str(recipe)!r}], ["check", bad], ["schema"], ["passes"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (1 if bad in arguments else 0), result.output
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
