"""The data of a recipe, read and encoded for its stages and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plmcc.data import chat, classification, question_answering, token_classification
from plmcc.data.check import rows_of
from plmcc.data.collate import collator
from plmcc.data.encoding import encode, packed
from plmcc.data.rows import SYNTHETIC, Rows, data_files, rows_by_file, synthetic_rows
from plmcc.data.tasks import GENERATION
from plmcc.data.token_classification import named_labels
from plmcc.diagnostics import Location, error, listing
from plmcc.evaluation.evaluator import check_metric
from plmcc.evaluation.libraries import check_task
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.probes import positions_of
from plmcc.models.source import Source, load_source
from plmcc.pipeline.calibration import calibration_data
from plmcc.recipe.load import Calibrate, Data, Evaluate, Recipe, Stage, Synthetic, Train
from plmcc.recipe.metrics import RANKING, library_of
from plmcc.training.distillation import Distillation
from plmcc.training.loop import TrainingData, check_training_data
from plmcc.training.sequences import with_teacher_targets
from plmcc.utils.types import Values

_OF_NUMBERS = ("spearman", "pearson", "mse", *RANKING)
"""Metrics by which text classification is regression."""


@dataclass(frozen=True)
class StageData:
    """What the stages of a recipe train and calibrate on, by the names of the stages."""

    recipe: Recipe
    source: Source
    """The model, with notes on the data."""
    training: dict[str, TrainingData] = field(default_factory=dict)
    calibration: dict[str, CalibrationData] = field(default_factory=dict)
    calibrated_on: TrainingData | None = None
    """Where the recipe has `calibrate`: all its rows, encoded."""

    def with_teachers(self, original: PreTrainedModel | None) -> StageData:
        """Return the same with the teachers that the recipe names.

        Raises:
            PlmccError: a teacher cannot be loaded or does not fit.
        """
        settings = {stage.name: stage.train for stage in self.recipe.steps() if stage.train}
        training = {
            name: with_teacher(data, settings[name], original, self.source)
            for name, data in self.training.items()
        }
        return replace(self, training=training)


def load_data(recipe: Recipe, source: Source, base: Path | None) -> StageData:
    """Read and encode the data of all stages; wrong data is an error here, before anything is
    fitted.

    Raises:
        PlmccError: data cannot be read, or does not fit the task.
    """
    training: dict[str, TrainingData] = {}
    notes = list(source.notes)
    for stage in recipe.steps():
        if stage.train:
            training[stage.name], more = training_data_of(stage, recipe, source, base)
            notes += more
    source = replace(source, notes=tuple(notes))
    asked = recipe.calibration()
    if asked is not None:
        return _calibrated(recipe, asked, source, training, base)
    drawn = {
        stage.name: calibration_data(
            training[stage.name], source.tokenizer, synthetic=stage.train.data.train == SYNTHETIC
        )
        for stage in recipe.steps()
        if stage.train
    }
    return StageData(recipe, source, training, drawn)


def _calibrated(
    recipe: Recipe,
    asked: Calibrate,
    source: Source,
    training: dict[str, TrainingData],
    base: Path | None,
) -> StageData:
    """Return the same with one set of calibration data for all stages."""
    wanted = asked.as_data()
    if recipe.calibrate is None and source.task != GENERATION:  # of a pass: lines of text
        wanted = wanted.model_copy(update={"pack": False})
    data, notes = _data(wanted, "calibrate", recipe, source, base)
    synthetic = asked.data == SYNTHETIC
    if synthetic and any(p.needs_data() for stage in recipe.steps() for p in stage.passes):
        notes.append("what passes measure is measured on random token ids (`calibrate`)")
    one = calibration_data(data, source.tokenizer, rows=asked.rows, synthetic=synthetic)
    source = replace(source, notes=(*source.notes, *notes))
    return StageData(recipe, source, training, {s.name: one for s in recipe.steps()}, data)


def with_teacher(
    training_data: TrainingData, settings: Train, original: PreTrainedModel | None, source: Source
) -> TrainingData:
    """Add the teacher that the settings name and check that training can begin.

    Raises:
        PlmccError: the teacher cannot be loaded or does not fit, or there is nothing to learn from.
    """
    check_training_data(settings, training_data)
    distill = settings.distill
    if distill is None:
        return training_data
    teacher = original if distill.teacher == "original" else _other_teacher(distill.teacher, source)
    assert teacher is not None, "a recipe for a new model names another teacher"
    Distillation(source.model, teacher, distill, training_data.pooling, training_data.task)
    if distill.sequence is None:
        return replace(training_data, teacher=teacher)
    positions, sequence = positions_of(source.model, "decoder"), distill.sequence
    if positions is not None and sequence.max_new_tokens > positions:
        if "max_new_tokens" in sequence.model_fields_set:
            message = "the teacher's translations may be longer than the model can generate"
            location = "train.distill.sequence.max_new_tokens"
            given, allowed = str(sequence.max_new_tokens), f"at most {positions}"
            raise error("PLM303", message, location, got=given, allowed=allowed)
        sequence = sequence.model_copy(update={"max_new_tokens": positions})
    return replace(
        training_data,
        teacher=teacher,
        train=with_teacher_targets(training_data.train, teacher, sequence),
    )


def _other_teacher(name: str, source: Source) -> PreTrainedModel:
    teacher = load_source(name, source.task)
    known = [s.tokenizer.get_vocab() for s in (source, teacher) if s.tokenizer is not None]
    if len(known) == 2 and known[0] != known[1]:
        message = "the teacher's tokenizer has other token ids: it would misread every text"
        raise error("PLM303", message, "train.distill.teacher", got=name)
    teacher.model.requires_grad_(False)
    return teacher.model


def training_data_of(
    stage: Stage, recipe: Recipe, source: Source, base: Path | None
) -> tuple[TrainingData, list[str]]:
    """Read and encode the data of a stage; return it with notes for the user."""
    assert stage.train is not None
    return _data(stage.train.data, "train.data", recipe, source, base)


def _data(
    data: Data, key: str, recipe: Recipe, source: Source, base: Path | None
) -> tuple[TrainingData, list[str]]:
    check_architecture(source, key.removesuffix(".data"))
    collate = collator(source.task, source.tokenizer, source.model.config, recipe.seed)
    options: Values = {"pooling": source.pooling, "seed": recipe.seed}
    if data.train == SYNTHETIC:
        vocabulary = int(source.model.config.get_text_config().vocab_size)
        settings = data.synthetic or Synthetic()
        drawn = synthetic_rows(settings, vocabulary, source.tokenizer, recipe.seed)
        if key == "calibrate" and source.model.config.is_encoder_decoder:  # what the decoder reads
            targets = synthetic_rows(settings, vocabulary, source.tokenizer, recipe.seed + 1)
            drawn = drawn.add_column("labels", targets["input_ids"])
        return TrainingData(source.task, drawn, collate, **options), []
    encoded, notes = _encoded(data, data.train, data.target, source, base, key)
    evaluated = None
    if data.eval:
        evaluated, more = _encoded(data, data.eval, data.eval_target, source, base, key)
        notes += more
    return TrainingData(source.task, encoded, collate, eval=evaluated, **options), notes


def _encoded(
    data: Data,
    names: str | list[str],
    target: str | list[str] | None,
    source: Source,
    base: Path | None,
    key: str,
) -> tuple[object, list[str]]:
    tokenizer = source.need_tokenizer("reading text")
    _check_used(data, target, source.task, key)
    rows = source_rows(source, data, names, base, target)
    length, notes = source.max_length(data.max_length), []
    if "max_length" in data.model_fields_set and length < data.max_length:
        note = f"`max_length: {data.max_length}` is more than the model reads; texts are cut after"
        notes.append(f"{note} {length} tokens")
    own_formats = (question_answering.TASK, token_classification.TASK)
    if source.task not in own_formats:
        notes += _of_files(names, base)
    if rows.skipped:
        notes.append(f"{rows.skipped} rows of {rows.source} without text are left out")
    if source.task == "translation":
        check_end(source)
    if data.pack:
        return packed(rows, tokenizer, length), notes
    encoded = encode(rows, source.task, tokenizer, length, source.model.config, data.stride)
    kept = _with_targets(encoded, source.task, tokenizer)
    if len(kept) < len(encoded):
        left = f"{len(encoded) - len(kept)} rows of {rows.source} have nothing to predict"
        notes.append(f"{left}, and are left out")
    return kept, notes


def _of_files(names: str | list[str], base: Path | None) -> list[str]:
    """Say how many rows each of several files has."""
    found = rows_by_file(names, base) if len(data_files(names, base)) > 1 else {}
    told = [f"{count:,} in {file}" for file, count in found.items()]
    return [f"{sum(found.values()):,} rows: {listing(told)}"] if told else []


def _check_used(data: Data, target: str | list[str] | None, task: str, key: str) -> None:
    """Refuse what has no effect on a task."""
    if target is not None and task != "translation":
        hint = "set `task: translation`, or remove it"
        raise error(
            "PLM303",
            f"{task} does not use translations",
            f"{key}.target",
            got=task,
            hint=hint,
        )
    unused = {
        "stride": data.stride is not None and task != question_answering.TASK,
        "pack": data.pack and task != GENERATION,
    }
    for name, given in unused.items():
        if given:
            message, value = f"`{name}` has no effect on {task}", getattr(data, name)
            given_as = str(value).lower()
            raise error("PLM303", message, f"{key}.{name}", got=given_as, hint="remove it")


def _with_targets(encoded: Any, task: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the rows of a language model that have something to predict: a second token, or one
    that can be masked. The loss of a batch without any is a mean over nothing."""
    if task == GENERATION:
        rows = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > 1]
    elif task == "fill-mask":
        special = set(tokenizer.all_special_ids)
        rows = [i for i, ids in enumerate(encoded["input_ids"]) if not special.issuperset(ids)]
    else:
        return encoded
    if not rows:
        message, hint = "no text has anything to predict", "use text that the tokenizer knows"
        raise error("PLM303", message, "data", hint=hint)
    return encoded if len(rows) == len(encoded) else encoded.select(rows)


def check_end(source: Source) -> None:
    """Check that tokenizer and model agree on how a sentence ends.

    Raises:
        PlmccError: the tokenizer has no end, or another one than generation stops at.
    """
    tokenizer = source.need_tokenizer("translation")
    settings: Any = source.model.generation_config
    stops = (
        settings.eos_token_id
        if isinstance(settings.eos_token_id, list)
        else [settings.eos_token_id]
    )
    if tokenizer.eos_token_id is None:
        message = "the tokenizer has no token for the end of a sentence: no translation would end"
        raise error("PLM303", message, source.name, hint="set `eos_token` in its files")
    if tokenizer.eos_token_id not in stops:
        message = "tokenizer and model end sentences with different tokens"
        given = f"{tokenizer.eos_token_id} and {', '.join(map(str, stops))}"
        raise error(
            "PLM303",
            message,
            source.name,
            got=given,
            hint="make eos_token_id in generation_config.json the tokenizer's",
        )


def check_architecture(source: Source, key: str) -> None:
    """Check that a model can be trained on text and judged by it: encoder-decoders by text in, text
    out.

    Raises:
        PlmccError: it cannot; `key` is the section of the recipe that asks for it.
    """
    config = source.model.config
    given = type(source.model).__name__
    reads_text = source.model.main_input_name == "input_ids"
    if config.is_encoder_decoder != (source.task == "translation"):
        message = f"the task {source.task} does not fit this model"
        other = "name an encoder-decoder, such as Marian, BART or T5"
        hint = "set `task: auto`" if config.is_encoder_decoder else other
        raise error("PLM303", message, key, got=given, hint=hint)
    if config.is_encoder_decoder and not reads_text:
        message = "models that do not read text can be rewritten, but not trained"
        raise error("PLM303", message, key, got=given, hint=f"remove `{key}`")
    start = getattr(config, "decoder_start_token_id", None)  # unset, some configs lack it
    if config.is_encoder_decoder and start is None:
        hint = "set decoder_start_token_id in its config.json"
        raise error(
            "PLM303",
            "the model has no start token for its decoder",
            key,
            got=given,
            hint=hint,
        )


def source_rows(
    source: Source,
    asked: Data | Evaluate,
    names: str | list[str],
    base: Path | None,
    target: str | list[str] | None = None,
) -> Rows:
    """Read rows as the task of a model needs them, each text after the model's prompt."""
    rows = rows_of(source.task, asked, names, base, target)
    if chat.are_chats(rows):
        return chat.as_text(rows, source.need_tokenizer("reading conversations"))
    return replace(rows, prefix=source.pooling.prompt)


def infer_label_space(recipe: Recipe, base: Path | None) -> Values | None:
    """The number or names of classes that labeled training data shows, for a head that has to be
    made; values of the model's config."""
    task = classification.head_task(recipe.task)
    if task == question_answering.TASK:
        return {"num_labels": 2}  # start and end
    if task not in ("text-classification", token_classification.TASK):
        return None
    number = recipe.task == classification.RERANKING
    number |= any(asked.metric in _OF_NUMBERS for asked in recipe.evaluate)
    for stage in recipe.steps():
        if stage.train and stage.train.data.train != SYNTHETIC:
            data = stage.train.data
            rows = rows_of(task, data, data.train, base)
            if task == classification.TASK:
                columns = data.label if isinstance(data.label, list) else None
                return classification.new_head(rows, columns, number)
            if rows.label is None:
                return {"num_labels": 2}
            return classification.head_of({name for row in named_labels(rows) for name in row})
    return None


def evaluation_rows(
    asked: Sequence[Evaluate],
    source: Source,
    base: Path | None,
    places: Sequence[Location | str],
) -> list[Rows | None]:
    """Read the rows of every metric; wrong data is an error here, before anything is fitted.
    Libraries have their own rows: None.

    Args:
        asked: the metrics.
        source: the model, with its tokenizer and task.
        base: where relative paths start.
        places: where each metric was asked for, for an error.
    """
    if asked:
        check_architecture(source, "evaluate")
        source.need_tokenizer("evaluation")
        if source.task == "translation":
            check_end(source)
    for one, place in zip(asked, places, strict=True):
        check_metric(one.metric, source.task, place, source.model.config)
        if library_of(one.metric):
            check_task(one.metric, one.tasks, place)
    return [_rows_of(one, source, base) for one in asked]


def _rows_of(asked: Evaluate, source: Source, base: Path | None) -> Rows | None:
    if library_of(asked.metric):
        return None
    rows = source_rows(source, asked, asked.data, base, asked.target)
    return rows.spread(asked.sample, whole=asked.metric in RANKING)
