"""What would have to be equal to get the same artifact again: digests of recipe, original, data and
code, versions, seed and machine."""

from __future__ import annotations

import hashlib
import importlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor, nn

from plmcc.artifact import lock as seal
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.tensors import unique_tensors
from plmcc.catalog import registry as catalog
from plmcc.catalog.origin import origin_of
from plmcc.data.rows import SYNTHETIC, data_files
from plmcc.diagnostics import PlmccError, error
from plmcc.models.source import Source, folder_digests, is_vectors
from plmcc.recipe.load import Recipe, Scratch, TrainTokenizer
from plmcc.utils.files import path_from
from plmcc.utils.types import Values


def lock(
    recipe: Recipe,
    source: Source,
    read: FilesRead,
    stages: list[Values],
    metrics: list[Values],
) -> dict[str, object]:
    """Return all of it, with the digests of what each stage was given and has made."""
    passes = {catalog.name_of(type(p)) for stage in recipe.steps() for p in stage.passes}
    base = {"name": source.name, "new": source.scratch, "files": base_digests(source)}
    return {
        "recipe": recipe.digest(),
        "seed": recipe.seed,
        "base_model": base,
        "data": read.data,
        "models": read.models,
        "code": code_digest(recipe),
        "passes": {name: _made_by(name) for name in sorted(passes)},
        "stages": stages,
        "metrics": metrics,
        "versions": versions(),
        "hardware": hardware(),
    }


def base_digests(source: Source) -> dict[str, str]:
    """Return the digests of the files that an original was read from, by name."""
    file = Path(source.name)
    return folder_digests(file if is_vectors(file) else source.folder)


def data_digests(recipe: Recipe, base: Path | None = None) -> dict[str, dict[str, str]]:
    """Return the digests of the files that each name in a recipe stands for, by path (relative ones
    as from `base`); none where there are no such files, and for data sets of the hub."""
    return {
        name: {path_from(base, file, name): seal.digest(file) for file in _existing(name, base)}
        for name in named_data(recipe)
    }


def model_digests(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return the digests of the files of each local directory that a recipe names as a model beside
    the original: a teacher, a tokenizer."""
    return {
        name: {file.name: seal.digest(file) for file in sorted(folder.iterdir()) if file.is_file()}
        for name in named_models(recipe)
        if (folder := Path(name).expanduser()).is_dir()
    }


@dataclass(frozen=True)
class FilesRead:
    """The files that a recipe names, as they were when its run began."""

    data: dict[str, dict[str, str]] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    _states: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, base: Path | None) -> FilesRead:
        """Take the digests; called before anything is read."""
        files = [file for name in named_data(recipe) for file in _existing(name, base)]
        states = {file: _state(file) for file in files}
        return cls(data_digests(recipe, base), model_digests(recipe), states)

    def check(self) -> None:
        """Refuse a result of data that has changed while it was made.

        Raises:
            PlmccError: a file is not what it was.
        """
        known = {digest for files in self.data.values() for digest in files.values()}
        for file, state in self._states.items():
            if not file.is_file() or (_state(file) != state and seal.digest(file) not in known):
                message = "the data has changed while the recipe ran"
                raise error("PLM402", message, str(file), hint="apply the recipe again")


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def named_models(recipe: Recipe) -> list[str]:
    """Return what a recipe names as a model beside the original: teachers, and the tokenizer of a
    new model."""
    trained = [stage.train for stage in recipe.steps() if stage.train]
    named = [one.distill.teacher for one in trained if one.distill]
    if isinstance(recipe.model, Scratch) and isinstance(recipe.model.tokenizer, str):
        named.append(recipe.model.tokenizer)
    return [name for name in dict.fromkeys(named) if name != "original"]


def named_data(recipe: Recipe) -> list[str]:
    """Return what a recipe names as data: files, globs, data sets of the hub."""
    named: list[str | list[str]] = [
        s
        for stage in recipe.steps()
        if stage.train
        for data in (stage.train.data,)
        for s in (data.train, data.target, data.eval, data.eval_target)
        if s
    ]
    named += [s for stage in recipe.steps() for chosen in stage.passes for s in chosen.reads()]
    asked_for = recipe.calibration()
    named += [s for s in (asked_for.data, asked_for.target) if s] if asked_for else []
    named += [s for asked in recipe.evaluate for s in (asked.data, asked.target) if s]
    if isinstance(recipe.model, Scratch) and isinstance(recipe.model.tokenizer, TrainTokenizer):
        named.append(recipe.model.tokenizer.train)
    flat = [one for name in named for one in ([name] if isinstance(name, str) else name)]
    return [name for name in dict.fromkeys(flat) if name != SYNTHETIC]


def _existing(name: str, base: Path | None) -> list[Path]:
    try:
        return data_files(name, base)
    except PlmccError:
        return []


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of all tensors."""
    found = hashlib.sha256()
    for name, value in unique_tensors(model).items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value))
    return found.hexdigest()


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of encoded rows: what `datasets` calls a fingerprint is random for data in
    memory."""
    sink = _Sink()
    table = rows.flatten_indices().data.table.replace_schema_metadata(None).combine_chunks()
    with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return sink.found.hexdigest()


class _Sink(io.RawIOBase):
    """A file that keeps only the digest of what is written to it."""

    def __init__(self) -> None:
        self.found = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.found.update(data)
        return len(data)


def code_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of the compiler's code, and of passes that are not part of it."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    shipped = Path(importlib.import_module("plmcc.passes").__path__[0])
    for folder in (root, shipped):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.name.encode())
            found.update(file.read_bytes())
    names = {catalog.name_of(type(p)) for stage in recipe.steps() for p in stage.passes}
    for origin in filter(None, map(origin_of, sorted(names))):
        found.update(f"{origin} {origin.digest}".encode())
    return found.hexdigest()


def _made_by(name: str) -> object:
    origin = origin_of(name)
    return catalog.OWN if origin is None else origin.to_json()
