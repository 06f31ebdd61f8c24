"""`plmcc test`: a whole recipe on a small random copy of a model, with every check of the contract.

Each stage is trained for a few steps on a handful of the recipe's own rows, or, where the files are
not there, on random text. What comes out says nothing of quality; it says that the recipe runs, and
that what it writes is a model that loads and computes the same.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from plmcc.diagnostics import PlmccError
from plmcc.ir.probes import probe_inputs
from plmcc.models.source import Source
from plmcc.pipeline.run import run
from plmcc.planning.plan import load_outline
from plmcc.recipe.load import Calibrate, Data, Evaluate, Recipe, Stage, Train
from plmcc.recipe.sections import Synthetic
from plmcc.report.result import Result
from plmcc.testing import model_checks as contract
from plmcc.testing import random_text
from plmcc.testing.reduced_copy import reduced_copy
from plmcc.utils.types import Values

_STEPS, _ROWS, _BATCH, _TOKENS = 4, 16, 4, 512
_FIGURED = 4  # rows of a figure
_NEW_TOKENS = 8
_WHOLE_RUN = 100_000  # steps that schedules hear of, where the recipe counts epochs
_BARE = ("reloading_is_exact", "fresh_processes_agree")  # for a checkpoint without passes

Verdict = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """A check: its sentence, its verdict, and why where it is not a pass."""

    name: str
    about: str
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0


@dataclass
class DryRun:
    """What `plmcc test` found."""

    recipe: str
    model: str
    reduced_copy: str
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def to_json(self) -> Values:
        """Return plain values."""
        return {"ok": self.ok, **asdict(self)}


def dry_run(recipe: Recipe, name: str | None = None, base: Path | None = None) -> DryRun:
    """Run a recipe on a reduced copy of a model, and check the result.

    Args:
        recipe: with passes of real classes (`load_recipe(path, load_torch=True)`).
        name: a model directory (config.json and tokenizer are enough) or hub id; by default the
            recipe's model.
        base: the folder that relative data paths may start at besides the current one.

    Raises:
        PlmccError: no model is given, or it cannot be built.
    """
    source = load_outline(recipe, name, base)
    with tempfile.TemporaryDirectory(prefix="plmcc-test-") as folder:
        notes: list[str] = []
        short = shorten(recipe, source, base, Path(folder), notes)
        reduced, plan = reduced_copy(short, source, base)
        count = sum(p.numel() for p in reduced.model.parameters())
        words = f"{_depth(reduced)} layers, {count:,} parameters"
        trial = DryRun(recipe.name, source.name, words, notes)
        start = time.perf_counter()
        if plan.problems:
            reason = " ".join(PlmccError(*plan.problems).render().split())
            trial.checks.append(Check("plan", "The rules match.", "fail", reason))
            return trial
        trial.checks.append(Check("plan", "The rules match.", "pass", "", _since(start)))
        original = copy.deepcopy(reduced.model)
        with _checked(trial, "stages", "Every stage runs, and hardening keeps the outputs."):
            with redirect_stdout(sys.stderr):  # the Trainer prints what it logs
                result = run(
                    short, reduced, lambda _: None, base, schedule_steps=_whole_run(recipe)
                )
            _contract(trial, recipe, reduced, original, result, Path(folder) / "saved")
    return trial


def _contract(
    trial: DryRun, recipe: Recipe, reduced: Source, original: Any, result: Result, folder: Path
) -> None:
    model = result.model
    model.save_pretrained(folder)
    if reduced.tokenizer is not None:
        reduced.tokenizer.save_pretrained(folder)
    inputs = probe_inputs(model)
    prompt = {n: v[:1] for n, v in inputs.items() if n != "decoder_input_ids"}
    subject = contract.Subject(model, original, tuple(result.records), folder, inputs, prompt)
    checks = contract.CHECKS
    if not result.records:
        checks = {name: checks[name] for name in _BARE}
    if recipe.lower is not None and result.records:
        checks = checks | {"modules_compile": contract.modules_compile}
    for name, check in checks.items():
        with _checked(trial, name, (check.__doc__ or name).strip()):
            check(subject)


@contextmanager
def _checked(trial: DryRun, name: str, about: str) -> Iterator[None]:
    """Note how a check ends; its place in the list is where it begins."""
    at, start = len(trial.checks), time.perf_counter()
    verdict: Verdict = "pass"
    reason = ""
    try:
        yield
    except contract.NotApplicable as problem:
        verdict, reason = "skip", str(problem)
    except (contract.Broken, PlmccError) as problem:
        verdict, reason = "fail", " ".join(str(problem).split())
    except Exception as problem:  # a pass is foreign code, and failing is what is looked for
        words = " ".join(str(problem).split())
        verdict, reason = "fail", f"{type(problem).__name__}: {words}"
    trial.checks.insert(at, Check(name, about, verdict, reason, _since(start)))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _depth(source: Source) -> int:
    from plmcc.ir.program import Program

    return len(Program(source.model).layer_paths())


def _whole_run(recipe: Recipe) -> int:
    """The steps of the shortest stage, as far as the recipe counts steps."""
    stages = [stage.train.arguments for stage in recipe.steps() if stage.train]
    steps = [int(given["max_steps"]) for given in stages if int(given.get("max_steps", 0)) > 0]
    return min(steps, default=_WHOLE_RUN)


def shorten(
    recipe: Recipe, source: Source, base: Path | None, folder: Path, notes: list[str]
) -> Recipe:
    """Return the recipe with a few steps on a few rows, and nothing that measures.

    `notes` gets what is other than in the recipe; random text is written into `folder`.
    """

    def shorter(stage: Stage) -> Stage:
        if stage.train is None:
            return stage
        return stage.model_copy(
            update={"train": _short_train(stage.train, source, base, folder, notes)}
        )

    stages = [shorter(stage) for stage in recipe.steps()]
    metrics = [_short_figure(f) for f in recipe.evaluate if _there(f, base, notes)]
    update: Values = {"stages": stages, "passes": [], "train": None, "evaluate": metrics}
    measured = recipe.calibration()
    if measured is not None and recipe.calibrate is not None:
        update["calibrate"] = _short_calibration(measured, source, base, folder, notes)
    return recipe.model_copy(update=update | {"lower": None})


def _short_calibration(
    asked: Calibrate, source: Source, base: Path | None, folder: Path, notes: list[str]
) -> Calibrate:
    data = _short_data(asked.as_data(), source, base, folder, notes)
    update = {"data": data.train, "target": data.target, "limit": _ROWS, "rows": _ROWS}
    return asked.model_copy(update=update | {"synthetic": data.synthetic})


def _short_train(
    settings: Train, source: Source, base: Path | None, folder: Path, notes: list[str]
) -> Train:
    data, distill = _short_data(settings.data, source, base, folder, notes), settings.distill
    if distill is not None and distill.teacher != "original":
        notes.append(f"{distill.teacher}: the reduced copy itself is the teacher")
        distill = distill.model_copy(update={"teacher": "original"})
    if distill is not None and distill.sequence is not None:
        quick = {"num_beams": 1, "max_new_tokens": _NEW_TOKENS, "cache": str(folder / "cache")}
        sequence = distill.sequence.model_copy(update=quick)
        distill = distill.model_copy(update={"sequence": sequence})
    left = ("num_train_epochs", "eval_strategy", "eval_steps", "load_best_model_at_end")
    arguments = {n: v for n, v in settings.arguments.items() if n not in left}
    arguments |= {"max_steps": _STEPS, "logging_steps": 1, "warmup_steps": 0}
    arguments |= {"gradient_accumulation_steps": 1}
    if settings.tokens_per_batch is None:
        arguments["per_device_train_batch_size"] = _BATCH
    tokens = settings.tokens_per_batch and min(settings.tokens_per_batch, _TOKENS)
    average = settings.average_last and 2
    update: Values = {"data": data, "distill": distill, "arguments": arguments}
    return settings.model_copy(
        update=update | {"tokens_per_batch": tokens, "average_last": average}
    )


def _short_data(
    data: Data, source: Source, base: Path | None, folder: Path, notes: list[str]
) -> Data:
    if data.train == "synthetic":
        given = data.synthetic or Synthetic()
        data = data.model_copy(update={"synthetic": given.model_copy(update={"sequences": _ROWS})})
    elif not random_text.exists(data.train, data.target, base=base):
        notes.append(f"{data.train}: not there (or on the hub); random text takes its place")
        data = random_text.write(data, source, folder)
    return data.model_copy(update={"limit": _ROWS, "eval": None, "eval_target": None})


def _there(figure: Evaluate, base: Path | None, notes: list[str]) -> bool:
    if not figure.data:
        notes.append(f"`{figure.metric}` is left out")
        return False
    found = random_text.exists(figure.data, figure.target, base=base)
    if not found:
        notes.append(f"{figure.data}: not there; `{figure.metric}` is left out")
    return found


def _short_figure(figure: Evaluate) -> Evaluate:
    few = {"limit": _FIGURED, "num_beams": 1, "max_new_tokens": _NEW_TOKENS}
    return figure.model_copy(update=few)


def print_dry_run(trial: DryRun, console: Console) -> None:
    """Print the checks as one table."""
    console.print(
        f"recipe {trial.recipe} on a random reduced copy of {trial.model}: {trial.reduced_copy}",
        markup=False,
    )
    for note in trial.notes:
        console.print(f"  note: {note}", markup=False)
    table = Table()
    for column in ("check", "", "seconds", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for check in trial.checks:
        style = {"pass": "green", "fail": "bold red", "skip": "dim"}[check.verdict]
        table.add_row(check.about, check.verdict, f"{check.seconds:.1f}", check.reason, style=style)
    console.print(table)
