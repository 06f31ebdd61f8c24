"""The catalog: the passes there are, their options without torch, passes of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from plmcc.catalog import registry as catalog
from plmcc.catalog.option_slice import CannotSlice, options_class
from plmcc.diagnostics import PlmccError
from plmcc.pass_base import Pass

ROOT = Path(__file__).parents[2]


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, with folders that come first on its path."""
    searched = os.pathsep.join(map(str, (*paths, ROOT)))
    environment = {**os.environ, "PYTHONPATH": searched, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def sliced(source: str) -> type[Pass]:
    return options_class(textwrap.dedent(source), "some.module")


# --- the shipped passes


def test_names_are_the_files() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("[!_]*")}
    assert len(files) >= 10
    assert files <= set(catalog.names())
    assert not [name for name in catalog.names() if name.startswith("_")]


@pytest.mark.parametrize("name", catalog.names())
def test_options_without_torch_are_those_of_the_real_class(name: str) -> None:
    light, real = catalog.options(name), catalog.load(name)
    assert light.model_json_schema() == real.model_json_schema()
    assert light is not real, "the options had to import the module, which makes `check` slow"
    assert (light.paper, light.hazards) == (real.paper, real.hazards)
    assert (light.preserves, light.tolerance) == (real.preserves, real.tolerance)
    assert light.__doc__ == real.__doc__
    assert catalog.name_of(light) == catalog.name_of(real) == name


def test_options_do_not_import_torch() -> None:
    done = python(
        """
        import sys
        from plmcc.catalog import registry as catalog
        for name in catalog.names():
            catalog.options(name)
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        """
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_name() -> None:
    for find in (catalog.options, catalog.load, catalog.entry):
        with pytest.raises(PlmccError, match=r"PLM110(.|\n)*did you mean `compositional_codes`"):
            find("compositional_code")


def test_a_class_in_no_catalog() -> None:
    class Mine(Pass):
        pass

    with pytest.raises(PlmccError, match=r"Mine(.|\n)*entry point"):
        catalog.name_of(Mine)


# --- slicing


FULL = '''
from __future__ import annotations
import math
import torch
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, ClassVar, Literal
from pydantic import BaseModel, Field, computed_field, field_validator, model_validator
from torch import Tensor, nn
from plmcc.api import Hard, Pass, Site

LARGEST = 8
Kind = Literal["a", "b"]

def _double(value: int) -> int:
    return int(math.copysign(2 * value, 1))

class Mode(str, Enum):
    fast = "fast"

class Inner(BaseModel):
    """Nested."""
    width: int = _double(2)

class HardThing(Hard):
    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(2))

class Thing(Pass):
    """A thing.

    In two paragraphs.
    """
    paper: ClassVar[str] = "A paper"
    deployed: ClassVar[type[Hard]] = HardThing
    targets: str = "x"
    """What to
    change."""
    width: Annotated[int, Field(gt=0)] = Field(_double(2), le=LARGEST)
    """How wide."""
    kind: Kind = "a"
    mode: Mode = Mode.fast
    inner: Inner = Inner()
    """Inside."""
    explicit: int = Field(1, description="said here")
    """not here"""

    @field_validator("width")
    @classmethod
    def _even(cls, value: int) -> int:
        return cls._checked(value)

    @classmethod
    def _checked(cls, value: int) -> int:
        if value % 2:
            raise ValueError("odd")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Thing:
        return self

    @computed_field
    @property
    def area(self) -> int:
        return self.width * 2

    def replace(self, site: Site) -> nn.Module:
        return nn.Linear(self.width, 2)
'''


def test_a_slice_has_the_schema_of_the_module(tmp_path: Path) -> None:
    (tmp_path / "thing.py").write_text(FULL)
    done = python(
        "import json, thing; print(json.dumps(thing.Thing.model_json_schema()))", tmp_path
    )
    assert sliced(FULL).model_json_schema() == json.loads(done.stdout), done.stderr


def test_a_slice_validates_as_the_module_does() -> None:
    kind = sliced(FULL)
    made = kind.model_validate({"width": 4, "mode": "fast", "inner": {"width": 3}})
    assert made.model_dump()["area"] == 8
    with pytest.raises(ValueError, match="odd"):
        kind.model_validate({"width": 5})
    assert "deployed" not in vars(kind)
    assert "replace" not in vars(kind)
    assert kind.__module__ == "some.module"


def test_a_slice_without_postponed_annotations() -> None:
    source = FULL.replace("from __future__ import annotations\n", "").replace(
        "-> Thing", "-> 'Thing'"
    )
    assert sliced(source).model_json_schema() == sliced(FULL).model_json_schema()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "single"),
        ("from plmcc.api import Pass\nclass A(Pass): pass\nclass B(Pass): pass", "single"),
        ("import torch\nfrom plmcc.api import Pass\nclass A(Pass):\n  a: int = torch.x", "torch"),
        ("from torch import x\nfrom plmcc.api import Pass\nclass A(Pass):\n  a: int = x", "torch"),
        ("from . import x\nfrom plmcc.api import Pass\nclass A(Pass):\n  a: int = x", "None"),
        ("from plmcc.api import Pass, Layout\nclass A(Pass):\n  a: Layout = {}", "Layout"),
        ("from plmcc.api import Pass\nclass A(Pass):\n  a: Missing = 1", "Missing"),
        ("from plmcc.api import Pass\nclass A(Pass):\n  a: int = 1 / 0", "zero"),
        ("from plmcc.api import Pass\nclass A(Pass): pass\nclass B(A): pass", "subclasses"),
        ("from plmcc.api import Pass\nX = 1\nX += 1\nclass A(Pass):\n  a: int = X", "line 3"),
        ("from plmcc.api import Pass\nX = 1\nif X: X = 2\nclass A(Pass):\n  a: int = X", "line 3"),
        (
            "from plmcc.api import Pass\nX = []\nX.clear()\nclass A(Pass):\n  a: list = X",
            "line 3",
        ),
        ("class Pass: pass\nclass A(Pass): pass", "not a pass"),
    ],
)
def test_what_cannot_be_sliced(source: str, reason: str) -> None:
    with pytest.raises(CannotSlice, match=reason):
        sliced(source)


# --- passes of other distributions


MODULE = '''
"""A pass of somebody else."""
from __future__ import annotations
import torch
from typing import ClassVar
from pydantic import Field, model_validator
from torch import nn
from plmcc.api import Hard, Pass, Soft


class Mirror(Pass):
    """Turn a linear module around."""
    hazards: ClassVar[tuple[str, ...]] = ("It is only a test.",)
    angle: int = Field(180, ge=0, le=360)
    """In degrees."""

    @model_validator(mode="after")
    def _is_lucky(self) -> Mirror:
        if self.angle == 13:
            raise ValueError("thirteen is no angle")
        return self

    def replace(self, site: object) -> Soft:
        return Soft()


WEIGHT = torch.zeros(1)
'''
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "plmcc-mirror"
version = "1.2"
[project.entry-points."plmcc.passes"]
{points}
[tool.setuptools]
packages = ["plmcc_mirror"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a separate distribution: one good pass, and several broken ones."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    points = [
        'mirror = "plmcc_mirror.passes:Mirror"',
        'raising = "plmcc_mirror.raising:Mirror"',
        'missing = "plmcc_mirror.nowhere:Mirror"',
        'no_class = "plmcc_mirror.passes:Nothing"',
        'no_pass = "plmcc_mirror.passes:WEIGHT"',
        'compositional_codes = "plmcc_mirror.passes:Mirror"',
    ]
    package = source / "plmcc_mirror"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\n")
    (package / "passes.py").write_text(MODULE)
    (package / "raising.py").write_text('raise RuntimeError("a broken pass")\n')
    (source / "pyproject.toml").write_text(PYPROJECT.format(points="\n".join(points)))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def plmcc(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from plmcc.cli.app import main; main()"
    return python(code, installed)


def test_a_foreign_pass_is_listed_beside_broken_ones(installed: Path) -> None:
    done = plmcc(installed, "passes", "--format", "json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["mirror"] == {
        "name": "mirror",
        "origin": "plmcc-mirror 1.2",
        "doc": "Turn a linear module around.",
    }
    assert "RuntimeError: a broken pass" in rows["raising"]["error"]
    assert "No module named" in rows["missing"]["error"]
    assert "Nothing" in rows["no_class"]["error"]
    assert "WEIGHT is not a subclass of Pass" in rows["no_pass"]["error"]
    text = plmcc(installed, "passes").stdout
    assert "Turn a linear module around." in text
    assert "a broken pass" in text


def test_a_foreign_pass_is_described(installed: Path) -> None:
    text = plmcc(installed, "passes", "mirror").stdout
    for words in ("angle: integer; >= 0, <= 360; default 180", "In degrees.", "It is only a test."):
        assert words in text


def test_a_recipe_with_a_foreign_pass(installed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("plmcc: 1\npasses: [mirror: {angle: 90}]\n")
    assert plmcc(installed, "check", str(recipe)).returncode == 0
    recipe.write_text("plmcc: 1\npasses: [mirror: {angel: 90}]\n")
    assert "did you mean `angle`?" in plmcc(installed, "check", str(recipe)).stderr
    recipe.write_text("plmcc: 1\npasses: [mirror: {angle: 13}]\n")
    said = f"{recipe}:2:10: error PLM107: `mirror` is not valid: thirteen is no angle"
    assert said in plmcc(installed, "check", str(recipe)).stderr
    recipe.write_text("plmcc: 1\npasses: [raising]\n")
    done = plmcc(installed, "check", str(recipe))
    assert done.returncode == 1
    assert f"{recipe}:2:10: error PLM112" in done.stderr
    assert "plmcc-mirror 1.2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_pass_is_checked_without_torch(installed: Path) -> None:
    done = python(
        """
        import sys
        from plmcc.catalog import registry as catalog
        from plmcc.recipe.load import parse_recipe
        recipe = parse_recipe("plmcc: 1\\npasses: [mirror]")
        assert "torch" not in sys.modules
        real = parse_recipe("plmcc: 1\\npasses: [mirror]", load_torch=True)
        assert "torch" in sys.modules
        assert real == recipe and type(real.passes[0]) is not type(recipe.passes[0])
        assert parse_recipe(real.to_yaml()) == recipe
        """,
        installed,
    )
    assert done.returncode == 0, done.stderr


def test_two_owners_of_one_name(installed: Path) -> None:
    done = plmcc(installed, "passes", "compositional_codes")
    assert done.returncode == 1
    assert "two owners: plmcc (plmcc.passes.compositional_codes) and plmcc-mirror" in done.stderr
