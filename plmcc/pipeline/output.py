"""Writing an artifact: beside its place, proved in a fresh process, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plmcc.artifact.size import check_file
from plmcc.artifact.tensors import writing
from plmcc.artifact.verify import record, reloaded_difference
from plmcc.diagnostics import error
from plmcc.export.exporter import export_model
from plmcc.export.targets import TARGETS
from plmcc.models.source import load_source
from plmcc.recipe.load import Recipe
from plmcc.report.documents import write_documents
from plmcc.utils.files import replace_directory

if TYPE_CHECKING:
    from plmcc.report.result import Result

_BEAMS = 4  # the most that an export can be asked for, where no figure says how many


def free(target: Path, overwrite: bool) -> Path:
    """Return the output directory if it may be written.

    Raises:
        PlmccError: it holds something that must not be replaced, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise error(
            "PLM501", "the output directory is a file", str(target), hint="choose another directory"
        )
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            hint = "add --overwrite, or choose another directory"
            raise error("PLM501", "the output directory exists", str(target), hint=hint)
        if not (target / "plmcc.lock.json").exists():
            message = "the output directory exists and was not written by plmcc"
            raise error(
                "PLM501",
                message,
                str(target),
                hint="remove it yourself, or choose another directory",
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".plmcc-", dir=target.parent)).rmdir()
    except OSError as problem:
        raise error(
            "PLM501", f"the output directory cannot be written: {problem.strerror}", str(target)
        ) from None
    return target


def write(recipe: Recipe, result: Result, target: Path) -> None:
    """Write beside the target, prove it in a fresh process, then rename: what has the name is
    finished."""
    with writing("the artifact", target), replace_directory(target) as draft:
        save(result, draft)
        check_file(draft, result.bytes_after)
        result.reload_difference = reloaded_difference(draft, result.records)
        _export(recipe, draft)
        write_documents(recipe, result.source, result, draft)
    result.folder = target


def _export(recipe: Recipe, draft: Path) -> None:
    """Write the programs that a recipe asks for, from the artifact as it is on disk."""
    wanted = [to for to in recipe.lower.to if to in TARGETS] if recipe.lower is not None else []
    if not wanted:
        return
    written = load_source(draft)
    beams = max((figure.num_beams for figure in recipe.evaluate), default=_BEAMS)
    for to in wanted:
        export_model(written.model, written.tokenizer, draft / to, to, num_beams=beams, base=draft)


def save(result: Result, folder: Path) -> None:
    """Write model, tokenizer, the model's other files and the probes into a folder."""
    source = result.source
    result.model.save_pretrained(folder)
    if source.retokenized and source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    for file in source.other_files():
        assert source.folder is not None
        copy = folder / file.relative_to(source.folder)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    model: torch.nn.Module = result.model
    if source.tokenizer is not None and not any(folder.glob("*tokeniz*")):
        # The files are better where there are any: a tokenizer in use has its settings changed.
        source.tokenizer.save_pretrained(folder)
    device = result.model.device
    model.to("cpu")  # where the fresh process will compute them
    record(result.model, folder)
    model.to(device)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes files that only their owner can read
