"""Which metrics a task has, and which way they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from plmcc.diagnostics import did_you_mean, error

# fmt: off
Metric = Literal[
    "accuracy", "f1", "f1_micro", "f1_macro", "matthews", "spearman", "pearson", "mse",
    "perplexity", "fidelity", "kl_divergence", "bleu", "chrf", "exact_match", "ndcg", "mrr",
]
# fmt: on
RANKING = ("ndcg", "mrr")
"""Metrics of the order of texts for a query."""
_SIMILARITY = ("spearman", "pearson", *RANKING, "fidelity")
_LANGUAGE = ("perplexity", "fidelity", "kl_divergence", "spearman", "pearson")
METRICS_OF_HEADS: dict[str, tuple[str, ...]] = {
    "number": ("spearman", "pearson", "mse", *RANKING, "fidelity"),
    "labels": ("f1", "f1_micro", "f1_macro", "accuracy", "fidelity", "kl_divergence"),
    "classes": (
        "accuracy", "f1", "f1_micro", "f1_macro", "matthews", "fidelity", "kl_divergence",
    ),
}  # fmt: skip
"""Of text classification, by what the head predicts."""
METRICS_OF_TASKS: dict[str, tuple[str, ...]] = {
    "sentence-similarity": _SIMILARITY,
    "feature-extraction": _SIMILARITY,
    "text-classification": tuple(
        dict.fromkeys(name for names in METRICS_OF_HEADS.values() for name in names)
    ),
    "reranking": (*RANKING, "spearman", "pearson", "mse", "fidelity"),
    "fill-mask": _LANGUAGE,
    "text-generation": _LANGUAGE,
    "translation": ("bleu", "chrf", "perplexity", "fidelity", "kl_divergence"),
    "question-answering": ("exact_match", "f1", "fidelity"),
    "token-classification": ("f1", "accuracy", "fidelity"),
}
OF_WINDOWS = ("perplexity", "kl_divergence", "fidelity")
"""Metrics that windows of joined texts can be read for, in text generation."""
DEFAULT_METRICS = {
    "sentence-similarity": "spearman",
    "feature-extraction": "spearman",
    "text-classification": "accuracy",
    "reranking": "ndcg",
    "fill-mask": "perplexity",
    "text-generation": "perplexity",
    "translation": "bleu",
    "question-answering": "f1",
    "token-classification": "f1",
}
"""What a task is judged by unless something else is asked for."""
LIBRARIES = {
    "mteb": ("sentence-similarity", "feature-extraction"),
    "lm_eval": ("text-generation",),
}
"""Libraries whose tasks are metrics, as `lm_eval:hellaswag`, and the tasks of models for which."""
RELATIVE = ("fidelity", "kl_divergence")
"""Metrics that compare with the original model, and need no labels."""
_LOWER = ("perplexity", "kl_divergence", "mse", "bits_per_byte", "brier_score")


def lower_is_better(metric: str) -> bool:
    """Say which way a metric goes; of a library, by the name behind the last slash."""
    name = metric.rpartition("/")[2]
    return name in _LOWER or (library_of(metric) != "" and name.endswith("_perplexity"))


def library_of(metric: str) -> str:
    """Return the library whose task a metric is; empty where it is one of plmcc."""
    name, colon, _ = metric.partition(":")
    return name if colon else ""


def is_of(metric: str, task: str) -> bool:
    """Say whether a metric is one of a task's."""
    allowed = METRICS_OF_TASKS[task]
    library = library_of(metric)
    return task in LIBRARIES.get(library, ()) if library else metric in allowed


def check_name(
    metric: str, place: str, known: Sequence[str] = get_args(Metric), message: str = ""
) -> None:
    """Check the name of a metric that was given on the command line or to a function.

    Args:
        metric: the name.
        place: the option or argument.
        known: what may be given.
        message: what is wrong otherwise; by default that it is unknown.

    Raises:
        PlmccError: it is none of these.
    """
    if metric not in known and library_of(metric) not in LIBRARIES:
        allowed, hint = ", ".join(known), did_you_mean(metric, known)
        message = message or "unknown metric"
        raise error("PLM502", message, place, got=metric, allowed=allowed, hint=hint)
