"""`plmcc check-pass`: a good pass of somebody else, broken ones, and what is said of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plmcc.catalog.uninstalled import temporarily_registered
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.testing.check_pass import Line, check_pass, with_options
from support.docs_examples import example_pass

GOOD = example_pass()

BROKEN = {
    "harden_changes_outputs": (
        "        return self.hard\n",
        "        self.hard.scale.data.mul_(1.25)\n        return self.hard\n",
        "hardening_keeps_the_function",
        "hardening changes the outputs by",
    ),
    "layout_is_not_json": (
        'self.layout = {"rows": rows, "dims": dims}',
        'self.layout = {"rows": rows, "dims": torch.tensor(int(dims))}',
        "layouts_are_json",
        "transformer.wte: `dims` of the layout is no plain JSON value",
    ),
    "a_tied_path_is_forgotten": (
        'yield from program.resolve(self.targets, "embedding", self.expect)',
        'for s in program.resolve(self.targets, "embedding", self.expect):\n'
        "            one = {n: getattr(s, n)[:1] for n in ('paths', 'roles', 'modules')}\n"
        "            yield __import__('dataclasses').replace(s, **one)",
        "sites_have_all_tied_paths",
        "lm_head is tied to transformer.wte, and not in `paths` of the site",
    ),
    "fitting_is_random": (
        "(table / scale).round()",
        "(table / scale + 0.4 * torch.rand_like(table)).round()",
        "fitting_is_the_same_every_time",
        "transformer.wte.rows is another tensor",
    ),
    "the_head_is_wrong": (
        "return hidden @ (self.rows * self.scale).T",
        "return 3 * hidden @ (self.rows * self.scale).T",
        "weights_are_what_is_computed",
        "transformer.wte: `attend` differs by 2 from `weight`",
    ),
    "it_raises": (
        "scale = table.abs()",
        "scale = (table / torch.ones(7)).abs()",
        "hardening_keeps_the_function",
        "RuntimeError: The size of tensor a (32) must match the size of tensor b (7) at "
        "non-singleton dimension 1 got: it_raises.py, line",
    ),
}


def written(folder: Path, source: str, name: str = "my_pass") -> Path:
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    return file


def first_failure(given: str) -> Line:
    """Run the checks until one fails; those that take long come last."""
    with temporarily_registered(given) as name:
        return next(
            line for line in check_pass(with_options(name, ()), ["gpt2"]) if line.verdict == "fail"
        )


def test_a_good_pass_in_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    given = [f"{file}:Int8Embedding", "--architecture", "gpt2", "--format", "json"]
    done = CliRunner().invoke(app, ["check-pass", *given])
    assert done.exit_code == 0, done.stdout
    checks = json.loads(done.stdout)["checks"]
    skipped = {c["check"]: c["reason"] for c in checks if c["verdict"] == "skip"}
    assert skipped.keys() == {"programs_take_any_size", "programs_run"}
    assert set(skipped.values()) == {"models of this kind are not exported"}
    assert not [c for c in checks if c["verdict"] == "fail"]
    names = {c["check"] for c in checks}
    assert "my_pass" not in sys.modules
    assert names >= {"options_are_fixed", "hardening_keeps_the_function", "fresh_processes_agree"}


def test_a_file_beside_the_pass_hides_no_library(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')\n")
    code = "import random, tempfile, my_pass; print(my_pass.__file__)"
    with temporarily_registered(f"{file}:Int8Embedding"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(file)), done.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_named(name: str, tmp_path: Path) -> None:
    before, after, check, said = BROKEN[name]
    assert before in GOOD
    line = first_failure(f"{written(tmp_path, GOOD.replace(before, after), name)}:Int8Embedding")
    assert (line.architecture, line.check) == ("gpt2", check), line
    assert said in line.reason


def test_the_command_fails_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after, *_ = BROKEN["layout_is_not_json"]
    written(tmp_path, GOOD.replace(before, after), "module_of_mine")
    given = ["check-pass", "module_of_mine:Int8Embedding", "--architecture", "bert"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 1
    assert "bert          layouts_are_json                 failed: bert.embed" in done.stdout
    assert re.search(r"failed on bert: layouts_are_json: A layout holds", done.stdout)
    assert "module_of_mine" not in sys.path


def test_a_pass_that_fits_nothing_is_not_checked() -> None:
    lines = list(check_pass(with_options("optimum", ()), ["bert", "gpt2"]))
    assert {line.verdict for line in lines if line.architecture != "-"} == {"skip"}
    assert lines[-1].check == "it_fits"
    assert lines[-1].verdict == "fail"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["my_pas.py:Int8Embedding"], "PLM001", "did you mean `my_pass.py`?"),
        (["my_pass.py:Int8Embeding"], "PLM112", "did you mean `Int8Embedding`?"),
        (["my_pass.py:SoftInt8"], "PLM112", "not a subclass of plmcc.api.Pass"),
        (["my_pass.py:"], "PLM502", "not the name of a class"),
        ([":Int8Embedding"], "PLM502", "not the name of a class"),
        (["no_such_module:Int8Embedding"], "PLM112", "No module named 'no_such_module'"),
        (["wrong.py:Int8Embedding"], "PLM112", "SyntaxError"),
        (["json.py:Int8Embedding"], "PLM502", "rename the file"),
        (["my-pass.py:Int8Embedding"], "PLM502", "letters, digits and _"),
        (["compositional_code"], "PLM110", "did you mean `compositional_codes`?"),
        (["compositional_codes", "--option", "codeboks=2"], "PLM101", "`codebooks`"),
        (["compositional_codes", "--option", "codebooks=x"], "PLM103", "--option codebooks=x:"),
        (["compositional_codes", "--option", "codebooks"], "PLM130", "name=value"),
        (["prune_vocabulary", "--option", "text=a.txt"], "PLM502", "plmcc test"),
        (["my_pass.py:Int8Embedding", "--architecture", "brt"], "PLM502", "did you mean `bert`?"),
    ],
)
def test_mistakes_are_one_paragraph(
    arguments: list[str],
    code: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD)
    written(tmp_path, GOOD, "my-pass")
    written(tmp_path, GOOD, "json")
    written(tmp_path, "class Int8Embedding(:\n", "wrong")
    done = CliRunner().invoke(app, ["check-pass", *arguments])
    assert isinstance(done.exception, PlmccError), done.exception
    [found] = done.exception.diagnostics
    assert found.code == code, found.render()
    assert said in found.render()
