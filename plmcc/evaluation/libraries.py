"""Scores by other libraries: tasks of mteb for sentence encoders, of lm_eval for language models.

Both bring their own datasets, which they download unless the cache of the hub has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from plmcc.data.pooling import Pooling
from plmcc.diagnostics import Location, PlmccError, did_you_mean, error
from plmcc.recipe.metrics import library_of
from plmcc.utils.extras import library
from plmcc.utils.text import first_line

_POINTS = ("acc", "acc_norm", "exact_match", "f1", "mcc", "em")
"""Metrics of lm_eval between 0 and 1; they are given in percent, as those of mteb."""
Embed = Callable[[list[str]], Tensor]


def check_task(metric: str, folder: str | None, place: Location | str) -> None:
    """Check that a library and its task are there.

    Args:
        metric: such as `mteb:STS22` or `lm_eval:hellaswag/acc_norm`.
        folder: definitions of further tasks of lm_eval.
        place: where the metric was asked for.

    Raises:
        PlmccError: the library is not installed, or has no such task.
    """
    name = metric.partition(":")[2]
    if library_of(metric) == "mteb":
        mteb = library("mteb", "mteb", metric, "evaluate", "mteb")
        try:
            known = mteb.get_task(name).metadata
        except KeyError as problem:  # its text names the nearest
            raise _no_task(metric, name, first_line(problem).strip("\"'"), place) from None
        if known.modalities != ["text"]:
            raise error("PLM303", "this task is not one of text alone", place, got=metric)
        return
    if folder is not None and not Path(folder).is_dir():
        raise error("PLM301", "there is no such folder", "--tasks", got=folder)
    manager, name = _manager(folder), name.partition("/")[0]
    if name not in manager.all_tasks:
        raise _no_task(metric, name, did_you_mean(name, manager.all_tasks), place)


def _no_task(metric: str, name: str, hint: str, place: Location | str) -> PlmccError:
    message = f"{library_of(metric)} has no such task"
    return error("PLM303", message, place, got=name, hint=hint)


def mteb_score(metric: str, embed: Embed, pooling: Pooling) -> float:
    """Return the main score of a task, in percent: its mean over splits and languages.

    Raises:
        PlmccError: its dataset cannot be read.
    """
    mteb = library("mteb", "mteb", metric, "evaluate", "mteb")
    task = mteb.get_task(metric.partition(":")[2])
    try:
        found = mteb.evaluate(
            _Encoder(embed, pooling, mteb), task, cache=None, show_progress_bar=False
        )
    except Exception as problem:
        raise _unread(metric, problem) from problem
    return 100 * float(found.task_results[0].get_score())


class _Encoder:
    """A model as mteb calls it; prompts are those of the model."""

    def __init__(self, embed: Embed, pooling: Pooling, mteb: Any) -> None:
        self._embed, self._pooling = embed, pooling
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty({"name": "plmcc/model"})

    def encode(self, inputs: Iterable[dict[str, Any]], **options: object) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        return self._embed(texts).numpy()

    def similarity(self, one: Any, two: Any) -> Tensor:
        first, second = (torch.as_tensor(part).float() for part in (one, two))
        measure = self._pooling.measure
        if measure in ("euclidean", "manhattan"):
            return -torch.cdist(first, second, 2.0 if measure == "euclidean" else 1.0)
        if measure == "cosine":
            first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        return first @ second.T

    def similarity_pairwise(self, one: Any, two: Any) -> Tensor:
        return self._pooling.similarity(torch.as_tensor(one), torch.as_tensor(two))


def lm_eval_score(
    metric: str, model: object, tokenizer: object, folder: str | None, limit: int | None
) -> float:
    """Return a score of a task of lm_eval: the metric that is named, else its first one; accuracies
    and the like in percent.

    Raises:
        PlmccError: its dataset cannot be read, or it has no such metric.
    """
    lm_eval = library("lm_eval", "lm-eval", metric, "evaluate", "lm_eval")
    wrapper = library("lm_eval.models.huggingface", "lm-eval", metric, "evaluate", "lm_eval").HFLM
    name, _, asked = metric.partition(":")[2].partition("/")
    try:
        found = lm_eval.simple_evaluate(
            wrapper(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[name],
            task_manager=_manager(folder),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as problem:
        raise _unread(metric, problem) from problem
    values = {
        key.partition(",")[0]: value
        for key, value in found["results"][name].items()
        if isinstance(value, (int, float)) and "stderr" not in key and key != "sample_len"
    }
    if asked and asked not in values:
        allowed = ", ".join(values)
        raise error("PLM303", f"{name} has no such metric", metric, got=asked, allowed=allowed)
    chosen = asked or next(iter(values), "")
    value = float(values.get(chosen, math.nan))
    return 100 * value if chosen in _POINTS else value


def _manager(folder: str | None) -> Any:
    tasks = library("lm_eval.tasks", "lm-eval", "lm_eval", "evaluate", "lm_eval")
    return tasks.TaskManager(include_path=folder)


def _unread(metric: str, problem: Exception) -> PlmccError:
    message = f"{metric} cannot be computed: {first_line(problem)}"
    hint = "the library downloads its datasets: see whether the network or its cache has them"
    return error("PLM401", message, "evaluate", hint=hint)
