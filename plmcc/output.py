"""Writing an artifact: beside its place, proved in a fresh process, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plmcc.diagnostics import error
from plmcc.export import export_model
from plmcc.export_targets import TARGETS
from plmcc.recipe import Recipe
from plmcc.report import write_documents
from plmcc.size import check_file
from plmcc.source import Source, load_source
from plmcc.tensors import writing
from plmcc.verify import in_fresh_process, record

if TYPE_CHECKING:
    from plmcc.result import Result

_BEAMS = 4  # the most that an export can be asked for, where no figure says how many


def free(target: Path, overwrite: bool) -> Path:
    """Return the output directory if it may be written.

    Raises:
        PlmccError: it holds something that must not be replaced, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise error(
            "PLM501", "this exists and is no directory", str(target), cure="choose another output"
        )
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            cure = "add --overwrite, or choose another output"
            raise error("PLM501", "the output directory exists", str(target), cure=cure)
        if not (target / "plmcc.lock.json").exists():
            message = "the output directory exists and was not written by plmcc"
            raise error(
                "PLM501", message, str(target), cure="remove it yourself, or choose another output"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".plmcc-", dir=target.parent)).rmdir()
    except OSError as problem:
        raise error(
            "PLM501", f"nothing can be written there: {problem.strerror}", str(target)
        ) from None
    return target


def write(recipe: Recipe, source: Source, result: Result, target: Path) -> None:
    """Write beside the target, prove it in a fresh process, then rename: what has the name is
    finished."""
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        with writing("the artifact", target):
            draft.chmod(0o755)
            save(source, result, draft)
            check_file(draft, result.bytes_after)
            result.reload_difference = in_fresh_process(draft)
            _export(recipe, draft)
            write_documents(recipe, source, result, draft)
            _put(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
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


def _put(draft: Path, target: Path) -> None:
    """Rename; an earlier result is moved aside first, so that one of the two is there always."""
    aside = draft.with_name(f"{draft.name}-replaced")
    if target.exists():
        target.rename(aside)
    draft.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def save(source: Source, result: Result, folder: Path) -> None:
    """Write model, tokenizer, the model's other files and the probes into a folder."""
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
