"""`plmcc shrink`: the smallest result of the shipped recipes that is still good.

All candidates are planned without weights (`candidates`). Of those that fit the target some are
tried without training (`selection`). The one that is chosen is carried out as any recipe is, with
its training, and judged by the target.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plmcc.artifact.size import component_bytes
from plmcc.data.classification import default_metric
from plmcc.data.rows import load_rows
from plmcc.data.tasks import LANGUAGE
from plmcc.diagnostics import PlmccError, error
from plmcc.evaluation.evaluator import check_metric
from plmcc.experiments.candidates import Candidate, candidates, side_bytes
from plmcc.experiments.goal import Goal, check_asked, parse_goal
from plmcc.experiments.selection import FILE, Selection, trained
from plmcc.experiments.served import Runtime, Served, runtime_of
from plmcc.export.manifest import free_export
from plmcc.models.source import Source, is_vectors, load_source
from plmcc.pipeline.cache import folder_of
from plmcc.pipeline.compiler import apply
from plmcc.recipe.load import Evaluate, Recipe
from plmcc.recipe.metrics import RELATIVE, lower_is_better
from plmcc.report.result import Result
from plmcc.report.words import megabytes
from plmcc.utils.files import check_outside, matching_files
from plmcc.utils.outputs import claim, free, output_place
from plmcc.utils.types import Values

Say = Callable[[str], None]
Effort = Literal["quick", "normal", "best"]
Verdict = Literal["ACCEPT", "REGRESSION", "INFEASIBLE"]
STEPS: dict[str, float] = {"quick": 0, "normal": 1, "best": 4}
"""How many times the steps of its recipe the chosen one is trained."""
TARGET = "drop<=1"
_OURS = ("held_out.txt", "text.txt", FILE)
"""The files beside the output."""
_MOST = 1000
"""Lines that are held out."""
_UNKNOWN = 0.3
"""The part of the text's tokens that may be unknown."""
_HELD_OUT = 20
"""Every such line of the text is held out, where there is no labeled data."""


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    model: str
    text: Sequence[str]
    """Files of text."""
    target: str = TARGET
    data: Values | None = None
    """The labeled data: values of an `evaluate` section, such as `data`, `text` and `label`."""
    metric: str | None = None
    effort: Effort = "normal"
    recipes: Sequence[Path] = ()
    """Recipes to choose from; by default the shipped ones."""
    runtime: Runtime = "auto"
    """Where the result will run."""
    log: Say = lambda _: None


@dataclass(frozen=True)
class Tried:
    """A candidate, and what was measured of it without training."""

    title: str
    size: int | None
    """Planned, in bytes; None where it cannot be used."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Empty where it was not tried."""
    reason: str = ""
    """Why it cannot be used."""


@dataclass
class Shrunk:
    """What came of it."""

    verdict: Verdict | None
    """None after a dry run."""
    words: str
    """The verdict in a line."""
    original: dict[str, float] = field(default_factory=dict)
    """Bytes on disk and quality of the original."""
    measured: dict[str, float] = field(default_factory=dict)
    """The same of the result."""
    metric: str = ""
    runtime: Runtime = "torch"
    """Where it was measured."""
    candidates: list[Tried] = field(default_factory=list)
    chosen: str = ""
    recipe: Recipe | None = None
    result: Result | None = None

    def to_json(self) -> Values:
        """Return plain values."""
        values = {n: getattr(self, n) for n in ("verdict", "words", "original", "measured")}
        tried = [asdict(one) for one in self.candidates]
        values["runtime"] = self.runtime
        return values | {"metric": self.metric, "chosen": self.chosen, "candidates": tried}


def shrink(
    model: str | Path | PreTrainedModel | Source,
    text: str | Path | Sequence[str | Path] = (),
    target: str = TARGET,
    *,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Values | None = None,
    metric: str | None = None,
    effort: Effort = "normal",
    recipes: Sequence[Path] = (),
    runtime: Runtime = "auto",
    overwrite: bool = False,
    log: Say = lambda _: None,
) -> Shrunk:
    """Find the smallest result of a model that is still good, and write it.

    Args:
        model: a directory, a hub id, or a model in memory with its `tokenizer`.
        text: files of text like that the model will read.
        target: limits as of `plmcc shrink --target`.
        output: the directory of the result.
        data: labeled data, or values of `evaluate`; by default, results are compared with the
            original on text that is held out.
        metric: by default that of the task.
        effort: `quick` trains nothing, `normal` some hundred steps, `best` four times as many.
        recipes: files to choose from; by default the shipped ones.
        runtime: as of `plmcc shrink --runtime`; ONNX files are written to `OUTPUT.onnx`.
        overwrite: replace an existing directory.

    Raises:
        PlmccError: as `find`.
    """
    texts = [str(one) for one in ([text] if isinstance(text, (str, Path)) else text)]
    given = {"data": data} if isinstance(data, str) else data
    rest = (texts, target, given, metric, effort, recipes, runtime, log)
    place = free(output_place(Path(output)), overwrite)
    with tempfile.TemporaryDirectory(prefix="plmcc-shrink-") as folder:
        asked = Asked(_on_disk(model, tokenizer, Path(folder)), *rest)
        return find(asked, place, overwrite=overwrite)


def _on_disk(
    model: str | Path | PreTrainedModel | Source,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> str:
    """Return where a model is; one in memory is written first.

    Raises:
        PlmccError: it has no tokenizer.
    """
    if isinstance(model, (str, Path)):
        return str(model)
    source = model if isinstance(model, Source) else Source.of(model)
    source = replace(source, tokenizer=tokenizer or source.tokenizer)
    if source.tokenizer is None:
        message = "a model in memory needs its tokenizer"
        raise error("PLM303", message, type(source.model).__name__, hint="pass `tokenizer=`")
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return str(folder)


def find(
    asked: Asked,
    output: Path,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    table: Callable[[list[Candidate]], None] = lambda found: None,
) -> Shrunk:
    """Find the smallest good result of a model, and write it.

    Args:
        asked: the model, the text, and what the result has to be.
        output: the directory of the result. Beside it, `OUTPUT.shrink` keeps held-out text and what
            was tried: the same call continues after an interruption.
        dry_run: only plan the candidates.
        overwrite: replace an existing directory.
        table: called with the planned candidates.

    Raises:
        PlmccError: the model or the data cannot be read, or the target is not one.
    """
    _check(asked)
    check_outside(output, Path(asked.model))
    work = output.resolve().with_name(f"{output.resolve().name}.shrink")
    with nullcontext() if dry_run else claim(output):
        before = work.exists()
        if before and not (work.is_dir() and {f.name for f in work.iterdir()} <= {*_OURS}):
            message = "this is where held-out text and trials go, and there is something else"
            raise error("PLM501", message, str(work), hint="move it away, or choose another output")
        try:
            return _found(asked, output, work, dry_run, overwrite, table)
        except PlmccError:
            if not before and work.exists() and not (work / FILE).exists():
                shutil.rmtree(work)
            raise


def _found(
    asked: Asked,
    output: Path,
    work: Path,
    dry_run: bool,
    overwrite: bool,
    table: Callable[[list[Candidate]], None],
) -> Shrunk:
    asked.log(f"looking at {asked.model}")
    source = load_source(asked.model, meta=True)
    text, judged = _data(asked, source, work, dry_run)
    goal = parse_goal(asked.target, lower_is_better(judged.metric))
    served = runtime_of(asked.runtime, goal, source) == "onnx"
    if served:
        asked.log("results are measured as int8 ONNX files, in onnxruntime with one thread")
        free_export(_onnx_place(output), overwrite)
    asked.log("planning the candidates")
    found = candidates(source, text, asked.recipes, served=served)
    table(found)
    listed = [
        Tried(one.title, one.size if one.recipe else None, reason=one.reason) for one in found
    ]
    usable = [one for one in found if one.recipe is not None]
    if dry_run:
        words = f"{len(usable)} candidates"
        return Shrunk(None, words, metric=judged.metric, candidates=listed)
    before = sum(component_bytes(source.model).values()) + side_bytes(source)
    given = (asked.model, goal, judged, asked.effort, work, usable, asked.log)
    with tempfile.TemporaryDirectory(prefix="plmcc-shrink-") as folder:
        form = Served(asked.model, Path(folder)) if served else None
        trials = Selection(*given, form.trial if form else None)
        return _Run(asked, goal, judged, trials, output, listed, before, form).carry_out(overwrite)


def _onnx_place(output: Path) -> Path:
    return output.with_name(f"{output.name}.onnx")


def _check(asked: Asked) -> None:
    """Refuse what can be known before the model is looked at."""
    check_asked(asked.target, asked.effort, asked.metric, asked.runtime)
    for name in asked.text:
        matching_files(name, None)


def _data(asked: Asked, source: Source, work: Path, dry_run: bool) -> tuple[list[str], Evaluate]:
    """Return the files of text, and what results are judged by: labeled data, or text held out of
    them."""
    files = [str(file.resolve()) for name in asked.text for file in matching_files(name, None)]
    config = source.model.config
    if asked.data is not None:
        metric = asked.metric or default_metric(source.task, config)
        check_metric(metric, source.task, "--metric", config)
        return files, _evaluate(metric, asked.data)
    usual = "perplexity" if source.task in LANGUAGE else "fidelity"
    if source.task == "translation":
        message = "translations are judged by references, and none are given"
        hint = "add --data with a file of two columns: texts and translations"
        raise error("PLM303", message, "--data", hint=hint)
    metric = asked.metric or usual
    check_metric(metric, source.task, "--metric", config)
    if metric not in (*RELATIVE, "perplexity"):
        message = f"{metric} needs labels, and there are none"
        raise error("PLM303", message, "--metric", got=metric, hint="add --data FILE")
    if not files and is_vectors(Path(asked.model)):
        return [], _evaluate(metric, {"data": str(_words(source, work, dry_run))})
    if not files:
        message = "there is nothing to judge results by"
        raise error("PLM502", message, "--text", hint="add --text FILE, or --data FILE")
    held = work / "held_out.txt"
    if dry_run:
        return files, _evaluate(metric, {"data": files[0]})
    rest = _held_out(asked, source, files, held)
    return [str(rest.resolve())], _evaluate(metric, {"data": str(held.resolve())})


def _held_out(asked: Asked, source: Source, files: list[str], held: Path) -> Path:
    """Write every so many lines of the text to `held`, and return the file of the others.

    Raises:
        PlmccError: the text is too short, or unknown to the tokenizer.
    """
    lines = [line for file in files for line in load_rows(file).texts()]
    if len(lines) < 2 * _HELD_OUT:
        message = "the text is too short to hold a part of it out"
        given, allowed = f"{len(lines)} lines", f"at least {2 * _HELD_OUT} lines"
        raise error("PLM301", message, ", ".join(asked.text), got=given, allowed=allowed)
    _check_known(source, lines[:_MOST], ", ".join(asked.text))
    held.parent.mkdir(parents=True, exist_ok=True)
    step = max(_HELD_OUT, len(lines) // _MOST)
    rest = held.with_name("text.txt")
    plain = [" ".join(line.split()) for line in lines]
    held.write_text("\n".join(plain[step - 1 :: step]) + "\n", encoding="utf-8")
    kept = [line for index, line in enumerate(plain) if index % step != step - 1]
    rest.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return rest


def _words(source: Source, work: Path, dry_run: bool) -> Path:
    """Write words of word vectors, evenly spaced over all: what their results are judged by where
    there is no text."""
    held = work / "held_out.txt"
    if not dry_run:
        tokenizer = source.need_tokenizer("a comparison of words")
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        work.mkdir(parents=True, exist_ok=True)
        lines = words[:: -(-len(words) // (5 * _MOST))]
        held.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return held.resolve()


def _check_known(source: Source, lines: list[str], place: str) -> None:
    """Refuse text that the tokenizer does not know: every result would be like the original on it.

    Raises:
        PlmccError: too many of its tokens are unknown.
    """
    if is_vectors(Path(source.name)):
        message = "results of word vectors are judged by their words, or by labeled pairs"
        raise error("PLM502", message, "--text", hint="leave --text out, or add --data FILE")
    tokenizer = source.need_tokenizer("a comparison on text")
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [index for row in encoded for index in row]
    unknown = tokenizer.unk_token_id
    lost = ids.count(unknown) / max(1, len(ids)) if unknown is not None else 0.0
    if lost > _UNKNOWN:
        message = f"the tokenizer reads {lost:.0%} of the text as unknown tokens"
        raise error("PLM303", message, place, hint="use text in a language of the model")


def _evaluate(metric: str, values: Values) -> Evaluate:
    """Return an `evaluate` section.

    Raises:
        PlmccError: it is malformed.
    """
    try:
        return Evaluate.model_validate({"metric": metric, **values})
    except ValidationError as problem:
        first = problem.errors()[0]
        place = f"data: {'.'.join(map(str, first['loc']))}"
        raise error("PLM502", first["msg"], place, got=repr(first["input"])) from None


@dataclass
class _Run:
    """The choice and the result of one call."""

    asked: Asked
    goal: Goal
    judged: Evaluate
    trials: Selection
    output: Path
    listed: list[Tried]
    before: int
    """Bytes of the original on disk."""
    served: Served | None
    """Where the result will be a file in onnxruntime."""

    @property
    def usable(self) -> list[Candidate]:
        """The candidates, from small to large."""
        return self.trials.usable

    def carry_out(self, overwrite: bool) -> Shrunk:
        """Try, choose, apply, judge."""
        smallest = min(self.usable, key=self._beyond, default=None)
        possible = [one for one in self.usable if self._beyond(one) <= 0]
        if smallest is None:
            reasons = "; ".join(f"{one.title}: {one.reason}" for one in self.listed[:3])
            return self._ended("INFEASIBLE", f"no recipe fits this model: {reasons}")
        if not possible:
            near = f"the nearest is {smallest.title} with {megabytes(smallest.size)}"
            return self._ended("INFEASIBLE", f"no candidate is planned within the target; {near}")
        trials = self.trials
        chosen = trials.choose(possible, trials.begin(possible[0], self.before))
        metrics = trials.done[chosen.key]
        met = trials.excess(metrics) <= 0
        if not met and self.asked.effort == "quick":
            return self._ended("INFEASIBLE", self._untrained_words(chosen, metrics))
        return self._applied(chosen, overwrite)

    def _untrained_words(self, nearest: Candidate, metrics: dict[str, float]) -> str:
        """Say that nothing is good enough without training, and what comes nearest."""
        tried, known = len(self.trials.done), len(self.usable)
        count = f"none of the {tried} candidates that were tried (of {known})"
        near = f"the nearest is {nearest.title}: {self.trials.figures(metrics)}"
        trains = nearest.recipe is not None and any(s.train for s in nearest.recipe.steps())
        more = "`--effort normal` trains it" if trains else "`--effort normal` tries more of them"
        return f"{count} reaches the target untrained; {near}; {more}"

    def _beyond(self, one: Candidate) -> float:
        """By how much the planned sizes are beyond their limits."""
        known = {"size": float(self.before), "parameters": float(max(1, one.parameters))}
        found = self.goal.excess(one.sizes, known)
        return max(found.values(), default=0.0)

    def _applied(self, chosen: Candidate, overwrite: bool) -> Shrunk:
        assert chosen.recipe is not None
        times = STEPS[self.asked.effort]
        recipe = trained(chosen.recipe, times).model_copy(update={"evaluate": [self.judged]})
        trains = any(stage.train for stage in recipe.steps())
        how = "training and writing it" if trains else "writing it; it is not trained"
        self.asked.log(f"chosen: {chosen.title}; {how}")
        resume = folder_of(self.output).exists()
        place, say = self.output, self._indented
        with redirect_stdout(sys.stderr):  # the Trainer prints its log
            result = apply(
                recipe, self.asked.model, place, overwrite=overwrite, resume=resume, log=say
            )
        shutil.rmtree(folder_of(self.output), ignore_errors=True)  # stages of a finished run
        after = result.metrics[0]["after"]
        sign = 1 if lower_is_better(self.judged.metric) else -1
        before = result.metrics[0]["before"]
        self.trials.known |= {"quality": before}
        size = sum(result.bytes_after.values()) + side_bytes(result.source)
        measured = self.trials.done[chosen.key] | {"size": float(size), "quality": after}
        if self.served is not None:
            self.asked.log("exporting it, and measuring the file")
            measured |= self.served.final(self.output, _onnx_place(self.output), recipe)
            after = measured["quality"]
        measured["drop"] = sign * (after - before)
        good = self.trials.excess(measured) <= 0
        words = (
            f"{megabytes(self.before)} to {self.trials.figures(measured)}; asked: {self.goal.text}"
        )
        made = self._ended("ACCEPT" if good else "REGRESSION", words)
        made.measured, made.chosen = measured, chosen.title
        made.recipe, made.result = recipe, result
        return made

    def _indented(self, line: str) -> None:
        self.asked.log(f"  {line}")

    def _ended(self, verdict: Verdict, words: str) -> Shrunk:
        tried = {one.title: self.trials.done.get(one.key, {}) for one in self.usable}
        listed = [replace(one, metrics=tried.get(one.title, {})) for one in self.listed]
        before = {"size": float(self.before)} | {
            name: value for name, value in self.trials.known.items() if name == "quality"
        }
        made = Shrunk(verdict, words, before, metric=self.judged.metric, candidates=listed)
        made.runtime = "onnx" if self.served else "torch"
        return made

    # --- what is kept for the next call
