"""The data of a recipe, read and encoded for its stages and figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from plmcc import question_answering, token_classification
from plmcc.data import SYNTHETIC, Rows, load_rows, synthetic_rows
from plmcc.diagnostics import error
from plmcc.distill import Distillation
from plmcc.evaluate import check_metric
from plmcc.programs import positions_of
from plmcc.recipe import Data, Evaluate, Recipe, Stage, Synthetic, Train
from plmcc.source import Source, load_source
from plmcc.tasks import classes_of, collator, encode
from plmcc.token_classification import named_labels
from plmcc.train import Lesson, check_lesson
from plmcc.translation import taught


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
    assert teacher is not None, "a recipe for a new model names another teacher"
    Distillation(source.model, teacher, distill, lesson.pooling, lesson.task)
    if distill.sequence is None:
        return replace(lesson, teacher=teacher)
    positions, sequence = positions_of(source.model.config, "decoder"), distill.sequence
    if positions is not None and sequence.max_new_tokens > positions:
        if "max_new_tokens" in sequence.model_fields_set:
            message = "the teacher's translations may be longer than the model can write"
            place = "train.distill.sequence.max_new_tokens"
            given, allowed = str(sequence.max_new_tokens), f"at most {positions}"
            raise error("PLM303", message, place, given=given, allowed=allowed)
        sequence = sequence.model_copy(update={"max_new_tokens": positions})
    return replace(lesson, teacher=teacher, train=taught(lesson.train, teacher, sequence))


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
    collate = collator(source.task, source.tokenizer, source.model.config, recipe.seed)
    options = {"pooling": source.pooling, "seed": recipe.seed}
    if data.train == SYNTHETIC:
        vocabulary = int(source.model.config.get_text_config().vocab_size)
        settings = data.synthetic or Synthetic()
        drawn = synthetic_rows(settings, vocabulary, source.tokenizer, recipe.seed)
        return Lesson(source.task, drawn, collate, **options)  # type: ignore[arg-type]
    encoded = _encoded(data, data.train, data.target, source, base)
    evaluated = _encoded(data, data.eval, data.eval_target, source, base) if data.eval else None
    return Lesson(source.task, encoded, collate, eval=evaluated, **options)  # type: ignore[arg-type]


def _encoded(
    data: Data,
    names: str | list[str],
    target: str | list[str] | None,
    source: Source,
    base: Path | None,
) -> Any:
    tokenizer = source.need_tokenizer("training on text")
    if target is not None and source.task != "translation":
        cure = "set `task: translation`, or remove it"
        raise error("PLM303", f"{source.task} has no use for translations", "train.data.target",
                    given=source.task, cure=cure)  # fmt: skip
    if data.stride is not None and source.task != question_answering.TASK:
        raise error("PLM303", f"`stride` has no effect on {source.task}", "train.data.stride",
                    given=str(data.stride), cure="remove it")  # fmt: skip
    rows = rows_of(source.task, data, names, base, target)
    length = source.max_length(data.max_length)
    if "max_length" in data.model_fields_set and length < data.max_length:
        note = f"`max_length: {data.max_length}` is more than the model reads; texts are cut after"
        source.notes += (f"{note} {length} tokens",)
    if rows.skipped:
        source.notes += (f"{rows.skipped} rows of {rows.source} without text are left out",)
    classes = classes_of(source.model) if source.task == "text-classification" else 0
    if source.task == "translation":
        check_end(source)
    labels = source.model.config.label2id
    return encode(rows, source.task, tokenizer, length, classes, labels, data.stride)


def check_end(source: Source) -> None:
    """Check that tokenizer and model agree on how a sentence ends.

    Raises:
        PlmccError: the tokenizer has no end, or another one than generation stops at.
    """
    tokenizer = source.need_tokenizer("translation")
    settings: Any = source.model.generation_config
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [
        settings.eos_token_id
    ]  # fmt: skip
    if tokenizer.eos_token_id is None:
        message = "the tokenizer has no token for the end of a sentence: no translation would end"
        raise error("PLM303", message, source.name, cure="set `eos_token` in its files")
    if tokenizer.eos_token_id not in stops:
        message = "tokenizer and model end sentences with different tokens"
        given = f"{tokenizer.eos_token_id} and {', '.join(map(str, stops))}"
        raise error("PLM303", message, source.name, given=given,
                    cure="make eos_token_id in generation_config.json the tokenizer's")  # fmt: skip


def _check_architecture(source: Source, key: str) -> None:
    """Encoder-decoders are trained on and judged by text in, text out."""
    config = source.model.config
    given = type(source.model).__name__
    reads_text = source.model.main_input_name == "input_ids"
    if config.is_encoder_decoder != (source.task == "translation"):
        message = f"the task {source.task} does not fit this model"
        other = "name an encoder-decoder, such as Marian, BART or T5"
        cure = "set `task: auto`" if config.is_encoder_decoder else other
        raise error("PLM303", message, key, given=given, cure=cure)
    if config.is_encoder_decoder and not reads_text:
        message = "models that read something else than text can be rewritten, but not trained"
        raise error("PLM303", message, key, given=given, cure=f"remove `{key}`")
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        cure = "set decoder_start_token_id in its config.json"
        raise error("PLM303", "the model does not say what its decoder starts with", key,
                    given=given, cure=cure)  # fmt: skip


def rows_of(
    task: str,
    asked: Data | Evaluate,
    names: str | list[str],
    base: Path | None,
    target: str | list[str] | None = None,
) -> Rows:
    """Read rows as a task needs them; `names` and `target` are the files."""
    given = (names, asked.text, asked.label, asked.limit, base)
    if task == question_answering.TASK:
        return question_answering.load_questions(*given)
    if task == token_classification.TASK:
        return token_classification.load_sentences(*given)
    return load_rows(*given, target)


def head_shown(recipe: Recipe, base: Path | None) -> dict[str, Any] | None:
    """The number or names of classes that labelled training data shows, for a head that has to be
    made; values of the model's config."""
    task: str = recipe.task
    if task == question_answering.TASK:
        return {"num_labels": 2}  # start and end
    if task not in ("text-classification", token_classification.TASK):
        return None
    for stage in recipe.steps():
        if stage.train and stage.train.data.train != SYNTHETIC:
            rows = rows_of(task, stage.train.data, stage.train.data.train, base)
            if rows.label is None:
                return {"num_labels": 2}
            if task == "text-classification":
                return _numbered({str(value) for value in rows.labels()})
            return _named({name for row in named_labels(rows) for name in row})
    return None


def _numbered(labels: set[str]) -> dict[str, Any]:
    numbers = {int(label) for label in labels if label.lstrip("-").isdigit()}
    return {"num_labels": max(numbers, default=1) + 1}


def _named(labels: set[str]) -> dict[str, Any]:
    if all(label.isdigit() for label in labels):
        return _numbered(labels)
    names = sorted(labels, key=lambda label: (label != "O", label))
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def evaluation_rows(recipe: Recipe, source: Source, base: Path | None) -> list[Rows]:
    """Read the rows of every figure; wrong data ends here, before anything is fitted."""
    if recipe.evaluate:
        _check_architecture(source, "evaluate")
        source.need_tokenizer("evaluation")
        if source.task == "translation":
            check_end(source)
    for index, asked in enumerate(recipe.evaluate):
        check_metric(asked.metric, source.task, recipe.place(("evaluate", index, "metric")))
    return [
        rows_of(source.task, asked, asked.data, base, asked.target) for asked in recipe.evaluate
    ]
