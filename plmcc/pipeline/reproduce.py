"""`plmcc reproduce DIR`: run the recipe of an artifact again and compare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file

from plmcc.artifact import lock as seal
from plmcc.artifact.environment import hardware, versions
from plmcc.diagnostics import PlmccError, error
from plmcc.models.source import load_source
from plmcc.pipeline.compiler import apply
from plmcc.recipe.load import Recipe, Scratch, Train, load_recipe
from plmcc.report.provenance import (
    base_digests,
    code_digest,
    data_digests,
    model_digests,
    named_data,
    named_models,
)
from plmcc.report.result import Result
from plmcc.utils.numerics import relative_difference
from plmcc.utils.types import Values

_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Arguments of the Trainer that may be the path of a file."""
_REPORTS = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id")
"""Arguments that send figures elsewhere."""


class _Original(BaseModel):
    name: str
    new: bool
    files: dict[str, str]


class _Stage(BaseModel):
    name: str
    output: str


class _Figure(BaseModel):
    metric: str
    data: str
    after: float


class Lock(BaseModel):
    """What of a lock is compared with the second run."""

    base_model: _Original
    data: dict[str, dict[str, str]]
    models: dict[str, dict[str, str]]
    code: object
    stages: list[_Stage]
    metrics: list[_Figure]
    versions: Values
    hardware: Values
    files: dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A figure, then and now."""

    metric: str
    data: str
    then: float
    now: float


@dataclass(frozen=True)
class Reproduced:
    """What a second run of a recipe gave, beside the first."""

    identical: bool
    """Whether every weight is the same to the bit."""
    difference: float
    """The largest difference of a number in the weight files, relative to its tensor's largest;
    infinite where there are other tensors."""
    stage: str
    """The first stage whose result is another one, or nothing."""
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not as it was: versions, machine, code."""

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)

    def within(self, tolerance: float) -> bool:
        """Say whether it is the same: to the bit, or in every metric."""
        near = [abs(m.then - m.now) <= tolerance for m in self.metrics]
        return self.identical or (bool(near) and all(near))


def reproduce(
    folder: Path,
    output: Path,
    model: str | None = None,
    data_root: Path | None = None,
    *,
    allow_outside: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Reproduced:
    """Run the recipe of an artifact again.

    What it reads is what the lock names, by digest. It writes to `output` and to temporary files
    only: its cache of translations and its logs are left out.

    Args:
        folder: an artifact with its lock.
        output: where the second result is written.
        model: the original, where it is not where it was.
        data_root: the folder that relative paths start at; by default the current one.
        allow_outside: read also what the recipe names by absolute paths or outside of `data_root`,
            and definitions of lm_eval tasks, which may run code.
        log: called with every line for the user.

    Raises:
        PlmccError: the artifact was changed, the original or the data are not what they were, or
            the recipe names files that the lock does not know, or outside of `data_root`.
    """
    seal.check(folder)
    lock = _read(folder)
    recipe = load_recipe(folder / "recipe.yaml", load_torch=True)
    root = (data_root or Path()).resolve()
    name = model or _original(lock, root)
    _refuse([] if allow_outside else [*_outside(recipe, None if model else lock, root)])
    _refuse([*_other_model(lock, recipe, name, model), *_other_files(lock, recipe, root)])
    notes = list(_notes(lock, recipe))
    for note in notes:
        log(f"note: {note}")
    folder, output = folder.resolve(), output.resolve()
    result = _again(recipe, None if lock.base_model.new else name, output, root, log)
    return _compared(folder, lock, output, result, notes)


def _refuse(problems: list[PlmccError]) -> None:
    if problems:
        raise PlmccError(*(one.diagnostics[0] for one in problems))


def _again(
    recipe: Recipe, model: str | None, output: Path, root: Path, log: Callable[[str], None]
) -> Result:
    with tempfile.TemporaryDirectory(prefix="plmcc-reproduce-") as place:
        recipe = _contained(recipe, root, Path(place) / "sequences")
        work = Path(place) / "work"
        work.mkdir()
        with chdir(work):  # relative paths start at `root`, and what is written here goes
            return apply(recipe, model, output, base=root, log=log)


def _read(folder: Path) -> Lock:
    """Return what the lock says.

    Raises:
        PlmccError: it has another form.
    """
    values = seal.read(folder)
    try:
        return Lock.model_validate(values)
    except ValidationError as problem:
        place = ".".join(map(str, problem.errors()[0]["loc"]))
        message = "another version of plmcc wrote this, or it was changed"
        raise error("PLM402", message, str(folder / seal.LOCK), got=place) from None


def _original(lock: Lock, root: Path) -> str:
    name: str = lock.base_model.name
    return str(root / name) if (root / name).exists() else name


def _outside(recipe: Recipe, lock: Lock | None, root: Path) -> Iterator[PlmccError]:
    """Go through the paths of a recipe that are not below a folder. The lock's original is one of
    them, unless the user has named another."""
    hint = "if you trust who made the artifact, add --allow-outside (in Python, `allow_outside`)"
    named = [*named_data(recipe), *named_models(recipe)]
    if lock is not None and not lock.base_model.new:
        named.append(lock.base_model.name)
    for name in dict.fromkeys(named):
        path = Path(name).expanduser()
        if path.is_absolute() or name.startswith("~") or not _is_below(root / path, root):
            message = "the recipe reads a file outside of the directory of the data"
            yield error("PLM502", message, str(root), got=name, hint=hint)
    for asked in recipe.evaluate:
        if asked.tasks:
            message = "definitions of lm_eval tasks may run code"
            yield error("PLM502", message, "evaluate.tasks", got=asked.tasks, hint=hint)
    for stage in recipe.steps():
        for key in _FILES:
            value = stage.train.arguments.get(key) if stage.train else None
            if isinstance(value, str):
                message = f"`{key}` names a file that the lock does not know"
                yield error("PLM502", message, f"stage {stage.name}", got=value, hint=hint)


def _is_below(path: Path, root: Path) -> bool:
    """Say whether a path is in a folder as it is written; links in it are the user's own."""
    return Path(os.path.normpath(path)).is_relative_to(root)


def _other_model(lock: Lock, recipe: Recipe, name: str, given: str | None) -> Iterator[PlmccError]:
    then = lock.base_model.files
    if lock.base_model.new:
        if not isinstance(recipe.model, Scratch):
            message = "the lock says that the model was new, and the recipe does not make one"
            yield error("PLM402", message, str(recipe.model))
        return
    if not then and given is None:
        message = "the lock does not say what the original was"
        yield error("PLM402", message, name, hint="pass the original with --model")
    if not then:
        return
    source = load_source(name, meta=True)
    now = base_digests(source)
    for file in sorted(then.keys() | now.keys()):
        if then.get(file) != now.get(file):
            hint = "pass the original with --model"
            yield error("PLM402", f"{file} of the original has changed", name, hint=hint)


def _other_files(lock: Lock, recipe: Recipe, root: Path) -> Iterator[PlmccError]:
    """Go through the data and models whose files are not those of the lock."""
    with chdir(root):
        data, models = data_digests(recipe), model_digests(recipe)
    hint = "pass the directory of the data with --data-root"
    for name, now in (data | models).items():
        then = (lock.data if name in data else lock.models).get(name)
        if not now and name.startswith("hub:") and not then:
            continue
        if not now:
            yield error("PLM301", "the data does not exist", name, hint=hint)
        elif not then:
            message = "the recipe reads a file whose digest the lock does not have"
            yield error("PLM402", message, name, hint="apply the recipe again instead")
        elif now != then:
            yield error("PLM402", "the data has changed", name, hint=hint)


def _contained(recipe: Recipe, root: Path, cache: Path) -> Recipe:
    """Return the recipe without what would write elsewhere, and with the paths of models below the
    folder of the data."""

    def train(given: Train | None) -> Train | None:
        if given is None:
            return None
        arguments = {key: v for key, v in given.arguments.items() if key not in _REPORTS}
        distill = given.distill
        if distill is not None:
            sequence = distill.sequence and distill.sequence.model_copy(
                update={"cache": str(cache)}
            )
            teacher = _below(root, distill.teacher)
            distill = distill.model_copy(update={"sequence": sequence, "teacher": teacher})
        arguments |= {"report_to": "none"}
        return given.model_copy(update={"arguments": arguments, "distill": distill})

    changed: Values = {"train": train(recipe.train)}
    if recipe.stages is not None:
        changed["stages"] = [
            one.model_copy(update={"train": train(one.train)}) for one in recipe.stages
        ]
    if recipe.lower is not None:
        changed["lower"] = recipe.lower.model_copy(update={"train": train(recipe.lower.train)})
    if isinstance(recipe.model, Scratch) and isinstance(recipe.model.tokenizer, str):
        tokenizer = _below(root, recipe.model.tokenizer)
        changed["model"] = recipe.model.model_copy(update={"tokenizer": tokenizer})
    return recipe.model_copy(update=changed)


def _below(root: Path, name: str) -> str:
    return str(root / name) if name != "original" and (root / name).is_dir() else name


def _notes(lock: Lock, recipe: Recipe) -> Iterator[str]:
    for before, now in ((lock.versions, versions()), (lock.hardware, hardware())):
        for key in sorted(now.keys() | before.keys()):
            then = before.get(key)
            if then != now.get(key):
                yield f"{key} was {then}, and is {now.get(key)}"
    if lock.code != code_digest(recipe):
        yield "the code of plmcc or of a pass has changed"


def _compared(
    folder: Path, lock: Lock, output: Path, result: Result, notes: list[str]
) -> Reproduced:
    names = sorted(file.name for file in folder.glob("model*.safetensors"))
    same = all(
        (output / name).exists() and seal.digest(output / name) == lock.files.get(name)
        for name in names
    )
    pairs = zip(lock.stages, result.digests, strict=False)
    stage = next((then.name for then, now in pairs if then.output != now["output"]), "")
    metrics = [
        Metric(then.metric, then.data, then.after, now["after"])
        for then, now in zip(lock.metrics, result.metrics, strict=False)
    ]
    difference = 0.0 if same else _difference(folder, output, names)
    return Reproduced(same, difference, stage, metrics, notes)


def _difference(folder: Path, output: Path, names: list[str]) -> float:
    found = 0.0
    for name in names:
        if not (output / name).exists():
            return float("inf")
        one, two = load_file(folder / name), load_file(output / name)
        if one.keys() != two.keys():
            return float("inf")
        for key, then in one.items():
            found = max(found, relative_difference(two[key], then))
    return found
