"""plmcc: a declarative model-compression compiler for pretrained language models.

Importing it is light: torch and transformers are imported when a name here needs them. Once plmcc
is imported, transformers loads compressed models (`AutoModel.from_pretrained(directory)`),
whichever is imported first.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plmcc.api import Hard, Miss, Objective, Pass, Site, Soft
    from plmcc.artifact.load import load
    from plmcc.catalog.registry import register
    from plmcc.diagnostics import PlmccError
    from plmcc.experiments.shrink import shrink
    from plmcc.export.exported import Exported
    from plmcc.inference.compile import compile
    from plmcc.ir.program import Program
    from plmcc.pipeline.compiler import Pipeline, apply
    from plmcc.recipe.load import Data, Distill, Evaluate, Lower, Recipe, Stage, Train, load_recipe
    from plmcc.report.result import Result

_NAMES = {
    "plmcc.api": ("Hard", "Miss", "Objective", "Pass", "Site", "Soft"),
    "plmcc.pipeline.compiler": ("Pipeline", "apply"),
    "plmcc.report.result": ("Result",),
    "plmcc.diagnostics": ("PlmccError",),
    "plmcc.experiments.shrink": ("shrink",),
    "plmcc.export.exported": ("Exported",),
    "plmcc.artifact.load": ("load",),
    "plmcc.catalog.registry": ("register",),
    "plmcc.inference.compile": ("compile",),
    "plmcc.ir.program": ("Program",),
    "plmcc.recipe.load": (
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
    "register",
    "shrink",
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
    _looking = False
    """Whether the others are being asked. It stays until transformers is imported: libraries look
    for it without importing it."""

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    """Register plmcc's artifacts with transformers."""
    importlib.import_module("plmcc.artifact.format")


def _is_news(record: logging.LogRecord) -> bool:
    """Say whether a log record is other than what torchao says whenever it is imported: that it has
    kernels for other machines, and that torch knows its enumerations."""
    text = str(record.msg)
    return not text.startswith("Failed to load") and "an Enum subclass" not in text


# Where torchao is installed, transformers imports it.
for _logger in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_logger).addFilter(_is_news)

if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
