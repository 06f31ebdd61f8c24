"""Loading an artifact by the class that it was saved from."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from plmcc.artifact.format import METHOD
from plmcc.data.tasks import auto_class, task_of
from plmcc.diagnostics import PlmccError, error
from plmcc.utils.text import first_line


def load(folder: str | Path, **options: object) -> PreTrainedModel:
    """Load an artifact by the class it was saved from.

    Args:
        folder: an artifact directory.
        options: passed on to `from_pretrained` (`dtype`, `device_map` ...).

    Raises:
        PlmccError: the folder is no artifact of plmcc, or it is damaged.
    """
    folder = Path(folder)
    _check_artifact(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        task = task_of((config.architectures or [""])[0], folder)
        kind = auto_class(task, config)
        model: PreTrainedModel = kind.from_pretrained(folder, config=config, **options)
    except (PlmccError, KeyboardInterrupt):
        raise
    except Exception as problem:  # whatever transformers does with a config that makes no sense
        message = f"the artifact cannot be loaded: {first_line(problem)}"
        hint = "`plmcc verify` names the file that was changed"
        raise error("PLM402", message, str(folder), hint=hint) from problem
    return model


def _check_artifact(folder: Path) -> None:
    """Check that config.json is that of an artifact."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(
            "PLM401", "there is no config.json", str(folder), hint="pass an artifact directory"
        ) from None
    except (OSError, ValueError) as problem:
        raise error("PLM401", f"config.json cannot be read: {problem}", str(folder)) from None
    ours = isinstance(values, dict) and values.get("model_type") == METHOD
    # What transformers builds alone is an ordinary checkpoint, with a lock file beside it.
    if not ours and not (folder / "plmcc.lock.json").is_file():
        raise error(
            "PLM401",
            "this model was not written by plmcc",
            str(folder),
            hint="use transformers to load it",
        )
