"""What stages have made, on disk before the next begins: a run that was cut off goes on.

Beside the output `DIR` stands `.DIR.stages`. In it a finished stage is a folder named by the digest
of all that decides on it: the recipe up to it, the model's weights, the encoded data, teachers,
code and versions. A change of the third stage therefore finds the first two again, and nothing of
what has changed. `<digest>.training` holds the checkpoints of a stage that trains.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from plmcc import rewrite
from plmcc.api import Bars, Points
from plmcc.artifact.environment import versions
from plmcc.artifact.tensors import load_tensors, save_tensors, writing
from plmcc.diagnostics import error
from plmcc.ir.program import Program
from plmcc.pipeline.datasets import StageData
from plmcc.recipe.load import Recipe
from plmcc.report.charts import SiteChart
from plmcc.report.provenance import code_digest, model_digest, rows_digest
from plmcc.training import checkpoints
from plmcc.training.loop import TrainingData
from plmcc.utils.files import write_json
from plmcc.utils.outputs import STAGES, remove_drafts, replace_directory, workplace
from plmcc.utils.types import Values

if TYPE_CHECKING:
    from plmcc.report.result import Result

_DONE, _TENSORS = "stage.json", "model.safetensors"
_KEPT = ("sites", "misses", "training", "seconds", "digests")
_CHART: TypeAdapter[Bars | Points] = TypeAdapter(Bars | Points)


@dataclass(frozen=True)
class StageCache:
    """The finished stages of one run on disk, and the digests that name them."""

    folder: Path
    keys: tuple[str, ...]

    def restore(self, result: Result) -> int:
        """Bring a model to where the last finished stage has left it; return how many stages that
        is.

        The model must be as it was when the first stage began.

        Raises:
            PlmccError: what is there is damaged.
        """
        for done in range(len(self.keys), 0, -1):
            if (self.folder / self.keys[done - 1] / _DONE).exists():
                self._read(self.folder / self.keys[done - 1], result)
                return done
        return 0

    def _read(self, folder: Path, result: Result) -> None:
        try:
            values = json.loads((folder / _DONE).read_text("utf-8"))
            result.records = [rewrite.Record.from_json(one) for one in values["records"]]
            program = Program(result.model)
            for record in result.records:
                hard = rewrite.build(record, result.model.device)
                rewrite.splice(program, record.paths, record.roles, hard)
            load_tensors(result.model, folder / _TENSORS)
            for name in _KEPT:
                setattr(result, name, values[name])
            result.charts = [
                SiteChart(stage, path, _CHART.validate_python(chart))
                for stage, path, chart in values["charts"]
            ]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as problem:
            hint = "start again with --overwrite instead of --resume"
            message = f"the saved result of this stage cannot be read: {problem}"
            raise error("PLM503", message, str(folder), hint=hint) from None

    def write(self, index: int, result: Result) -> None:
        """Write what a stage has made, and remove its checkpoints.

        Raises:
            PlmccError: it cannot be written; nothing that looks finished is left.
        """
        with writing("what the stage has made", self.folder):
            self._write(index, result)
        shutil.rmtree(self.training(index), ignore_errors=True)

    def _write(self, index: int, result: Result) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_directory(self.folder / self.keys[index]) as draft:
            save_tensors(result.model, draft / _TENSORS)
            charts = [(p.stage, p.path, _CHART.dump_python(p.chart)) for p in result.charts]
            values: Values = {name: getattr(result, name) for name in _KEPT}
            values |= {"records": [one.to_json() for one in result.records], "charts": charts}
            write_json(draft / _DONE, values)

    def training(self, index: int) -> Path:
        """Return the folder for the checkpoints of a stage."""
        return self.folder / f"{self.keys[index]}.training"


def folder_of(output: Path) -> Path:
    """Return where the stages of a run with this output are kept."""
    place = workplace(output)
    return place / (STAGES if place == output else f".{output.name}.stages")


def prepare(output: Path, resume: bool, overwrite: bool) -> None:
    """Empty the folder of the stages, unless they are to be used again.

    Raises:
        PlmccError: an earlier run has left its work, and nothing says what to do with its work.
    """
    folder = folder_of(output)
    remove_drafts(folder)
    if resume or not folder.exists():
        return
    if not overwrite and _worth_keeping(folder):
        hint = "add --resume to continue it, or --overwrite to start again"
        raise error("PLM503", "there is unfinished work of an earlier run", str(folder), hint=hint)
    shutil.rmtree(folder)


def _worth_keeping(folder: Path) -> bool:
    """Say whether there is a finished stage, or a whole checkpoint of one."""
    kept = (*folder.glob(f"*/{_DONE}"), *folder.glob(f"*.training/*/{checkpoints.COMPLETE}"))
    return bool(kept)


def tidy(folder: Path) -> None:
    """Leave nothing of a run that failed before it had anything to keep."""
    if folder.exists() and not _worth_keeping(folder):
        shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path, recipe: Recipe) -> None:
    """Clean up when the artifact is there: a single stage is nothing that it does not hold."""
    if len(recipe.steps()) == 1 or folder.name == STAGES:  # there it would be in the artifact
        shutil.rmtree(folder, ignore_errors=True)
        return
    for left in folder.glob("*.training"):
        shutil.rmtree(left, ignore_errors=True)


def stage_keys(recipe: Recipe, data: StageData) -> tuple[str, ...]:
    """Return the digest of each stage: of everything up to it that decides on its result.

    Args:
        recipe: the stages.
        data: the model before the first stage, and the training data with teachers.
    """
    source, datasets = data.source, data.training
    so_far = hashlib.sha256(
        json.dumps(
            {
                "model": model_digest(source.model),
                "task": source.task,
                "seed": recipe.seed,
                "code": code_digest(recipe),
                "versions": versions(),
                "machine": [platform.machine(), torch.get_num_threads(), _device()],
            }
        ).encode()
    )
    steps, found = recipe.steps(), []
    teachers = {id(m): m for one in datasets.values() if (m := one.teacher) is not None}
    taught = {key: model_digest(teacher) for key, teacher in teachers.items()}
    digests = {name: _data_digest(one, taught) for name, one in datasets.items()}
    measured = ""
    asked = recipe.calibration()
    if asked is not None and data.calibrated_on is not None:
        measured = f"{asked.rows} {_data_digest(data.calibrated_on, {})}"
    for index, stage in enumerate(steps):
        own = stage.model_dump(mode="json", exclude={"train": {"data"}})  # it counts as encoded
        so_far.update(json.dumps(own, sort_keys=True).encode())
        # Passes of a stage that does not train are shown the data of the next one that does.
        shown = next((digests[s.name] for s in steps[index:] if s.name in digests), "")
        so_far.update(shown.encode())
        so_far.update(measured.encode())
        found.append(so_far.hexdigest()[:32])
    return tuple(found)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _data_digest(data: TrainingData, teachers: Mapping[int, str]) -> str:
    """Of the rows, and of the teacher; digests of teachers by the id of the model."""
    rows = [rows_digest(one) for one in (data.train, data.eval) if one is not None]
    return " ".join([teachers.get(id(data.teacher), ""), *rows])
