"""ONNX files in the layout that servers look for: `onnx/model.onnx`, `onnx/model_quantized.onnx`
(int8) and `onnx/model_q4.onnx` beside configuration and tokenizer, as text-embeddings-inference,
transformers.js, fastembed and sentence-transformers read them.

A sentence encoder has the outputs `token_embeddings` and `sentence_embedding`: pooling and all
modules that follow it are part of the program. Other encoders have those of the model.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.data.pooling import MODULES, Pooling, last_states
from plmcc.data.tasks import EMBEDDING
from plmcc.diagnostics import PlmccError, error
from plmcc.export.encoder import check_encoder, encoder_program, example, longest
from plmcc.export.manifest import free_export, mark_export
from plmcc.export.targets import check_target
from plmcc.kit import HardLinear
from plmcc.models.other_files import copy_other_files, require_plmcc
from plmcc.models.source import Source, load_source
from plmcc.utils.files import check_outside
from plmcc.utils.numerics import relative_difference
from plmcc.utils.outputs import claim, replace_directory
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx", "q4": "model_q4.onnx"}
"""The names that servers know, by precision."""
_BOUND = 1e-4
_SIMILAR = {"fp32": 1 - 1e-6, "int8": 0.99, "q4": 0.9}
"""The mean cosine of outputs with those of the model that is expected."""
_LEAST = 0.8
"""Below this one a file is not written."""
_LONGEST = 1 << 20
_BLOCK = 32
"""q4: inputs that share a scale."""
_SHAPES = ((2, 8), (1, 2), (4, 17))


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written, and how near its outputs are to those of the model."""

    name: str
    bytes: int
    cosine: float
    """Mean over rows or tokens."""
    low: bool
    """Whether it is less than is usual of this precision."""


class Embedding(nn.Module):
    """A sentence encoder as it is exported: states of tokens, and one vector a text."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.later = nn.ModuleList(pooling.later)

    def forward(  # noqa: D102, as the class says
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        states_BLD = last_states(output)
        vector_BD = self.pooling(states_BLD, attention_mask)
        return {"token_embeddings": states_BLD, "sentence_embedding": vector_BD}


def export_hub(
    name: str,
    target: Path,
    *,
    precisions: Sequence[str] = tuple(FILES),
    overwrite: bool = False,
) -> list[OnnxFile]:
    """Write a model as a directory that servers read.

    Args:
        name: a model directory, an artifact or a hub id: an encoder.
        target: the directory.
        precisions: which files: `fp32`, `int8`, `q4`.
        overwrite: replace an existing directory.

    Returns:
        The files, each checked in onnxruntime.

    Raises:
        PlmccError: the model is no encoder, a library is missing, or a file computes something
            else.
    """
    check_target("onnx")
    target = free_export(target, overwrite)
    source = load_source(name)
    check_outside(target, Path(name))
    check_encoder(source.model, "onnx")
    check = partial(free_export, target, overwrite)
    with claim(target), replace_directory(target, "config.json", check) as draft:
        return write_hub(source, draft, precisions)


def write_hub(source: Source, folder: Path, precisions: Sequence[str]) -> list[OnnxFile]:
    """Write an encoder into an empty directory; otherwise as `export_hub`. The model is changed."""
    model: Any = source.model
    model.to("cpu").float().eval()
    model.set_attn_implementation("eager")  # fewer operators: no case for rows without tokens
    if model.config.get_text_config().model_type != model.config.model_type:
        model.config = model.config.get_text_config()
    for path, part in list(model.named_modules()):
        if isinstance(part, HardLinear):  # a runtime multiplies weights faster than it builds them
            model.set_submodule(path, part.merged().float())
    module: nn.Module
    module, inputs, shapes = encoder_program(model, "onnx")
    if source.task in EMBEDDING and source.folder and (source.folder / MODULES).is_file():
        module = Embedding(model, source.pooling).eval()
    beside = folder / "onnx"
    beside.mkdir()
    _export(module, inputs, shapes, beside / FILES["fp32"], type(model).__name__)
    found = [
        _made(beside, precision, module, model) for precision in FILES if precision in precisions
    ]
    if "fp32" not in precisions:
        for file in beside.glob(f"{FILES['fp32']}*"):
            file.unlink()
    _write_others(source, folder)
    return found


def _made(folder: Path, precision: str, module: nn.Module, model: PreTrainedModel) -> OnnxFile:
    """Write the file of a precision from that in float32, and check it."""
    whole, file = folder / FILES["fp32"], folder / FILES[precision]
    if precision == "q4":
        _q4(whole, file)
    if precision == "int8":
        _int8(whole, file, ["MatMul", "Gemm", "Gather"])
        try:
            found = _checked(module, model, file, precision)
        except PlmccError:
            found = None
        if found is None or found.cosine < _SIMILAR[precision]:  # tables stay as they are
            for part in folder.glob(f"{file.name}*"):
                part.unlink()
            _int8(whole, file, ["MatMul", "Gemm"])
    return _checked(module, model, file, precision)


def _export(
    module: nn.Module, inputs: dict[str, Tensor], shapes: Values, file: Path, name: str
) -> None:
    from plmcc.export.onnx import write_onnx

    try:
        with torch.no_grad():
            write_onnx(module, inputs, shapes, file, False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as problem:
        message = f"{name} cannot be exported to onnx: {first_line(problem)}"
        raise error("PLM401", message) from problem


def _large(file: Path) -> bool:
    return file.with_name(f"{file.name}.data").exists()


def _int8(file: Path, made: Path, operators: list[str]) -> None:
    """Weights in 8 bits, of linear layers and tables; activations as they come."""
    quantization = importlib.import_module("onnxruntime.quantization")
    options = {"per_channel": True, "reduce_range": True}  # as `plmcc.export.onnx` explains
    options |= {"use_external_data_format": _large(file)}
    logging.disable(logging.WARNING)  # it recommends a step that makes no difference here
    try:
        quantization.quantize_dynamic(file, made, op_types_to_quantize=operators, **options)
    finally:
        logging.disable(logging.NOTSET)


def _q4(file: Path, made: Path) -> None:
    """Weights of linear layers in 4 bits, in blocks with a scale."""
    nbits = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    onnx = importlib.import_module("onnx")
    given = onnx.load(str(file))
    quantizer = nbits.MatMulNBitsQuantizer(given, block_size=_BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made), _large(file))


def _checked(module: nn.Module, model: PreTrainedModel, file: Path, precision: str) -> OnnxFile:
    """Run a file, and compare it with the model.

    Raises:
        PlmccError: it does not run, or computes something else.
    """
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    cosines, largest = [], 0.0
    names = [port.name for port in session.get_outputs()]
    asked = [port.name for port in session.get_inputs()]
    limit = longest(model) or _SHAPES[-1][1]
    for seed, (batch, length) in enumerate(_SHAPES):
        given = example(model, batch, min(length, limit), seed)
        with torch.no_grad():
            expected = module(**given)
        values = session.run(names, {n: given[n].numpy() for n in asked})
        mask_BL = given["attention_mask"].bool()
        for name, value in zip(names, values, strict=True):
            mine, theirs = torch.from_numpy(np.array(value)), expected[name]
            if mine.shape[:2] == mask_BL.shape and mine.dim() == 3:
                mine, theirs = mine[mask_BL], theirs[mask_BL]
            difference = relative_difference(mine, theirs)
            largest = difference if difference != difference else max(largest, difference)
            cosines.append(float(nn.functional.cosine_similarity(mine, theirs, dim=-1).mean()))
    cosine = float(np.mean(cosines))
    bad = not largest <= _BOUND if precision == "fp32" else not cosine >= _LEAST
    if bad:
        message = f"{file.name} computes something else than the model"
        others = " ".join(f"--precision {name}" for name in FILES if name != precision)
        got, hint = f"a cosine of {cosine:.4f}", f"leave it out: {others}"
        raise error("PLM402", message, "onnxruntime", got=got, hint=hint)
    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
    low = cosine < _SIMILAR[precision]
    return OnnxFile(f"onnx/{file.name}", size, round(cosine, 6), low)


def _write_others(source: Source, folder: Path) -> None:
    """Write configuration and tokenizer; the configuration is that of the architecture, without
    what plmcc has to say of tensors that are no longer there."""
    values = source.model.config.to_dict()
    base = values.pop("base_model_type", None)
    values["model_type"] = base or values["model_type"]
    for name in ("quantization_config", "plmcc"):
        values.pop(name, None)
    values["architectures"] = [type(source.model).__name__]
    text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
        _cut_as_the_model(folder / "tokenizer.json", source)
    if source.folder is not None:
        copy_other_files(source.other_files(), source.folder, folder)
    require_plmcc(folder, False)
    mark_export(folder, "hub")


def _cut_as_the_model(file: Path, source: Source) -> None:
    """Let a tokenizer alone cut and pad texts as the model's own library does: to the length that
    it reads, and to the longest of a batch."""
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    longest_read = source.max_length(_LONGEST)
    if longest_read < _LONGEST:
        cut = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
        values["truncation"] = cut | {"max_length": longest_read}
    if values.get("padding"):
        values["padding"]["strategy"] = "BatchLongest"
    file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
