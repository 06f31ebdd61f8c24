"""The data of a recipe, read and encoded for its stages and figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from plmcc.data import SYNTHETIC, Rows, load_rows, synthetic_rows
from plmcc.diagnostics import error
from plmcc.distill import Distillation
from plmcc.recipe import Data, Recipe, Stage, Synthetic, Train
from plmcc.source import Source, load_source
from plmcc.tasks import classes_of, collator, encode
from plmcc.train import Lesson, check_lesson


def with_teacher(
    lesson: Lesson, settings: Train, original: PreTrainedModel | None, source: Source
) -> Lesson:
    """Add the teacher that the settings name and check that training can begin.

    Raises:
        PlmccError: the teacher cannot be loaded or does not fit, or there is nothing to learn from.
    """
    check_lesson(settings, lesson)
    distill = settings.distill
    if distill is None:
        return lesson
    teacher = original if distill.teacher == "original" else _other_teacher(distill.teacher, source)
    assert teacher is not None
    Distillation(source.model, teacher, distill, lesson.pooling, lesson.task)
    return replace(lesson, teacher=teacher)


def _other_teacher(name: str, source: Source) -> PreTrainedModel:
    teacher = load_source(name, source.task)
    known = [s.tokenizer.get_vocab() for s in (source, teacher) if s.tokenizer is not None]
    if len(known) == 2 and known[0] != known[1]:
        message = "the teacher's tokenizer numbers tokens differently: it would misread every text"
        raise error("PLM303", message, "train.distill.teacher", given=name)
    teacher.model.requires_grad_(False)
    return teacher.model


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
    if rows.skipped:
        source.notes += (f"{rows.skipped} rows of {rows.source} without text are left out",)
    classes = classes_of(source.model) if source.task == "text-classification" else 0
    length, labels = source.max_length(data.max_length), source.model.config.label2id
    return encode(rows, source.task, tokenizer, length, classes, labels)


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
