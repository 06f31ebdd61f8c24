"""`plmcc reproduce DIR`: run the recipe of an artifact again and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from plmcc.artifact import lock as seal
from plmcc.artifact.environment import hardware, versions
from plmcc.diagnostics import PlmccError, error
from plmcc.models.source import load_source
from plmcc.pipeline.compiler import apply
from plmcc.recipe.load import Recipe, load_recipe
from plmcc.report.provenance import base_digests, code_digest, data_digests
from plmcc.report.result import Result
from plmcc.utils.numerics import relative_difference
from plmcc.utils.types import Values


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
    base: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Reproduced:
    """Run the recipe of an artifact again.

    Args:
        folder: an artifact with its lock.
        output: where the second result is written.
        model: the original, where it is not where it was.
        base: the folder that relative data paths start at besides the current one.
        log: called with every line for the user.

    Raises:
        PlmccError: the artifact was changed, or the original or the data are not what they were.
    """
    seal.check(folder)
    lock = seal.read(folder)
    recipe = load_recipe(folder / "recipe.yaml", load_torch=True)
    name = model or lock["base_model"]["name"]
    problems = [*_other_model(lock, name), *_other_data(lock, recipe, base)]
    if problems:
        raise PlmccError(*(one.diagnostics[0] for one in problems))
    notes = list(_notes(lock, recipe))
    for note in notes:
        log(f"note: {note}")
    result = apply(recipe, None if lock["base_model"]["new"] else name, output, base=base, log=log)
    return _compared(folder, lock, output, result, notes)


def _other_model(lock: Values, name: str) -> Iterator[PlmccError]:
    then = lock["base_model"]["files"]
    if lock["base_model"]["new"] or not then:
        return
    source = load_source(name, meta=True)
    now = base_digests(source)
    for file in sorted(then.keys() | now.keys()):
        if then.get(file) != now.get(file):
            hint = "pass the original with --model"
            yield error("PLM402", f"{file} of the original has changed", name, hint=hint)


def _other_data(lock: Values, recipe: Recipe, base: Path | None) -> Iterator[PlmccError]:
    now = data_digests(recipe, base)
    for name, then in lock["data"].items():
        hint = "pass the directory of the data with --base"
        if not now.get(name):
            yield error("PLM301", "the data does not exist", name, hint=hint)
        elif now[name] != then:
            yield error("PLM402", "the data has changed", name, hint=hint)


def _notes(lock: Values, recipe: Recipe) -> Iterator[str]:
    pairs = {"versions": versions(), "hardware": hardware()}
    for section, now in pairs.items():
        for key in sorted(now.keys() | lock[section].keys()):
            then = lock[section].get(key)
            if then != now.get(key):
                yield f"{key} was {then}, and is {now.get(key)}"
    if lock["code"] != code_digest(recipe):
        yield "the code of plmcc or of a pass has changed"


def _compared(
    folder: Path, lock: Values, output: Path, result: Result, notes: list[str]
) -> Reproduced:
    names = sorted(file.name for file in folder.glob("model*.safetensors"))
    same = all(
        (output / name).exists() and seal.digest(output / name) == lock["files"][name]
        for name in names
    )
    pairs = zip(lock["stages"], result.digests, strict=True)
    stage = next((then["name"] for then, now in pairs if then != now), "")
    metrics = [
        Metric(then["metric"], then["data"], then["after"], now["after"])
        for then, now in zip(lock["metrics"], result.metrics, strict=True)
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
