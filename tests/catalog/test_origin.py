"""Passes that are not plmcc's own: registered in a process, or of another distribution."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plmcc
from plmcc.api import Miss, Pass, Planned, Site, Soft
from plmcc.catalog import registry as catalog
from plmcc.catalog.origin import origin_of
from plmcc.diagnostics import PlmccError
from plmcc.ir.program import Program
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of
from plmcc.rewrite import Record
from support.tiny_models import inputs, tiny

PLUGIN = '''
"""Scales a weight by a constant."""

import torch
from torch import nn
from torch.nn import functional as F

from plmcc.api import Pass
from plmcc.rewrite import Record
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of
from scaler.more.factor import FACTOR


class Scaled(Pass):
    """Scale linear layers."""

    paper = "nobody"
    targets: str | list[str] = "*.0.*query"
    """Which."""

    def match(self, program):
        yield from matched_linears(program, self.targets, self.expect)

    def replace(self, site, program):
        made = ScaledLinear(site.in_features, site.out_features, site.bias)
        made.take_bias(site)
        made.kept.data.copy_(weight_of(site))
        return Trainable(made)


class ScaledLinear(HardLinear):
    """A scaled weight."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)
        self.kept = nn.Parameter(torch.zeros(out_features, in_features))

    def product(self, x):
        return F.linear(x, self.dense())

    def dense(self):
        return self.kept * FACTOR
'''


def installed(folder: Path, version: str, factor: float) -> None:
    """Lay a distribution out as pip does, with its RECORD."""
    package = folder / "scaler/more"
    package.mkdir(parents=True, exist_ok=True)
    (folder / "scaler/__init__.py").write_text(PLUGIN)
    (package / "__init__.py").write_text("")
    (package / "factor.py").write_text(f"FACTOR = {factor}\n")
    for old in folder.glob("*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = folder / f"scaler-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: scaler\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[plmcc.passes]\nscaled = scaler:Scaled\n")
    files = ["scaler/__init__.py", "scaler/more/__init__.py", "scaler/more/factor.py"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def run(site: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", textwrap.dedent(code), *map(str, arguments)]
    paths = [str(site), *sys.path[1:], *(p for p in sys.path if p.endswith("/tests"))]
    variables = {"PYTHONPATH": ":".join(p for p in paths if p), "HF_HUB_OFFLINE": "1", "PATH": ""}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables, timeout=300
    )


APPLY = """
    import sys, plmcc
    from plmcc.recipe import parse_recipe
    from support.tiny_models import tiny
    recipe = parse_recipe("plmcc: 1\\npasses: [scaled]\\n", load_torch=True)
    plmcc.apply(recipe, tiny("bert"), sys.argv[1])
"""
LOAD = """
    import sys, plmcc
    from plmcc.recipe import parse_recipe
    from plmcc.report.provenance import code_digest
    plmcc.load(sys.argv[1])
    print(code_digest(parse_recipe("plmcc: 1\\npasses: [scaled]\\n", load_torch=True)))
"""
VERIFY = "import sys; sys.argv[0] = 'plmcc'; from plmcc.cli.app import main; main()"


def test_an_artifact_knows_the_code_that_made_it(tmp_path: Path) -> None:
    site, out = tmp_path / "site", tmp_path / "out"
    installed(site, "0.1", 1.0)
    done = run(site, APPLY, out)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    (record,) = config["quantization_config"]["modules"]
    assert (record["origin"]["distribution"], record["origin"]["version"]) == ("scaler", "0.1")
    lock = json.loads((out / "plmcc.lock.json").read_text())
    assert lock["passes"]["scaled"] == record["origin"]
    same = run(site, LOAD, out)
    assert same.returncode == 0, same.stderr
    assert "UserWarning" not in same.stderr

    (site / "unrelated.py").write_text("1\n")
    assert run(site, LOAD, out).stdout == same.stdout  # nothing that the distribution lists

    installed(site, "0.1", 2.0)  # a helper in another folder
    changed = run(site, LOAD, out)
    assert changed.stdout != same.stdout
    assert "whose code has changed since" in changed.stderr

    installed(site, "0.2", 1.0)
    loaded = run(site, LOAD, out)
    assert loaded.returncode == 0
    assert "made by scaler 0.1, and scaler 0.2 is installed" in loaded.stderr
    proved = run(site, VERIFY, "verify", out)
    assert proved.returncode == 1
    assert "pip install scaler==0.1" in proved.stderr

    for missing in (run(tmp_path, LOAD, out), run(tmp_path, VERIFY, "verify", out)):
        assert missing.returncode == 1
        assert "needs the pass `scaled` of scaler 0.1, which is not installed" in missing.stderr
        assert "pip install scaler==0.1" in missing.stderr
    planned = run(tmp_path, VERIFY, "plan", out / "recipe.yaml", out)
    assert planned.returncode == 1
    assert "PLM402: the recipe needs the pass `scaled` of scaler 0.1, which" in planned.stderr
    assert "pip install scaler==0.1" in planned.stderr

    record["origin"]["distribution"] = "x; rm -r ~"  # stands in a command that is shown
    with pytest.raises(PlmccError, match="a module record is malformed"):
        Record.from_json(record)


# --- registered in the process


def forget() -> None:
    catalog._REGISTERED.clear()
    for cached in (catalog.entries, catalog.options, catalog.load):
        cached.cache_clear()


@pytest.fixture
def thin() -> Iterator[type[Pass]]:
    """A pass of this file that is registered as long as a test runs."""
    yield plmcc.register(Thin)
    forget()


class Thin(Pass):
    """Keep a weight, doubled in its storage."""

    paper = "nobody"
    targets: str | list[str] = "*.0.*query"
    """Which."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        yield from matched_linears(program, self.targets, self.expect)

    def replace(self, site: Site, program: Program) -> Soft:
        known: Any = site
        made = Halves(known.in_features, known.out_features, known.bias)
        made.take_bias(known)
        made.kept.data.copy_(weight_of(known) / 2)
        return Trainable(made)


class Halves(HardLinear):
    """Half of a weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.kept = nn.Parameter(torch.zeros(out_features, in_features))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense().T

    def dense(self) -> torch.Tensor:
        return self.kept * 2


def test_a_registered_pass_works_in_recipes_and_artifacts(thin: type[Pass], tmp_path: Path) -> None:
    model: Any = tiny("bert").eval()
    expected = model(**inputs("bert")).logits
    recipe = plmcc.Recipe(passes=[thin()])
    assert "thin" in recipe.to_yaml()
    plmcc.Pipeline([thin()])(model)
    assert torch.allclose(model(**inputs("bert")).logits, expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    again: Any = plmcc.load(tmp_path)
    assert isinstance(again.bert.encoder.layer[0].attention.self.query, Halves)
    found, made = (m(**inputs("bert")).logits for m in (again, model))
    assert torch.allclose(found, made, atol=1e-6)
    done = plmcc.apply(plmcc.Recipe(passes=[thin()]), tiny("bert"), tmp_path / "applied")
    assert 0 <= done.reload_difference < 1e-6  # by this process: another one does not know it
    assert isinstance(plmcc.load(tmp_path / "applied"), type(model))


def test_without_it_the_artifact_is_refused(tmp_path: Path) -> None:
    plmcc.register(Thin)
    model: Any = tiny("bert")
    plmcc.Pipeline([Thin()])(model)
    model.save_pretrained(tmp_path)
    forget()
    with pytest.raises(PlmccError) as caught:
        plmcc.load(tmp_path)
    assert "PLM402" in str(caught.value)
    assert "`plmcc.register`" in str(caught.value)


def test_a_class_that_is_defined_again_is_other_code() -> None:
    text = "from plmcc.api import Pass\nclass Cell(Pass):\n    'A cell.'\n    n: int = 1\n"
    text += "    def needs_data(self):\n        return 'a reason'\n"
    digests = []
    for changed in (text, text, text.replace("= 1", "= 2"), text.replace("a reason", "none")):
        space: dict[str, Any] = {"__name__": "a_notebook"}  # there is no such module, or file
        exec(changed, space)
        plmcc.register(space["Cell"])
        found = origin_of("cell")
        assert found is not None
        digests.append(found.digest)
    forget()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_installed_class_may_be_registered_too() -> None:
    from plmcc.passes.low_rank import LowRank

    assert plmcc.register(LowRank) is LowRank
    assert not catalog.is_registered("low_rank")


def test_the_name_of_an_installed_pass_is_taken() -> None:
    with pytest.raises(PlmccError, match="`low_rank` is the name of an installed pass"):
        plmcc.register(type("LowRank", (Pass,), {"__doc__": "Mine."}))


class Careless(Thin):
    """Fail in a helper."""

    def replace(self, site: Site, program: Program) -> Soft:
        return helper({}, site.path)


def helper(known: dict[str, Soft], name: str) -> Soft:
    return known[name]


class Boastful(Thin):
    """Plan less than is made."""

    def plan(self, site: Site) -> Planned:
        known: Any = site
        return Planned(Halves(known.in_features // 2, known.out_features, known.bias))


class Secretive(Thin):
    """Make a module that nobody could build again."""

    def replace(self, site: Site, program: Program) -> Soft:
        known: Any = site

        class Hidden(Halves):
            """Elsewhere."""

        Hidden.__module__ = "somewhere.else"
        return Trainable(Hidden(known.in_features, known.out_features, known.bias))


def refused(kind: type[Pass], **more: Any) -> PlmccError:
    plmcc.register(kind)
    try:
        with pytest.raises(PlmccError) as caught:
            plmcc.Pipeline([kind()], **more)(tiny("bert"))
        return caught.value
    finally:
        forget()


def test_a_bug_of_a_pass_is_located() -> None:
    (found,) = refused(Careless).diagnostics
    assert found.code == "PLM112"
    assert "the pass `careless` failed in `replace`: KeyError" in found.message
    assert str(found.location) == "model: bert.encoder.layer.0.attention.self.query"
    line = Path(__file__).read_text().splitlines().index("    return known[name]") + 1
    assert found.got == f"test_origin.py, line {line}"


def test_a_plan_that_is_wrong_is_an_error() -> None:
    (found,) = refused(Boastful).diagnostics
    assert found.code == "PLM112"
    assert "`plan` of its pass has to be mended" in found.message
    assert found.got == "2,176 bytes planned, 4,224 made"


def test_what_could_not_be_loaded_is_refused_before_training() -> None:
    endless = plmcc.Train(data=plmcc.Data(train="synthetic"), arguments={"max_steps": 10**6})
    (found,) = refused(Secretive, train=endless).diagnostics
    assert "has no module class `Hidden`" in found.message
    assert str(found.location) == "model: bert.encoder.layer.0.attention.self.query"
