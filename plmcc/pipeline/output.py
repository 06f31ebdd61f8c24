"""Writing an artifact: beside its place, proved in a fresh process, then renamed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from plmcc.artifact import text_probes
from plmcc.artifact.format import METHOD, method_of
from plmcc.artifact.size import check_file
from plmcc.artifact.tensors import writing
from plmcc.artifact.verify import record, reloaded_difference
from plmcc.data.pooling import MODULES
from plmcc.data.tasks import EMBEDDING
from plmcc.evaluation.evaluator import Evaluator
from plmcc.export.exporter import export_model
from plmcc.export.targets import TARGETS
from plmcc.models.other_files import copy_other_files, require_plmcc
from plmcc.models.source import Source, load_source
from plmcc.recipe.load import Recipe
from plmcc.report.documents import write_documents
from plmcc.utils.outputs import free, replace_directory

if TYPE_CHECKING:
    from plmcc.report.result import Result

_LONG = 1 << 20
_BEAMS = 4  # the most that an export can be asked for, where no figure says how many


def write(recipe: Recipe, result: Result, target: Path, overwrite: bool = False) -> None:
    """Write beside the target, prove it in a fresh process, then rename: what has the name is
    finished.

    Raises:
        PlmccError: it cannot be written, computes something else, or somebody has written to the
            target meanwhile.
    """
    check = partial(free, target, overwrite)
    with writing("the artifact", target), replace_directory(target, check=check) as draft:
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
    if not source.keep_code:
        _forget_code(result.model)
    result.model.save_pretrained(folder)
    if source.retokenized and source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    if source.folder is not None:
        copy_other_files(source.other_files(), source.folder, folder)
    require_plmcc(folder, method_of(result.model.config) == METHOD)
    model: torch.nn.Module = result.model
    if source.tokenizer is not None and not any(folder.glob("*tokeniz*")):
        # The files are better where there are any: a tokenizer in use has its settings changed.
        source.tokenizer.save_pretrained(folder)
    device = result.model.device
    model.to("cpu")  # where the fresh process will compute them
    record(result.model, folder)
    embed = _embed(source, result.model, folder)
    text_probes.record(folder, source.tokenizer, embed, source.folder)
    model.to(device)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes files that only their owner can read


def _forget_code(model: PreTrainedModel) -> None:
    """Remove from a config what names code that does not come along."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.__dict__.pop("auto_map", None)


def _embed(source: Source, model: PreTrainedModel, folder: Path) -> text_probes.Embed | None:
    """Return how a model of sentence-transformers, as it is in memory, makes vectors of texts."""
    if source.tokenizer is None:
        return None
    evaluator = Evaluator(model, source.tokenizer, source.pooling, None, source.max_length(_LONG))
    if text_probes.is_cross_encoder(folder):
        return lambda texts: evaluator.logits([texts[:-1], texts[1:]])  # pairs of neighbors
    if (folder / MODULES).is_file() and source.task in EMBEDDING:
        prompt = source.pooling.prompt
        return lambda texts: evaluator.embed([prompt + text for text in texts])
    return None
