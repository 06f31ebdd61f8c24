"""`plmcc new-pass`: a package with a pass that satisfies the contract, to start from."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import error
from plmcc.utils.outputs import replace_directory

_IMPORTED = ("Pass", "Program", "Site", "Soft", "Miss", "Field", "Tensor", "Iterator", "Trainable")
"""Names that the file of the pass has already."""
_FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "plmcc-$dashed"
version = "0.1.0"
description = "The pass `$name` for plmcc"
requires-python = ">=3.11"
dependencies = ["plmcc"]

[project.entry-points."plmcc.passes"]
$name = "$name:$kind"

[tool.setuptools]
packages = ["$name"]
""",
    "README.md": """\
# $kind

A pass for plmcc. `pip install -e .` makes `$name` known in recipes:

```yaml
plmcc: 1
passes:
  - $name
```

`plmcc check-pass $name` runs the contract of passes; `pytest` does so too.
""",
    "$name/__init__.py": '''\
"""What the technique is, its formula, what it matches, what is stored, and its paper.

This one keeps each weight as it is: replace `$kind.replace`, and `product` and `dense` of
`${kind}Linear`, by your technique. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import LinearSite, Miss, Pass, Program, Site, Soft
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of


class $kind(Pass):
    """Say in one line what it does to a model."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "author, venue, arXiv number"
    hazards: ClassVar[tuple[str, ...]] = ()

    targets: str | list[str] = "linears"
    """The linear layers to rewrite."""
    factor: float = Field(1.0, gt=0)
    """An option; its docstring is its help."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield linear layers; return a reason from `_refusal` for those that do not fit."""
        yield from matched_linears(program, self.targets, self.expect, self._refusal)

    def _refusal(self, site: LinearSite) -> str:
        return "it has a single input, nothing to save" if site.in_features < 2 else ""

    def replace(self, site: Site, program: Program) -> Soft:
        """Return the trainable form. `program.data.second_moment(site)` measures the inputs."""
        assert isinstance(site, LinearSite)
        weight_OI = weight_of(site)
        made = ${kind}Linear(site.in_features, site.out_features, site.bias, factor=self.factor)
        made.to(weight_OI.device, weight_OI.dtype).take_bias(site)
        made.kept.data.copy_(weight_OI / self.factor)
        return Trainable(made)


class ${kind}Linear(HardLinear):
    """The deployed form: this class, its layout and its tensors are the module again."""

    def __init__(self, in_features: int, out_features: int, bias: bool, factor: float) -> None:
        super().__init__(in_features, out_features, bias, factor=factor)
        self.factor = factor
        self.kept = nn.Parameter(torch.zeros(out_features, in_features))

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(x, self.kept) * self.factor

    def dense(self) -> Tensor:
        """The weight (O, I)."""
        return self.kept * self.factor
''',
    "tests/test_$name.py": '''\
"""The contract of passes: each of its checks on tiny models of several architectures."""

import plmcc
from plmcc.testing.check_pass import check_pass
from $name import $kind


def test_the_contract() -> None:
    plmcc.register($kind)
    lines = list(check_pass($kind(), ["bert", "gpt2", "t5"]))
    failed = [f"{one.architecture} {one.check}: {one.reason}" for one in lines]
    assert not [text for text, one in zip(failed, lines, strict=True) if one.verdict == "fail"]
''',
}


def class_name(name: str) -> str:
    """Return the name of the class of a pass."""
    return "".join(part.capitalize() for part in name.split("_"))


def write_package(name: str, target: Path) -> list[str]:
    """Write the package of a new pass; return the names of its files.

    Raises:
        PlmccError: the name is no name of a module, or belongs to another pass, or the directory
            exists.
    """
    kind = class_name(name)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        allowed = "small letters, digits and underscores, such as `low_rank`"
        raise error("PLM502", "this cannot be the name of a pass", got=name, allowed=allowed)
    if name in catalog.names():
        raise error("PLM502", f"there is a pass `{name}` already", hint="choose another name")
    if kind in _IMPORTED or importlib.util.find_spec(name) is not None:
        message = "the package of this pass would hide another module or class"
        raise error("PLM502", message, got=name, hint="choose another name")
    if target.exists():
        hint = "choose another directory with --output"
        raise error("PLM501", "the directory exists", str(target), hint=hint)
    words = {"name": name, "kind": kind, "dashed": name.replace("_", "-")}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_directory(target) as draft:
        for path, text in _FILES.items():
            file = draft / Template(path).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(words), encoding="utf-8")
    return [Template(path).substitute(words) for path in _FILES]
