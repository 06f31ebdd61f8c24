"""plmcc: a declarative model-compression compiler for pretrained language models.

Importing it is light: torch and transformers are imported when a name here needs them. Once plmcc
is imported, transformers loads compressed models (`AutoModel.from_pretrained(directory)`),
whichever is imported first.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plmcc.api import Hard, Miss, Objective, Pass, Site, Soft
    from plmcc.compiler import Pipeline, apply
    from plmcc.diagnostics import PlmccError
    from plmcc.exported import Exported
    from plmcc.lower import compile, load
    from plmcc.program import Program
    from plmcc.recipe import Data, Distill, Evaluate, Lower, Recipe, Stage, Train, load_recipe
    from plmcc.result import Result

_NAMES = {
    "plmcc.api": ("Hard", "Miss", "Objective", "Pass", "Site", "Soft"),
    "plmcc.compiler": ("Pipeline", "apply"),
    "plmcc.result": ("Result",),
    "plmcc.diagnostics": ("PlmccError",),
    "plmcc.exported": ("Exported",),
    "plmcc.lower": ("compile", "load"),
    "plmcc.program": ("Program",),
    "plmcc.recipe": (
        "Data",
        "Distill",
        "Evaluate",
        "Lower",
        "Recipe",
        "Stage",
        "Train",
        "load_recipe",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "Data",
    "Distill",
    "Evaluate",
    "Exported",
    "Hard",
    "Lower",
    "Miss",
    "Objective",
    "Pass",
    "Pipeline",
    "PlmccError",
    "Program",
    "Recipe",
    "Result",
    "Site",
    "Soft",
    "Stage",
    "Train",
    "apply",
    "compile",
    "load",
    "load_recipe",
]
assert set(__all__) == set(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plmcc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _AfterTransformers(MetaPathFinder, Loader):
    """Registers plmcc's artifacts as soon as transformers has been imported.

    transformers has no entry points for this, and importing it here would make `plmcc --help` take
    seconds.
    """

    _loader: Any = None

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module("plmcc.artifact")


if "transformers" in sys.modules:
    importlib.import_module("plmcc.artifact")
else:
    sys.meta_path.insert(0, _AfterTransformers())
