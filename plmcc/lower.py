"""Loading artifacts and lowering them: torch.compile, and AOTInductor for `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from plmcc.artifact import METHOD
from plmcc.compiled import CompiledPrograms
from plmcc.diagnostics import error
from plmcc.generate import Generate, compilable
from plmcc.tasks import auto_class, task_of


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load an artifact by the class it was saved from.

    Args:
        folder: an artifact directory.
        options: passed on to `from_pretrained` (`dtype`, `device_map` ...).

    Raises:
        PlmccError: the folder is no artifact of plmcc, or it is damaged.
    """
    folder = Path(folder)
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(
            "PLM401", "there is no config.json", str(folder), cure="name an artifact directory"
        ) from None
    except (OSError, ValueError) as problem:
        raise error("PLM401", f"config.json cannot be read: {problem}", str(folder)) from None
    if not isinstance(values, dict) or values.get("model_type") != METHOD:
        raise error(
            "PLM401",
            "this model was not written by plmcc",
            str(folder),
            cure="use transformers to load it",
        )
    config = AutoConfig.from_pretrained(folder)
    task = task_of((config.architectures or [""])[0], folder)
    kind = auto_class(task, config)
    model: PreTrainedModel = kind.from_pretrained(folder, config=config, **options)
    return model


def compile(
    model: PreTrainedModel | str | Path, dynamic: bool = True, **options: Any
) -> PreTrainedModel:
    """Compile a model, or an artifact, in place; `generate()` and all else stay.

    The forward pass goes through torch.compile. `generate` of an encoder-decoder runs programs of
    plmcc (`plmcc.programs`): greedy and beam search give the tokens that transformers gives, and
    whatever else is asked for is left to transformers, as are models whose attention or cache is
    their own. A program is compiled when it is first
    needed, for all batch sizes and lengths; it keeps the weights of that moment.

    Args:
        model: a model, or the directory of an artifact.
        dynamic: compile the forward pass once for any batch size and length.
        options: passed on to `torch.compile`.

    Raises:
        PlmccError: as `load`.
    """
    if isinstance(model, (str, Path)):
        model = load(model)
    model.eval()
    model.compile(dynamic=dynamic, **options)
    if compilable(model):
        generator: Any = Generate(model, CompiledPrograms(model))
        model.generate = generator
    return model
