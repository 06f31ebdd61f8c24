"""`plmcc check-pass`: a good pass of somebody else, broken ones, and what is said of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plmcc.cli import app
from plmcc.diagnostics import PlmccError
from plmcc.guest import known
from plmcc.pass_check import Line, check_pass, with_options

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
GOOD = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Int8Table" in b)

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
        "            yield type(s)(s.kind, s.paths[:1], s.roles[:1], s.modules[:1], s.facts)",
        "sites_have_all_tied_paths",
        "lm_head is tied to transformer.wte, and not in `paths` of the site",
    ),
    "fitting_is_random": (
        "(table / scale).round()",
        "(table / scale + 0.4 * torch.rand_like(table)).round()",
        "fitting_is_the_same_every_time",
        "transformer.wte.rows is another tensor",
    ),
    "it_raises": (
        "scale = table.abs()",
        "scale = (table / torch.ones(7)).abs()",
        "hardening_keeps_the_function",
        "RuntimeError: The size of tensor a (32) must match the size of tensor b (7) at "
        "non-singleton dimension 1 (it_raises.py, line",
    ),
}


def written(folder: Path, source: str, name: str = "my_pass") -> Path:
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    return file


def first_failure(given: str) -> Line:
    """Run the checks until one fails; those that take long come last."""
    with known(given) as name:
        return next(
            line for line in check_pass(with_options(name, ()), ["gpt2"]) if line.verdict == "fail"
        )


def test_a_good_pass_in_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    given = [f"{file}:Int8Embedding", "--architecture", "gpt2", "--format", "json"]
    done = CliRunner().invoke(app, ["check-pass", *given])
    assert done.exit_code == 0, done.stdout
    checks = json.loads(done.stdout)["checks"]
    assert {c["verdict"] for c in checks} == {"pass"}
    names = {c["check"] for c in checks}
    assert "my_pass" not in sys.modules
    assert names >= {"options_are_fixed", "hardening_keeps_the_function", "fresh_processes_agree"}


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
    assert "bert       layouts_are_json                 failed: bert.embed" in done.stdout
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
        (["my_pass.py:SoftInt8"], "PLM112", "no subclass of plmcc.api.Pass"),
        (["my_pass.py:"], "PLM502", "names no class"),
        ([":Int8Embedding"], "PLM502", "names no class"),
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
