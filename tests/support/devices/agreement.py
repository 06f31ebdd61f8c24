"""One of several processes that train the same models: `python -m support.devices.agreement CASES`.

Cases are those of `benchmarks/gpu/once.py`. Each prints its name and the digest of its model.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from plmcc.models.source import Source
from plmcc.pipeline.run import run
from plmcc.recipe.load import varied
from plmcc.report.provenance import model_digest
from plmcc.testing.tiny import tiny
from plmcc.utils import distributed


def once() -> ModuleType:
    """Import the script for a GPU that is at hand for minutes."""
    file = Path(__file__).parents[3] / "benchmarks/gpu/once.py"
    spec = importlib.util.spec_from_file_location("once", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["once"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def digest(name: str, arguments: dict[str, Any]) -> str:
    """Apply the recipe of a case, trained with these arguments, to its tiny model."""
    script = once()
    changes = {f"train.arguments.{key}": value for key, value in arguments.items()}
    recipe = varied(script.recipe(name, "cpu"), changes)
    made = run(recipe, Source.of(tiny(script.CASES[name][0])), lambda _: None)
    return model_digest(made.model)


if __name__ == "__main__":
    distributed.init()
    for text in sys.argv[1:]:
        name, arguments = json.loads(text)
        print(json.dumps([name, digest(name, arguments)]), flush=True)
    distributed.destroy()
