"""Ahead of time: a directory of programs, tokenizer and manifest (`plmcc.exported.Exported`)."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plmcc.diagnostics import error
from plmcc.export_check import prove, record
from plmcc.export_encoder import check_encoder, write_encoder
from plmcc.export_targets import NEEDED, check_target
from plmcc.export_translation import check_programs, write_translation
from plmcc.generate import translates
from plmcc.manifest import Manifest, is_export
from plmcc.provenance import versions
from plmcc.quantize import quantize
from plmcc.source import folder_digests, load_source, outside


def export_directory(
    name: str,
    target: Path,
    to: str = "aoti",
    *,
    num_beams: int = 4,
    overwrite: bool = False,
    int8: bool = False,
) -> Manifest:
    """Export a model directory, an artifact or a hub id; otherwise as `export_model`.

    Raises:
        PlmccError: as `export_model`, and if the model cannot be loaded.
    """
    check_target(to)
    source = load_source(name)
    outside(target, Path(name))
    return export_model(
        source.model, source.tokenizer, target, to,
        num_beams=num_beams, overwrite=overwrite, int8=int8, base=source.folder,
    )  # fmt: skip


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Path,
    to: str = "aoti",
    *,
    num_beams: int = 4,
    overwrite: bool = False,
    int8: bool = False,
    base: Path | None = None,
) -> Manifest:
    """Write programs, tokenizer and manifest into a directory.

    The program of an encoder is loaded again in a fresh process and compared with the model (of an
    artifact also with its recorded probes) for several batch sizes and lengths.

    Args:
        model: an encoder with or without a head, or (aoti) an encoder-decoder that translates; it
            is left on the device and in the dtype of the program.
        tokenizer: written beside the programs.
        target: the directory; what is there is complete.
        to: "aoti", "onnx" or "executorch"; aoti makes programs for the model's own device.
        num_beams: translation: the most beams that can be asked for.
        overwrite: replace an earlier export.
        int8: round linear layers, by torchao (aoti) or onnxruntime (onnx); the model is changed.
        base: the directory that the model was loaded from.

    Raises:
        PlmccError: the model does not go to this target, a library is missing, the program
            computes something else than the model, or the directory cannot be written.
    """
    check_export(model, to)
    if int8 and to == "executorch":
        cure = "export to aoti or onnx, or round with the pass `quantized_linears`"
        raise error("PLM502", "`--int8` does not go with executorch", "--int8", cure=cure)
    _check_place(target, overwrite)

    def write(draft: Path) -> Manifest:
        return _write(model.eval(), tokenizer, draft, to, num_beams, int8, target.name, base)

    return _put(target, write)


def check_export(model: PreTrainedModel, to: str) -> None:
    """Check that a model goes to a target, and that what this needs is installed.

    Raises:
        PlmccError: it does not, or something is missing.
    """
    check_target(to)
    if translates(model) and to == "aoti":
        check_programs(model)
    else:
        check_encoder(model, to)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    to: str,
    num_beams: int,
    int8: bool,
    name: str,
    base: Path | None,
) -> Manifest:
    placed: torch.nn.Module = model
    if to != "aoti":
        placed.to("cpu")
    rough = model.dtype is not torch.float32
    if model.device.type == "cpu":
        placed.float()  # half precision is slower on most processors, and rounds more
    encoder = not translates(model)
    if encoder:
        record(model, folder, base)
    if int8 and to == "aoti":
        quantize(model)
    if encoder:
        own = write_encoder(model, folder, to, int8)
    else:
        own = write_translation(model, folder, num_beams)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    manifest = Manifest(
        kind="encoder" if encoder else "translation",
        target=to,
        name=name,
        architecture=type(model).__name__,
        source=folder_digests(base),
        int8=int8,
        device=model.device.type,
        cpu=torch.backends.cpu.get_cpu_capability(),
        versions=versions() | {n: importlib.metadata.version(n) for n in NEEDED[to]},
        **own,
    )
    manifest.write(folder)
    return prove(folder, rough or int8) if encoder else manifest


def _put(target: Path, write: Callable[[Path], Manifest]) -> Manifest:
    """Write beside the target, then rename: what has the name is finished."""
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        draft.chmod(0o755)
        manifest = write(draft)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    except OSError as problem:
        message = f"the export cannot be written: {problem.strerror or problem}"
        raise error("PLM501", message, str(target)) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _check_place(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        cure = "choose another output"
        raise error("PLM501", "this exists and is no directory", str(target), cure=cure)
    if target.exists() and any(target.iterdir()):
        ours = is_export(target)
        if not (overwrite and ours):
            message = "the output directory exists" + ("" if ours else " and holds no export")
            cure = "add --overwrite, or choose another output" if ours else "choose another output"
            raise error("PLM501", message, str(target), cure=cure)
    target.parent.mkdir(parents=True, exist_ok=True)
