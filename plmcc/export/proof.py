"""The proof that an exported encoder is the model: a fresh process runs the program on recorded
probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.artifact.verify import PROBES, answer, fresh
from plmcc.diagnostics import error
from plmcc.export.encoder import OUTPUTS, Forward, example, longest
from plmcc.export.exported import Exported
from plmcc.export.manifest import Manifest
from plmcc.utils.numerics import relative_difference

_SHAPES = ((2, 8), (1, 1), (5, 17), (1, 512))
"""Batch and length of the probes, cut where the model cannot read so much."""
_BOUND, _ROUGH_BOUND = 1e-4, 0.2
"""How far outputs may be from the model's, relative to their scale, and those of rounded layers."""


@torch.no_grad()
def record(model: PreTrainedModel, folder: Path, base: Path | None) -> None:
    """Write inputs, and what the model returns for them, into an export.

    Args:
        model: what is exported, before any rounding.
        folder: the export.
        base: the model's directory: the probes that an artifact holds are taken as they are.
    """
    stored: dict[str, Tensor] = {}
    limit = longest(model) or _SHAPES[-1][1]
    for index, (batch, length) in enumerate(_SHAPES):
        inputs = example(model, batch, min(length, limit))
        outputs = _masked(Forward(model)(**inputs), inputs["attention_mask"])
        found = inputs | {f"output.{name}": value for name, value in outputs.items()}
        if index == 0 and base is not None and (base / PROBES).exists():
            found = _recorded(base / PROBES, next(iter(outputs)))
        stored |= {f"{index}.{name}": value.cpu().contiguous() for name, value in found.items()}
    save_file(stored, folder / PROBES)
    (folder / PROBES).chmod(0o644)  # safetensors writes files that only their owner can read


def _recorded(file: Path, output: str) -> dict[str, Tensor]:
    names = {"output.output": f"output.{output}"}
    values = {names.get(n, n.removeprefix("input.")): v for n, v in load_file(file).items()}
    return {
        n: v for n, v in values.items() if n in (*names.values(), "input_ids", "attention_mask")
    }


def _masked(outputs: dict[str, Tensor], mask_BL: Tensor) -> dict[str, Tensor]:
    """The outputs, 0 at padding: runtimes differ there, and nobody reads it."""
    return {
        name: value * mask_BL.view(*mask_BL.shape, *(1,) * (value.dim() - 2))
        if value.shape[:2] == mask_BL.shape
        else value
        for name, value in outputs.items()
    }


def compare(folder: Path) -> float:
    """Run an export on its probes; return the largest difference, relative to the outputs' scale.

    Raises:
        PlmccError: the export cannot be opened.
    """
    model, stored = Exported(folder), load_file(folder / PROBES)
    largest = 0.0
    for index in {name.partition(".")[0] for name in stored}:
        probe = {n.partition(".")[2]: v for n, v in stored.items() if n.startswith(f"{index}.")}
        expected = {n: probe.pop(f"output.{n}") for n in OUTPUTS if f"output.{n}" in probe}
        expected = _masked(expected, probe["attention_mask"])
        found = _masked(model(**probe), probe["attention_mask"])
        for name, value in expected.items():
            difference = relative_difference(found[name], value)
            largest = difference if difference != difference else max(largest, difference)
    return largest


def prove(folder: Path, rough: bool) -> Manifest:
    """Compare an export in a fresh process, and write the difference into its manifest.

    Args:
        folder: a complete export.
        rough: linear layers, or what they are called with, are quantized, or the model has 16 bits.

    Raises:
        PlmccError: the program does not run there, or computes something else than the model.
    """
    difference = fresh("plmcc.export.proof", folder, "cannot run the export")
    bound = _ROUGH_BOUND if rough else _BOUND
    if not difference <= bound:
        message = f"the program differs by {difference:.3g} of its scale from the model"
        raise error("PLM402", message, folder.name, allowed=f"at most {bound:g}")
    manifest = replace(Manifest.read(folder), difference=difference)
    manifest.write(folder)
    return manifest


if __name__ == "__main__":
    answer(compare)
