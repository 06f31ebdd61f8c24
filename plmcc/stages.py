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
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from plmcc import checkpoints, rewrite
from plmcc.api import Bars, Points
from plmcc.diagnostics import error
from plmcc.pictures import Pictured
from plmcc.provenance import code_digest, model_digest, rows_digest, versions
from plmcc.recipe import Recipe
from plmcc.source import Source, write_json
from plmcc.tensors import load_tensors, save_tensors, writing
from plmcc.train import Lesson

if TYPE_CHECKING:
    from plmcc.result import Result

_DONE, _TENSORS = "stage.json", "model.safetensors"
_KEPT = ("sites", "misses", "training", "seconds", "digests")
_PICTURE: TypeAdapter[Bars | Points] = TypeAdapter(Bars | Points)


@dataclass(frozen=True)
class Stages:
    """The stages of one run: where they are kept, and the digests that name them."""

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
            for record in result.records:
                hard = rewrite.build(record, result.model.device)
                rewrite.splice(result.model, record.paths, record.roles, hard)
            load_tensors(result.model, folder / _TENSORS)
            for name in _KEPT:
                setattr(result, name, values[name])
            result.pictures = [
                Pictured(stage, path, _PICTURE.validate_python(picture))
                for stage, path, picture in values["pictures"]
            ]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as problem:
            cure = "begin again: add --overwrite and leave out --resume"
            message = f"what this stage has written cannot be read: {problem}"
            raise error("PLM503", message, str(folder), cure=cure) from None

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
        draft = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.folder))
        try:
            save_tensors(result.model, draft / _TENSORS)
            pictures = [(p.stage, p.path, _PICTURE.dump_python(p.picture)) for p in result.pictures]
            values: dict[str, Any] = {name: getattr(result, name) for name in _KEPT}
            values |= {"records": [one.to_json() for one in result.records], "pictures": pictures}
            write_json(draft / _DONE, values)
            draft.rename(self.folder / self.keys[index])
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def training(self, index: int) -> Path:
        """Return the folder for the checkpoints of a stage."""
        return self.folder / f"{self.keys[index]}.training"


def folder_of(output: Path) -> Path:
    """Return where the stages of a run with this output are kept."""
    return output.parent / f".{output.name}.stages"


def prepare(output: Path, resume: bool, overwrite: bool) -> None:
    """Empty the folder of the stages, unless they are to be used again.

    Raises:
        PlmccError: an earlier run has left its work, and nothing says what to do with its work.
    """
    folder = folder_of(output)
    for left in (
        *output.parent.glob(f".{output.name}.unfinished-*"),
        *folder.glob(".unfinished-*"),
    ):
        shutil.rmtree(left, ignore_errors=True)  # drafts of a run that was killed
    if resume or not folder.exists():
        return
    if not overwrite and _worth_keeping(folder):
        cure = "add --resume to go on with it, or --overwrite to begin again"
        raise error("PLM503", "here is the work of an earlier run", str(folder),
                    cure=cure)  # fmt: skip
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
    if len(recipe.steps()) == 1:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for left in folder.glob("*.training"):
        shutil.rmtree(left, ignore_errors=True)


def keys(recipe: Recipe, source: Source, lessons: Mapping[str, Lesson]) -> tuple[str, ...]:
    """Return the digest of each stage.

    Args:
        recipe: its stages up to one decide on that one.
        source: the model as it is before the first stage.
        lessons: what stages train on, with their teachers, by the stages' names.
    """
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
    teachers = {id(m): m for lesson in lessons.values() if (m := lesson.teacher) is not None}
    taught = {key: model_digest(teacher) for key, teacher in teachers.items()}
    digests = {name: _lesson_digest(one, taught) for name, one in lessons.items()}
    for index, stage in enumerate(steps):
        own = stage.model_dump(mode="json", exclude={"train": {"data"}})  # it counts as encoded
        so_far.update(json.dumps(own, sort_keys=True).encode())
        # Passes of a stage that does not train are shown the data of the next one that does.
        shown = next((digests[s.name] for s in steps[index:] if s.name in digests), "")
        so_far.update(shown.encode())
        found.append(so_far.hexdigest()[:32])
    return tuple(found)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _lesson_digest(lesson: Lesson, teachers: Mapping[int, str]) -> str:
    """Of the rows, and of the teacher; digests of teachers by the id of the model."""
    rows = [rows_digest(one) for one in (lesson.train, lesson.eval) if one is not None]
    return " ".join([teachers.get(id(lesson.teacher), ""), *rows])
