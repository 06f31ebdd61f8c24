"""Loading an artifact by the class that it was saved from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from plmcc.artifact.format import METHOD
from plmcc.artifact.limits import check_config, check_size
from plmcc.data.tasks import architecture_of, auto_class, task_of
from plmcc.diagnostics import PlmccError, error, listing
from plmcc.utils.files import read_json
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
    check_config(folder)
    with readable(folder):
        config = AutoConfig.from_pretrained(folder)
        kind = auto_class(task_of(architecture_of(config), folder), config)
        check_size(folder, config, kind)
        return complete(kind, folder, config=config, **options)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Make one error of whatever transformers raises for files that make no sense.

    Raises:
        PlmccError: something was raised.
    """
    try:
        yield
    except PlmccError:
        raise
    except Exception as problem:
        message = f"the artifact cannot be loaded: {first_line(problem)}"
        hint = "`plmcc verify` names the file that was changed"
        raise error("PLM402", message, str(folder), hint=hint) from problem


def complete(kind: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model by a class, with nothing that is random.

    Raises:
        PlmccError: tensors are missing (and would be random), left over, or of another shape.
    """
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    wrong = {
        "are not in the weight files and would be random": info["missing_keys"],
        "are in the weight files and belong nowhere": info["unexpected_keys"],
        "have another shape in the weight files": [name for name, *_ in info["mismatched_keys"]],
    }
    for message, names in wrong.items():
        if names:
            listed = listing(sorted(names), 3)
            raise error("PLM402", f"{len(names)} tensors {message}: {listed}", str(folder))
    found: PreTrainedModel = model
    return found


def _check_artifact(folder: Path) -> None:
    """Check that config.json is that of an artifact."""
    file = folder / "config.json"
    try:
        values = read_json(file)
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
