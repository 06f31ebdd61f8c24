"""Results of `plmcc shrink` as they are served: int8 ONNX files in onnxruntime, with tokenizer and
configuration beside them, and their time beside the float32 file of the original."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from plmcc.diagnostics import PlmccError, error
from plmcc.evaluation.onnx_files import running, speeds
from plmcc.experiments.goal import Goal
from plmcc.export.encoder import check_encoder
from plmcc.export.hub import FILES, export_hub, write_hub
from plmcc.export.targets import NEEDED, check_target
from plmcc.models.source import Source, is_vectors, load_source
from plmcc.pipeline.judge import Judge
from plmcc.recipe.load import Recipe

Runtime = Literal["auto", "torch", "onnx"]
_INT8 = f"onnx/{FILES['int8']}"


def runtime_of(asked: Runtime, goal: Goal, source: Source) -> Runtime:
    """Return where results will run: with a limit of speed, encoders in onnxruntime.

    Raises:
        PlmccError: onnxruntime is asked for, and the model or the installation does not allow it.
    """
    if asked == "torch" or (asked == "auto" and not goal.asks("speed")):
        return "torch"
    try:
        if is_vectors(Path(source.name)):
            message, hint = "word vectors are looked up, and not run", "use `--runtime torch`"
            raise error("PLM502", message, got=asked, hint=hint)
        check_encoder(source.model, "onnx")
        if asked == "onnx":
            check_target("onnx")
    except PlmccError as problem:
        if asked == "auto":
            return "torch"
        raise PlmccError(*(replace(d, location="--runtime") for d in problem.diagnostics)) from None
    return "onnx" if all(find_spec(name) for name in NEEDED["onnx"]) else "torch"


def unfit(recipe: Recipe) -> str:
    """Why a recipe is not for onnxruntime; empty where it is."""
    if "'int4'" in str(recipe.effective()):
        return "onnxruntime computes in 8 bits, as the recipe with int8"
    if recipe.lower is not None and recipe.lower.quantize:
        return "its file is that of the recipe without `lower.quantize`"
    return ""


@dataclass(frozen=True)
class Served:
    """The files of one model and its results."""

    model: str
    """The original."""
    folder: Path
    """Where its file goes."""

    @cached_property
    def _original(self) -> Path:
        folder = self.folder / "original"
        folder.mkdir()
        write_hub(load_source(self.model), folder, ("fp32",))
        return folder / "onnx" / FILES["fp32"]

    def trial(self, source: Source) -> dict[str, float]:
        """Export a result in memory, which this changes; return its bytes and its speed."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            write_hub(source, Path(name), ("int8",))
            return self._measured(Path(name), source)

    def final(self, artifact: Path, target: Path, recipe: Recipe) -> dict[str, float]:
        """Export an artifact; return bytes, speed and quality of the file.

        Args:
            artifact: the result.
            target: the directory of the export; what is there is replaced.
            recipe: what it was made by, with the metric first in `evaluate`.
        """
        export_hub(str(artifact), target, precisions=("int8",), overwrite=target.exists())
        source = load_source(artifact)
        found = self._measured(target, source)
        judge = Judge.of(recipe.model_copy(update={"evaluate": recipe.evaluate[:1]}), source, None)
        served = replace(source, model=running(source.model, target / _INT8))
        [quality] = judge.metrics(served, load_source(self.model))
        return found | {"quality": quality}

    def _measured(self, folder: Path, source: Source) -> dict[str, float]:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found = speeds(self._original, folder / _INT8, source.model)
        return {"size": float(size), "speed": min(found.values())}
