"""`plmcc search`: the values of a recipe that reach a goal, found by optuna.

Each trial is a recipe with other values. What a plan shows to be too large is not trained. Size and
quality are the two objectives, the limits of the goal are constraints; the study is in a database
from which the same search goes on, here or on several machines.

Trials are not cut short by figures in the middle of their training: those of two recipes cannot be
compared before the schedules of both (warm-up, densities, learning rates) have run.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from plmcc.diagnostics import PlmccError, error
from plmcc.experiments.compare import unbeaten
from plmcc.experiments.space import Space, plain, written
from plmcc.experiments.trial import SearchRequest, predict, run_trial
from plmcc.models.source import Source
from plmcc.recipe.load import varied
from plmcc.recipe.metrics import lower_is_better
from plmcc.report.provenance import base_digests, data_digests
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_HEARTBEAT = 10
"""Seconds after which a process shows the others that it lives; after two it counts as dead."""
_RETRIES = 2


@dataclass(frozen=True)
class TrialResult:
    """A trial: the values of it, what was measured, and why not more."""

    number: int
    values: Values
    metrics: dict[str, float]
    reason: str = ""
    """Why it was not carried out; empty where it was."""
    met: bool = False
    """Whether it reaches the goal."""
    front: bool = False
    """Whether nothing else is as small and as good."""
    seconds: float = 0.0


@dataclass
class SearchResult:
    """What a search found; `chosen` is the trial that is taken, if any reaches the goal."""

    asked: SearchRequest
    original: dict[str, float]
    original_front: bool
    """Whether no trial is as good as the original."""
    trials: list[TrialResult]
    chosen: TrialResult | None = None

    def nearest(self) -> TrialResult | None:
        """Return the trial that exceeds the limits by the smallest part of them, all added up."""
        whole = [trial for trial in self.trials if not trial.reason]
        return min(whole, key=self._excess, default=None)

    def _excess(self, trial: TrialResult) -> float:
        beyond = self.asked.goal.excess(trial.metrics, self.original)
        return sum(max(0.0, part) for part in beyond.values())


def open_study(url: str, asked: SearchRequest, source: Source, alone: bool = False) -> optuna.Study:
    """Open the study of this search in a database, or begin it.

    A search is the same if recipe, model, data and goal are. `alone` refuses a database with
    another one.

    Raises:
        PlmccError: the database cannot be used.
    """
    data = data_digests(asked.recipe, asked.base)
    same = [asked.recipe.digest(), base_digests(source), data, asked.goal.text]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    quality = StudyDirection.MINIMIZE if lower_is_better(asked.metric) else StudyDirection.MAXIMIZE
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    name = f"{asked.recipe.name}-{digest[:12]}"
    try:
        storage = RDBStorage(
            url,
            heartbeat_interval=_HEARTBEAT,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
        )
        known = optuna.get_all_study_names(storage)
        if not alone or known in ([], [name]):
            return optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[StudyDirection.MINIMIZE, quality],
                load_if_exists=True,
            )
    except (ArgumentError, SQLAlchemyError, ImportError, ValueError, RuntimeError) as problem:
        reason = first_line(problem)  # without the URL, which may hold a password
        message = f"the database of the search cannot be used: {reason}"
        allowed = "a SQLAlchemy URL such as sqlite:///search.db or postgresql://user@host/name"
        raise error("PLM501", message, "--storage", allowed=allowed) from None
    message = "the output directory contains a search with another recipe, model, data or target"
    raise error("PLM501", message, url.removeprefix("sqlite:///"), hint="choose another directory")


def search(
    study: optuna.Study,
    asked: SearchRequest,
    source: Source,
    known: Mapping[str, float],
    trials: int = 20,
    timeout: float | None = None,
    seed: int = 0,
) -> None:
    """Try values until a study has so many trials.

    Args:
        study: what `open_study` has returned; it gets the trials.
        asked: what is searched.
        source: the original.
        known: its figures.
        trials: how many there are to be; fewer where there are not so many values.
        timeout: seconds after which no new trial begins.
        seed: decides on the values that are tried.

    Raises:
        PlmccError: the data cannot be used.
        KeyboardInterrupt: the trial that was stopped is the next one of the study.
    """
    begun = time.monotonic()
    space = Space.of(asked.recipe)
    wanted = min(trials, space.count())
    if wanted == space.count():  # all of them, in any order
        for values in space.shuffled(seed):
            study.enqueue_trial(values, skip_if_exists=True)
    objective = _Objective(asked, source, known, space)
    while len(study.get_trials(deepcopy=False, states=_DONE)) < wanted:
        if timeout is not None and time.monotonic() - begun > timeout:
            asked.log(f"no further trials after {timeout:g} s")
            break
        # A seed of its own for each trial: a search that goes on tries what it would have tried.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.get_trials(False)))
        study.optimize(objective, n_trials=1, catch=(_Repeated,))
        if objective.repeated:
            _enqueue_another(study, space, seed)


def _enqueue_another(study: optuna.Study, space: Space, seed: int) -> None:
    """Let the next trial of a space that is not infinite be one that has not been."""
    if math.isfinite(space.count()):
        had = [trial.params for trial in study.get_trials(deepcopy=False, states=_DONE)]
        left = [values for values in space.shuffled(seed) if values not in had]
        if left:  # another process may have tried the last ones
            study.enqueue_trial(left[0])


class _Repeated(Exception):
    """The sampler proposes what has been tried."""


class _Objective:
    """Carries a trial out; what it finds is kept with the trial, in the database."""

    def __init__(
        self, asked: SearchRequest, source: Source, known: Mapping[str, float], space: Space
    ) -> None:
        self.asked, self.source, self.known, self.space = asked, source, known, space
        self.repeated = False
        """Whether the last trial was one that has been."""

    def __call__(self, trial: Trial) -> tuple[float, float]:
        """Return size and quality.

        Raises:
            TrialPruned: the recipe cannot reach the goal, or does not work with these values.
            _Repeated: these values have been tried.
        """
        values = self.space.values(trial)
        done = trial.study.get_trials(deepcopy=False, states=_DONE)
        self.repeated = any(other.params == trial.params for other in done)
        if self.repeated:
            raise _Repeated
        self.asked.log(f"trial {trial.number}: {written(values)}")
        try:
            found = self._found(trial, values)
        except optuna.TrialPruned:
            raise
        except BaseException:  # Ctrl-C, or missing data: the study goes on with it
            trial.study.enqueue_trial(trial.params)
            raise
        self._note(trial, found)
        return found["size"], found["quality"]

    def _found(self, trial: Trial, values: Values) -> dict[str, float]:
        try:
            recipe = varied(self.asked.recipe, values)
            sizes = predict(self.asked, recipe)
            beyond = {n: x for n, x in self._excess(sizes).items() if x > 0}
            if not beyond:
                return run_trial(self.asked, recipe, self.source, self.known)
        except (PlmccError, RuntimeError) as problem:  # values that do not go together, memory
            if _is_of_data(problem):
                raise
            trial.set_constraint("refused", 1.0)
            raise self._pruned(trial, _sentence(problem)) from None
        self._note(trial, sizes)
        raise self._pruned(trial, f"the plan shows that its {' and '.join(beyond)} is too large")

    def _excess(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return self.asked.goal.excess(metrics, self.known)

    def _note(self, trial: Trial, found: dict[str, float]) -> None:
        trial.set_user_attr("metrics", found)
        for name, beyond in self._excess(found).items():
            trial.set_constraint(name, beyond)

    def _pruned(self, trial: Trial, reason: str) -> optuna.TrialPruned:
        trial.set_user_attr("reason", reason)
        self.asked.log(f"  not tried: {reason}")
        return optuna.TrialPruned(reason)


def _sentence(problem: Exception) -> str:
    if not isinstance(problem, PlmccError):
        return f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    first = problem.diagnostics[0]
    return ": ".join(part for part in (first.code, first.message, first.got) if part)


def _is_of_data(problem: Exception) -> bool:
    """Whether files are missing or wrong, which no other values would cure."""
    codes = [d.code for d in problem.diagnostics] if isinstance(problem, PlmccError) else []
    return any(code in ("PLM301", "PLM302", "PLM401") for code in codes)


def found_in(study: optuna.Study, asked: SearchRequest, known: dict[str, float]) -> SearchResult:
    """Return all that is in a study: its trials in order, and the one that is chosen."""
    done = study.get_trials(deepcopy=False, states=_DONE)
    tried = [_tried(trial, asked, known) for trial in done]
    whole = [one for one in tried if not one.reason]
    sign = 1 if lower_is_better(asked.metric) else -1
    measured = [known, *(one.metrics for one in whole)]
    first, *others = unbeaten([(f["size"], sign * f["quality"]) for f in measured])
    best = {one.number for one, front in zip(whole, others, strict=True) if front}
    tried = [replace(one, front=one.number in best) for one in tried]

    def rank(one: TrialResult) -> tuple[float, float]:
        size, quality = one.metrics["size"], sign * one.metrics["quality"]
        return (size, quality) if asked.goal.judges else (quality, size)

    chosen = min((one for one in tried if one.met), key=rank, default=None)
    return SearchResult(asked, known, first, tried, chosen)


def _tried(trial: FrozenTrial, asked: SearchRequest, known: Mapping[str, float]) -> TrialResult:
    metrics = trial.user_attrs.get("metrics", {})
    reason = trial.user_attrs.get("reason", "")
    met = not reason and all(x <= 0 for x in asked.goal.excess(metrics, known).values())
    took = trial.duration.total_seconds() if trial.duration else 0.0
    return TrialResult(
        trial.number, plain(trial.params), metrics, reason, met, seconds=round(took, 1)
    )
