"""Ahead of time: a directory of programs, tokenizer and manifest (`exported.Exported`)."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plmcc.api import Hard
from plmcc.artifact.dense import densified
from plmcc.artifact.environment import versions
from plmcc.artifact.size import component_bytes
from plmcc.artifact.verify import first_output
from plmcc.diagnostics import error
from plmcc.export.encoder import check_encoder, write_encoder
from plmcc.export.manifest import MANIFEST, Manifest, free_export, mark_export
from plmcc.export.proof import prove, record
from plmcc.export.targets import NEEDED, check_target
from plmcc.export.translation import check_programs, write_translation
from plmcc.inference.generate import translates
from plmcc.ir.probes import probe_inputs
from plmcc.models.other_files import copy_other_files, require_plmcc
from plmcc.models.source import folder_digests, load_source
from plmcc.utils.extras import library
from plmcc.utils.files import check_outside
from plmcc.utils.numerics import relative_difference
from plmcc.utils.outputs import claim, replace_directory

_EXACT = {torch.float32: 1e-4, torch.float64: 1e-8}
_ROUGH = 0.2
"""How far a dense checkpoint may be from its artifact: exactly decoded, and where the artifact
rounds what layers are called with."""


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
    check_outside(target, Path(name))
    return export_model(
        source.model,
        source.tokenizer,
        target,
        to,
        num_beams=num_beams,
        overwrite=overwrite,
        int8=int8,
        base=source.folder,
    )


def export_dense(name: str, target: Path, *, overwrite: bool = False) -> tuple[int, int, float]:
    """Write an artifact as an ordinary checkpoint, which loads without plmcc.

    Args:
        name: the artifact.
        target: the directory of the checkpoint.
        overwrite: replace an existing directory.

    Returns:
        The bytes of its weights before and after, and how far its outputs are from those of the
        artifact, relative to their scale.

    Raises:
        PlmccError: its structure is not that of the architecture, or the checkpoint computes
            something else.
    """
    target = free_export(target, overwrite)
    source = load_source(name)
    check_outside(target, Path(name))
    made = densified(source.model)
    inputs = probe_inputs(source.model)
    one, two = (first_output(model, inputs) for model in (source.model, made))
    difference = relative_difference(two, one)
    coarse = any(isinstance(part, Hard) and part.rounds_inputs for part in source.model.modules())
    if not difference <= (_ROUGH if coarse else _EXACT.get(made.dtype, 5e-2)):
        message = f"the checkpoint would differ by {difference:.3g} of its scale from the artifact"
        raise error("PLM402", message, name)
    sizes = [sum(component_bytes(model).values()) for model in (source.model, made)]
    check = partial(free_export, target, overwrite)
    with claim(target), replace_directory(target, "config.json", check) as draft:
        made.save_pretrained(draft)
        if source.folder is not None:
            copy_other_files(source.other_files(), source.folder, draft)
        if source.tokenizer is not None and not any(draft.glob("*tokeniz*")):
            source.tokenizer.save_pretrained(draft)
        require_plmcc(draft, False)
        mark_export(draft, "dense")
    return sizes[0], sizes[1], difference


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
        model: an encoder, or (aoti) an encoder-decoder that translates; it is moved and cast.
        tokenizer: written beside the programs.
        target: the directory; what is there is complete.
        to: "aoti", "onnx" or "executorch"; aoti makes programs for the model's own device.
        num_beams: translation: the most beams that can be asked for.
        overwrite: replace an earlier export.
        int8: quantize linear layers, by torchao (aoti) or onnxruntime (onnx); the model is changed.
        base: the directory that the model was loaded from.

    Raises:
        PlmccError: the model does not go to this target, a library is missing, the program
            computes something else, or the directory cannot be written.
    """
    check_export(model, to)
    _check_int8(int8, to)
    target = free_export(target, overwrite)
    check = partial(free_export, target, overwrite)
    try:
        with claim(target), replace_directory(target, MANIFEST, check) as draft:
            return _write(model.eval(), tokenizer, draft, to, num_beams, int8, target.name, base)
    except OSError as problem:
        message = f"the export cannot be written: {problem.strerror or problem}"
        raise error("PLM501", message, str(target)) from None


def _check_int8(int8: bool, to: str) -> None:
    if int8 and to == "executorch":
        hint = "export to aoti or onnx, or quantize with the pass `quantized_linears`"
        raise error("PLM502", "`--int8` is not supported for executorch", "--int8", hint=hint)


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


def _move(model: torch.nn.Module, to: str) -> None:
    """Move a model to where its program runs, in the dtype that it has there."""
    if to != "aoti":
        model.to("cpu")
    if next(model.parameters()).device.type == "cpu":
        model.float()  # half precision is slower on most processors, and rounds more


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
    coarse = any(isinstance(part, Hard) and part.rounds_inputs for part in model.modules())
    rough = model.dtype is not torch.float32 or coarse
    _move(model, to)
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


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Quantize the linear layers of a model in place: weights by output row, activations by token.

    An output head that is tied to the embedding table gets an int8 copy of its own; the table stays
    as it is. The result computes, compiles and exports, but is not for `save_pretrained`.

    Args:
        model: in evaluation mode; its linear layers in float32 or bfloat16.

    Raises:
        PlmccError: torchao is not installed.
    """
    torchao = library("torchao.quantization", "quantize", "int8", "quantize")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            copied = module.weight.detach().clone()
            module.weight = nn.Parameter(copied, requires_grad=False)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model
