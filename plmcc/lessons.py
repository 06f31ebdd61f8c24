"""The data of a recipe, read and encoded for its stages and figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from plmcc.data import SYNTHETIC, Rows, load_rows, synthetic_rows
from plmcc.diagnostics import error
from plmcc.recipe import Data, Recipe, Stage, Synthetic, Train
from plmcc.source import Source, load_source
from plmcc.tasks import classes_of, collator, encode
from plmcc.train import Lesson


def with_teacher(lesson: Lesson, settings: Train, original: PreTrainedModel | None) -> Lesson:
    """Add the teacher that the settings name.

    Raises:
        PlmccError: it cannot be loaded.
    """
    if settings.distill is None:
        return lesson
    if settings.distill.teacher == "original":
        return replace(lesson, teacher=original)
    teacher = load_source(settings.distill.teacher, lesson.task).model
    return replace(lesson, teacher=teacher.requires_grad_(False))


def lesson_of(stage: Stage, recipe: Recipe, source: Source, base: Path | None) -> Lesson:
    """Read and encode a stage's data; wrong data ends here, before anything is fitted."""
    assert stage.train is not None
    _check_architecture(source, "train")
    data = stage.train.data
    collate = collator(source.task, source.tokenizer)
    options = {"pooling": source.pooling, "seed": recipe.seed}
    if data.train == SYNTHETIC:
        vocabulary = int(source.model.config.get_text_config().vocab_size)
        settings = data.synthetic or Synthetic()
        drawn = synthetic_rows(settings, vocabulary, source.tokenizer, recipe.seed)
        return Lesson(source.task, drawn, collate, **options)  # type: ignore[arg-type]
    encoded = _encoded(data, data.train, source, base)
    evaluated = _encoded(data, data.eval, source, base) if data.eval else None
    return Lesson(source.task, encoded, collate, eval=evaluated, **options)  # type: ignore[arg-type]


def _encoded(data: Data, names: str | list[str], source: Source, base: Path | None) -> Any:
    tokenizer = source.need_tokenizer("training on text")
    rows = load_rows(names, data.text, data.label, data.limit, base)
    classes = classes_of(source.model) if source.task == "text-classification" else 0
    return encode(rows, source.task, tokenizer, source.max_length(data.max_length), classes)


def _check_architecture(source: Source, key: str) -> None:
    if source.model.config.is_encoder_decoder:
        message = "encoder-decoder models can be rewritten, but not yet trained or evaluated"
        raise error(
            "PLM303", message, key, given=type(source.model).__name__, cure=f"remove `{key}`"
        )


def classes_shown(recipe: Recipe, base: Path | None) -> int | None:
    """The number of classes that labelled training data shows, for a head that has to be made."""
    if recipe.task != "text-classification":
        return None
    for stage in recipe.steps():
        if stage.train and stage.train.data.train != SYNTHETIC:
            data = stage.train.data
            rows = load_rows(data.train, data.text, data.label, data.limit, base)
            labels = (
                {int(v) for v in rows.labels() if str(v).lstrip("-").isdigit()}
                if rows.label
                else set()
            )
            return max(labels, default=1) + 1
    return None


def evaluation_rows(recipe: Recipe, source: Source, base: Path | None) -> list[Rows]:
    """Read the rows of every figure; wrong data ends here, before anything is fitted."""
    if recipe.evaluate:
        _check_architecture(source, "evaluate")
        source.need_tokenizer("evaluation")
    return [
        load_rows(asked.data, asked.text, asked.label, asked.limit, base)
        for asked in recipe.evaluate
    ]
