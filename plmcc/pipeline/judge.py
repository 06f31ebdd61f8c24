"""The metrics of a recipe, and how long the model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from plmcc.catalog.registry import name_of
from plmcc.data import question_answering
from plmcc.data.rows import Rows
from plmcc.data.tasks import GENERATION, LANGUAGE
from plmcc.diagnostics import error, listing
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.latency import Latency, measure
from plmcc.evaluation.libraries import lm_eval_score, mteb_score
from plmcc.models.source import Source, load_source
from plmcc.pipeline.datasets import evaluation_rows
from plmcc.recipe.load import Evaluate, Recipe
from plmcc.recipe.metrics import RELATIVE, library_of
from plmcc.report.result import Log

_MISSED = 0.05
_EVALUATED = 256  # tokens of a text that evaluation reads
_WINDOW = 384  # or of a window of a long context, as in the scripts of BERT


@dataclass(frozen=True)
class Judge:
    """The metrics that a recipe asks for, with the rows of each."""

    recipe: Recipe
    rows: list[Rows | None]

    @classmethod
    def of(cls, recipe: Recipe, source: Source, base: Path | None) -> Judge:
        """Read the rows.

        Raises:
            PlmccError: they cannot be read, or do not fit the metric.
        """
        asked = recipe.evaluate
        places = [recipe.location(("evaluate", index, "metric")) for index in range(len(asked))]
        return cls(recipe, evaluation_rows(asked, source, base, places))

    def metrics(self, source: Source, original: Source | None) -> list[float]:
        """Return the value of each metric for a model as it is.

        Args:
            source: the model, with its tokenizer.
            original: what `fidelity` and `kl_divergence` compare with, with its own tokenizer.
        """
        return scores(self.recipe.evaluate, self.rows, source, original) if self.rows else []

    def latency(self, original: PreTrainedModel, model: PreTrainedModel) -> list[Latency]:
        """Measure both models side by side, compiled where the recipe says so."""
        lower = self.recipe.lower
        return measure(original, model, compiled=lower is not None and "compile" in lower.to)


def missed_speeds(recipe: Recipe, original: PreTrainedModel, model: PreTrainedModel) -> list[str]:
    """Measure the model where passes were asked for speed; return what was asked and what was got
    for each that is more than 5 % slower."""
    found = []
    for stage in recipe.steps():
        for one in stage.passes:
            asked = one.speed_target()
            if asked is None:
                continue
            times, batch, length = asked
            (row,) = measure(original, model, (batch,), length)
            if row.ratio * times > 1 + _MISSED:
                got = f"{1 / row.ratio:.2f} (batch {batch}, {length} tokens, {row.mode})"
                what = f"{name_of(type(one))} was asked for {times:g} times the speed"
                found.append(f"{what}; the whole model, measured, has {got}")
    return found


def scores(
    asked: Sequence[Evaluate],
    rows: Sequence[Rows | None],
    source: Source,
    original: Source | None,
) -> list[float]:
    """Return the value of each metric on its rows."""
    tokenizer = source.need_tokenizer("evaluation")
    window = source.task == question_answering.TASK
    length = source.max_length(_WINDOW if window else _EVALUATED)
    found = []
    for one, table in zip(asked, rows, strict=True):
        search = (one.num_beams, one.max_new_tokens)
        theirs = (original.model, original.tokenizer) if original else (None, None)
        given = (source.model, tokenizer, source.pooling, theirs[0], length, *search, theirs[1])
        evaluator = Evaluator(*given, window=_windows(one, source))
        if table is not None:
            found.append(evaluator.compute(one.metric, table))
        elif library_of(one.metric) == "mteb":
            found.append(mteb_score(one.metric, evaluator.embed, source.pooling))
        else:
            wanted = (one.tasks, one.limit)
            found.append(lm_eval_score(one.metric, source.model, tokenizer, *wanted))
    return found


def _windows(asked: Evaluate, source: Source) -> tuple[int, int] | None:
    """Return the length and the stride of windows that a metric is computed on.

    Raises:
        PlmccError: the model has another task, or reads no windows as long.
    """
    if asked.context is None:
        return None
    if source.task != GENERATION:
        message = f"`context` has no effect on {source.task}: its texts are read one by one"
        raise error("PLM303", message, "evaluate.context", got=str(asked.context))
    longest = source.max_length(asked.context)
    if longest < asked.context:
        message, given = "the model reads no windows as long", str(asked.context)
        raise error("PLM303", message, "evaluate.context", got=given, allowed=f"at most {longest}")
    return asked.context, asked.stride or asked.context


def evaluate(
    models: Sequence[str],
    asked: Callable[[Source], list[Evaluate]],
    task: str = "auto",
    log: Log = lambda _: None,
) -> tuple[list[Evaluate], list[list[float]]]:
    """Score models on labeled data.

    Args:
        models: directories or hub ids; metrics of agreement compare with the first.
        asked: the metrics, by the first model.
        task: of the models; by default that of their heads.
        log: is told what is being done.

    Returns:
        The metrics, and for each model the value of each.

    Raises:
        PlmccError: a model, the data or a metric does not fit.
    """
    first: Source | None = None
    chosen: list[Evaluate] = []
    found = []
    for name in models:
        source = load_source(name, task)
        _check_head(source, first)
        log(f"evaluating {name} ({type(source.model).__name__}, {source.task})")
        if first is None:
            first, chosen = source, asked(source)
        elif source.task in LANGUAGE and any(one.metric in RELATIVE for one in chosen):
            _check_same_tokens(first, source)
        rows = evaluation_rows(chosen, source, None, ["--metric"] * len(chosen))
        found.append(scores(chosen, rows, source, first))
    return chosen, found


def _check_head(source: Source, first: Source | None) -> None:
    """Refuse a random head, and models of different tasks."""
    if source.new_head:
        message = f"the model has no head for {source.task}: its metrics would be of a random one"
        hint = "train it first, or set `--task`"
        raise error("PLM303", message, source.name, got=type(source.model).__name__, hint=hint)
    if first is not None and source.task != first.task:
        message = "the models are for different tasks"
        given, hint = f"{first.task}, {source.task}", "set `--task`"
        raise error("PLM502", message, "MODEL", got=given, hint=hint)


def _check_same_tokens(first: Source, second: Source) -> None:
    known = [one.need_tokenizer("evaluation").get_vocab() for one in (first, second)]
    if known[0] != known[1]:
        message = "the models have other token ids: their outputs cannot be compared one by one"
        hint = f"choose a metric that needs no original ({listing(RELATIVE)} do)"
        raise error("PLM303", message, "--metric", got=f"{first.name}, {second.name}", hint=hint)
