"""The metrics of a recipe, and how long the model takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from plmcc.data import question_answering
from plmcc.data.rows import Rows
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.latency import Latency, measure
from plmcc.models.source import Source
from plmcc.pipeline.datasets import evaluation_rows
from plmcc.recipe.load import Evaluate, Recipe

_EVALUATED = 256  # tokens of a text that evaluation reads
_WINDOW = 384  # or of a window of a long context, as in the scripts of BERT


@dataclass(frozen=True)
class Judge:
    """The metrics that a recipe asks for, with the rows of each."""

    recipe: Recipe
    rows: list[Rows]

    @classmethod
    def of(cls, recipe: Recipe, source: Source, base: Path | None) -> Judge:
        """Read the rows.

        Raises:
            PlmccError: they cannot be read, or do not fit the metric.
        """
        return cls(recipe, evaluation_rows(recipe, source, base))

    def metrics(self, source: Source, original: PreTrainedModel | None) -> list[float]:
        """Return the value of each metric for a model as it is.

        Args:
            source: the model, with its tokenizer.
            original: what `fidelity` and `kl_divergence` compare with.
        """
        if not self.rows:
            return []
        tokenizer = source.need_tokenizer("evaluation")
        window = source.task == question_answering.TASK
        length = source.max_length(_WINDOW if window else _EVALUATED)

        def evaluator(asked: Evaluate) -> Evaluator:
            search = (asked.num_beams, asked.max_new_tokens)
            return Evaluator(source.model, tokenizer, source.pooling, original, length, *search)

        pairs = zip(self.recipe.evaluate, self.rows, strict=True)
        return [evaluator(asked).compute(asked.metric, rows) for asked, rows in pairs]

    def latency(self, original: PreTrainedModel, model: PreTrainedModel) -> list[Latency]:
        """Measure both models side by side, compiled where the recipe says so."""
        lower = self.recipe.lower
        return measure(original, model, compiled=lower is not None and "compile" in lower.to)
