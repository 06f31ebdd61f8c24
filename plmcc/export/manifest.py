"""`manifest.json`: what an export directory holds, what it was made from, and where it runs.

Nothing here imports transformers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from plmcc.artifact.lock import digest
from plmcc.diagnostics import error
from plmcc.utils.files import read_json
from plmcc.utils.outputs import free
from plmcc.utils.types import Values

MANIFEST = "manifest.json"
LAYOUT = "plmcc_export.json"
"""What marks an export that plmcc does not run itself."""
FORMAT = 4
_MARK = "plmcc_export"
_PROGRAMS = (".pt2", ".onnx", ".pte", ".so", ".dll", ".dylib")
_REMEMBERED = "~/.cache/plmcc/exports"
"""An empty file for each manifest that this user has written, named by its SHA-256."""
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs the code of those before it


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of the programs beside it."""

    kind: Literal["encoder", "translation"]
    target: str
    name: str
    architecture: str
    source: dict[str, str]
    """SHA-256 of weights and config of what was exported; empty for a model made in Python."""
    inputs: list[Values]
    """`name`, `dtype`, `shape` (numbers, or names of `dimensions`), and how many `values` there
    are, from 0 on."""
    outputs: list[Values]
    """`name`, `dtype` and `shape`, in the order of the program."""
    dimensions: dict[str, list[int | None]]
    """The smallest and the largest size of each dimension that is free; None is no limit."""
    int8: bool
    """Whether linear layers were rounded for the export."""
    device: str
    cpu: str
    """What `.pt2` files need of the processor, in torch's words."""
    versions: dict[str, str]
    difference: float | None = None
    """Largest difference of the outputs on the probes, relative to their scale."""
    files: dict[str, str] | None = None
    """SHA-256 of the other files."""
    translation: Values | None = None
    """Translation: `shapes` of the self-attention caches (heads and width), candidates of each
    `step-N.pt2` (`steps`), and the default `search` (`GenerationSettings`)."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the model can read."""
        return int(self.inputs[0]["values"])

    @property
    def positions(self) -> int | None:
        """How many tokens of a text the model can read (and write), if there is a limit."""
        return self.dimensions["length"][1]

    def write(self, folder: Path) -> None:
        """Write it into a folder, with the digests of the files that are there."""
        found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
        files = {file.relative_to(folder).as_posix(): digest(file) for file in found}
        values = {_MARK: FORMAT} | asdict(self) | {"files": files}
        (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _remember(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            PlmccError: there is none, or it cannot be understood.
        """
        location = str(folder / MANIFEST)
        try:
            values = read_json(folder / MANIFEST)
        except FileNotFoundError:
            hint = "make one with `plmcc export`"
            raise error("PLM401", "this is not an export directory", location, hint=hint) from None
        except (OSError, ValueError) as problem:
            raise error("PLM401", f"it cannot be read: {problem}", location) from None
        hint = "export the model again"
        known = {field.name for field in fields(cls)}
        if (
            not isinstance(values, dict)
            or values.pop(_MARK, None) != FORMAT
            or set(values) != known
        ):
            raise error("PLM401", "another version of plmcc wrote this", location, hint=hint)
        try:
            made: Manifest = TypeAdapter(cls).validate_python(values)
        except ValidationError as problem:
            first = problem.errors()[0]
            place = f"{location}: {'.'.join(map(str, first['loc']))}"
            raise error("PLM401", f"it makes no sense: {first['msg']}", place, hint=hint) from None
        made.check_plain(location)
        return made

    def check_plain(self, location: str) -> None:
        """Refuse names of files outside of the directory, and inputs without what is read of them.

        Raises:
            PlmccError: there are such.
        """
        names = [Path(name) for name in self.files or {}]
        whole = {
            "files": not any(name.is_absolute() or ".." in name.parts for name in names),
            "inputs": self.inputs and "values" in self.inputs[0],
            "inputs, outputs": all(
                {"name", "dtype", "shape"} <= port.keys() for port in self.inputs + self.outputs
            ),
            "dimensions": "length" in self.dimensions
            and all(len(limits) == 2 for limits in self.dimensions.values()),
            "versions": "torch" in self.versions,
            "translation": self.kind == "encoder" or _is_search(self.translation or {}),
        }
        for key, right in whole.items():
            if not right:
                hint = "export the model again"
                raise error("PLM401", "it makes no sense", f"{location}: {key}", hint=hint)

    def check(self, folder: Path, trust: bool = False) -> None:
        """Refuse programs that were changed, that this machine or torch cannot run, or that are
        native code which this user has not compiled.

        Args:
            folder: the directory.
            trust: run native code from elsewhere.

        Raises:
            PlmccError: they were, or it cannot; or there are programs that the manifest does not
                name.
        """
        if self.target == "aoti":
            self._check_machine(folder)
        self._check_files(folder)
        if self.target == "aoti" and not trust and not _is_remembered(folder):
            message = "its programs are native code, and were not compiled here by you"
            hint = "export the model here; if you trust who made them, add --trust-programs (in "
            hint += "Python, `trust_programs=True`)"
            raise error("PLM402", message, str(folder), hint=hint)

    def _check_files(self, folder: Path) -> None:
        files = self.files if isinstance(self.files, dict) else {}
        there = (p for p in folder.rglob("*") if p.suffix in _PROGRAMS and p.is_file())
        for path in sorted(p.relative_to(folder).as_posix() for p in there):
            if path not in files:
                message, hint = "the manifest does not name this program", "export the model again"
                raise error("PLM402", message, str(folder / path), hint=hint)
        for name, expected in files.items():
            if Path(name).suffix not in _PROGRAMS:
                continue
            hint = "export the model again"
            if not (folder / name).is_file():
                message = "a program of the export is missing"
                raise error("PLM402", message, str(folder / name), hint=hint)
            if digest(folder / name) != expected:
                message = "the file was changed after it was written"
                raise error("PLM402", message, str(folder / name), hint=hint)

    def _check_machine(self, folder: Path) -> None:
        hint = "export the model here"
        if _minor(self.versions["torch"]) != _minor(torch.__version__):
            message = "the programs were compiled by another version of torch"
            given, allowed = self.versions["torch"], torch.__version__
            raise error("PLM402", message, str(folder), got=given, allowed=allowed, hint=hint)
        here = torch.backends.cpu.get_cpu_capability()
        if self.cpu != here and not _runs(self.cpu, here):
            message = "the programs were compiled for another processor"
            raise error("PLM402", message, str(folder), got=self.cpu, allowed=here, hint=hint)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise error("PLM402", "the programs need a GPU", str(folder), hint=hint)


def _is_search(values: Values) -> bool:
    steps, shapes, search = (values.get(key) for key in ("steps", "shapes", "search"))
    return (
        isinstance(steps, (list, dict))
        and all(type(size) is int for size in steps)  # a part of the name of a program
        and isinstance(shapes, list)
        and all(isinstance(one, list) and len(one) == 2 for one in shapes)
        and isinstance(search, dict)
    )


def is_export(folder: Path) -> bool:
    """Say whether a directory holds programs that plmcc runs, of any version. With a config.json it
    is a model, whatever else is in it."""
    return _is_marked(folder / MANIFEST) and not (folder / "config.json").exists()


def _remember(folder: Path) -> None:
    """Note that this user has written a manifest, which has the digests of its programs."""
    note = _note(folder)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError:  # no home to write to: the programs run with `trust_programs`
        return


def _is_remembered(folder: Path) -> bool:
    return _note(folder).is_file()


def _note(folder: Path) -> Path:
    return Path(_REMEMBERED).expanduser() / digest(folder / MANIFEST)


def mark_export(folder: Path, layout: str) -> None:
    """Say of a directory that others read that it is an export, so that it may be replaced."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    values = {_MARK: FORMAT, "layout": layout, "files": names}
    (folder / LAYOUT).write_text(json.dumps(values) + "\n", encoding="utf-8")


def free_export(target: Path, overwrite: bool) -> Path:
    """Return the directory of an export if it may be written.

    Raises:
        PlmccError: as `free`; what may be replaced is an earlier export.
    """
    return free(target, overwrite, export_index)


def export_index(folder: Path) -> str | None:
    """Return the name of the file that names those of an export, where a directory is one."""
    if _is_marked(folder / LAYOUT):
        return LAYOUT
    return MANIFEST if is_export(folder) else None


def _is_marked(file: Path) -> bool:
    try:
        values = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and _MARK in values


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _runs(code: str, here: str) -> bool:
    known = code in _CAPABILITIES and here in _CAPABILITIES
    return known and _CAPABILITIES.index(code) <= _CAPABILITIES.index(here)
