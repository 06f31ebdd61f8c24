"""Ahead of time: a directory of compiled programs, tokenizer and manifest
(`plmcc.exported.Exported` runs it)."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plmcc.compiled import cache_shapes, encode_program, package, room_for, step_program
from plmcc.diagnostics import error
from plmcc.exported import MANIFEST, Manifest
from plmcc.generate import compilable, search_of, translates, vocabulary_of
from plmcc.programs import positions_of
from plmcc.quantize import quantize
from plmcc.search import Search
from plmcc.source import load_source, outside

_LONGEST = 256  # new tokens, where neither the model nor its generation config says how many


def export_directory(
    name: str, target: Path, *, num_beams: int = 4, overwrite: bool = False, int8: bool = False
) -> Path:
    """Export a model directory, an artifact or a hub id, with int8 linear layers if asked
    (`plmcc.quantize`); otherwise as `export_model`.

    Raises:
        PlmccError: as `export_model`, and if the model cannot be loaded.
    """
    source = load_source(name)
    outside(target, Path(name))
    model: torch.nn.Module = source.model.eval()
    if source.model.device.type == "cpu":
        model.float()
    check_translates(source.model, name)
    if int8:
        quantize(source.model)
    return export_model(
        source.model, source.tokenizer, target, num_beams=num_beams, overwrite=overwrite
    )


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Path,
    *,
    num_beams: int = 4,
    overwrite: bool = False,
) -> Path:
    """Write programs, tokenizer and manifest into a directory that `plmcc.exported.Exported` loads.

    Args:
        model: an encoder-decoder; on the device that the programs are for.
        tokenizer: written beside the programs.
        target: the directory; what is there is complete.
        num_beams: the most beams that can be asked for; greedy search is always there.
        overwrite: replace an earlier export.

    Raises:
        PlmccError: the model does not translate, or the directory cannot be written.
    """
    check_translates(model)
    _check_programs(model)
    defaults = default_search(model)
    _check_target(target, overwrite)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        draft.chmod(0o755)
        _write(model, tokenizer, draft, num_beams, defaults, target.name)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    num_beams: int,
    search: Search,
    name: str,
) -> None:
    most = replace(search, num_beams=num_beams).candidates
    steps = sorted({1, room_for(most)})
    package(encode_program(model), folder / "encode.pt2")
    for size in steps:
        package(step_program(model, size, search.restrictions), folder / f"step-{size}.pt2")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    Manifest(
        name=name,
        architecture=type(model).__name__,
        device=model.device.type,
        torch=torch.__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
        shapes=[list(shape) for shape in cache_shapes(model)],
        steps=steps,
        positions=positions_of(model.config),
        vocabulary=vocabulary_of(model),
        search=asdict(search),
    ).write(folder)


def check_translates(model: PreTrainedModel, name: str = "") -> None:
    """Refuse a model, named so by the user, that does not make text from text.

    Raises:
        PlmccError: it does not.
    """
    if not translates(model):
        message = f"{type(model).__name__} is no translation model"
        cure = "name an encoder-decoder that reads text, such as Marian, BART, mBART or T5"
        raise error("PLM401", message, name, cure=cure)


def _check_programs(model: PreTrainedModel) -> None:
    if not compilable(model):
        message = f"{type(model).__name__} cannot be exported: its attention or cache is its own"
        cure = "use it by `generate`; Marian, BART, mBART, M2M100, Pegasus and T5 can be exported"
        raise error("PLM401", message, cure=cure)


def default_search(model: PreTrainedModel) -> Search:
    """Return the search of a model's generation config.

    Raises:
        PlmccError: it asks for something that compiled programs do not do, such as sampling.
    """
    search = search_of(_settings(model))
    if search is None:
        message = "the generation config asks for what compiled programs do not do"
        cure = "remove sampling, penalties and suppressed tokens from generation_config.json"
        raise error("PLM401", message, type(model).__name__, cure=cure)
    return search


def default_length(model: PreTrainedModel) -> int:
    """Return how many new tokens a model's generation config allows, whatever else it asks for."""
    return int(_settings(model).max_length) - 1


def _settings(model: PreTrainedModel) -> Any:
    """A model's complete generation config; `max_length` is set, and counts the start token."""
    generator: Any = model
    config, _ = generator._prepare_generation_config(None)
    own = generator.generation_config
    if own.max_new_tokens is not None:
        config.max_length = own.max_new_tokens + 1
    elif own.max_length is None:
        config.max_length = 1 + min(_LONGEST, positions_of(model.config, "decoder") or _LONGEST)
    return config


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        cure = "choose another output"
        raise error("PLM501", "this exists and is no directory", str(target), cure=cure)
    if target.exists() and any(target.iterdir()):
        ours = (target / MANIFEST).exists()
        if not (overwrite and ours):
            message = "the output directory exists" + ("" if ours else " and holds no export")
            cure = "add --overwrite, or choose another output" if ours else "choose another output"
            raise error("PLM501", message, str(target), cure=cure)
    target.parent.mkdir(parents=True, exist_ok=True)
