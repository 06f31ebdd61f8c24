"""One of several processes that train the same models: `python -m support.devices.agreement CASES`.

Cases are those of `benchmarks/gpu/once.py`. Each prints its name and the digest of its model.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from plmcc.models.source import Source
from plmcc.pipeline.run import run
from plmcc.recipe.load import varied
from plmcc.report.provenance import model_digest
from plmcc.testing.tiny import tiny
from plmcc.utils import distributed
from support import script


def digest(name: str, arguments: dict[str, Any]) -> str:
    """Apply the recipe of a case, trained with these arguments, to its tiny model."""
    once = script("benchmarks/gpu/once.py")
    changes = {f"train.arguments.{key}": value for key, value in arguments.items()}
    recipe = varied(once.recipe(name, "cpu"), changes)
    made = run(recipe, Source.of(tiny(once.CASES[name][0])), lambda _: None)
    return model_digest(made.model)


if __name__ == "__main__":
    distributed.init()
    for text in sys.argv[1:]:
        name, arguments = json.loads(text)
        print(json.dumps([name, digest(name, arguments)]), flush=True)
    distributed.destroy()
