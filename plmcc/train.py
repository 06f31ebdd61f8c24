"""Fine-tuning a rewritten model: transformers.Trainer with the passes' objectives and
distillation."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from plmcc import checkpoints, ranks
from plmcc.diagnostics import PlmccError, error, out_of_memory
from plmcc.distill import Distillation
from plmcc.recipe import Train
from plmcc.rewrite import Replacement
from plmcc.schedule import Average
from plmcc.tasks import LABELS
from plmcc.trainer import Clock, DistillingTrainer, Lesson

__all__ = ["Lesson", "check_lesson", "train"]


def train(
    model: PreTrainedModel,
    settings: Train,
    lesson: Lesson,
    replacements: Sequence[Replacement],
    steps: int | None = None,
    folder: Path | None = None,
) -> list[dict[str, float]]:
    """Train in place and return the Trainer's log (losses, learning rates, steps).

    Objectives are told that there are `steps` steps; by default as many as there are. With a
    `folder` checkpoints are written into it, and a training that has some there goes on.

    Raises:
        PlmccError: there is nothing to learn from, the teacher does not fit, or the loss is not
            finite.
    """
    check_lesson(settings, lesson)
    distill = None
    if settings.distill and lesson.teacher is not None:
        chosen = (settings.distill, lesson.pooling, lesson.task)
        distill = Distillation(model, lesson.teacher, *chosen)
    objectives = [done.objective for done in replacements if done.objective is not None]
    average, timer = Average(settings.average_last or 0), checkpoints.Timer()
    callbacks = [
        Clock(objectives, lesson.collate, steps),
        average,
        *([timer] if folder is not None else []),
    ]
    with (
        _somewhere(folder) as place,
        _trainable(model, settings, replacements),
        _forward_kept(model),
    ):
        trainer = _made(model, settings, lesson, place, callbacks)
        trainer.setup(settings, lesson, distill, objectives, average, timer)
        _run(trainer, checkpoints.latest(place))
        average.finish(model)
    model.eval()
    return list(trainer.state.log_history)


@contextmanager
def _somewhere(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that is gone afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="plmcc-train-") as made:
        yield Path(made)


def _made(
    model: PreTrainedModel,
    settings: Train,
    lesson: Lesson,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> DistillingTrainer:
    arguments = _arguments(settings, lesson, folder)
    try:
        trainer = DistillingTrainer(
            model=model,
            args=arguments,
            train_dataset=lesson.train,
            eval_dataset=lesson.eval,
            data_collator=lesson.collate,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, ImportError, ZeroDivisionError, RuntimeError) as problem:
        if out_of_memory(problem):
            raise
        raise _refused(problem) from None  # a tracker that is not installed is a RuntimeError
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        message = "a model that is being rewritten has to be whole on every device"
        raise error("PLM303", message, "train.arguments", given="FSDP or DeepSpeed",
                    cure="launch plain data parallelism (torchrun, MULTI_GPU)")  # fmt: skip
    return trainer


def _run(trainer: DistillingTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except PlmccError:
        raise
    except (ValueError, ZeroDivisionError, ImportError) as problem:
        raise _refused(problem) from None
    if trainer.state.global_step == 0:
        cure = "check `max_steps`, `num_train_epochs` and the number of rows"
        raise error("PLM303", "the training took no step", "train.arguments", cure=cure)


def _refused(problem: Exception) -> PlmccError:
    message = f"the trainer refuses its arguments: {problem}"
    return error("PLM303", message, "train.arguments")


@contextmanager
def _forward_kept(model: PreTrainedModel) -> Iterator[None]:
    """Mixed precision replaces `model.forward` on the instance; left there, the model would go on
    computing in bfloat16. (accelerate's own way back strips transformers' decorators too.)"""
    names = ("forward", "_original_forward")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def check_lesson(settings: Train, lesson: Lesson) -> None:
    """Check what can be known before anything is rewritten.

    Raises:
        PlmccError: there is nothing to learn from, or settings exclude each other.
    """
    _check_dropout(settings)
    _check_smoothing(settings, lesson)
    has_labels = any(name in lesson.train.column_names for name in LABELS)
    makes_labels = lesson.task in ("fill-mask", "text-generation")
    if lesson.task == "translation" and not has_labels:
        if settings.distill is None or settings.distill.sequence is None:
            cure = "name the translations with `target:`, or learn from a teacher's by `sequence:`"
            raise error("PLM303", "the training rows have no translations", "train", cure=cure)
        return
    if settings.distill is None and not has_labels and not makes_labels:
        message = (
            f"there is nothing to learn from: {lesson.task} without labels and without `distill`"
        )
        raise error(
            "PLM303", message, "train", cure="add `distill:` or name the column with `label:`"
        )


def _check_dropout(settings: Train) -> None:
    if not settings.dropout and settings.arguments.get("gradient_checkpointing"):
        message = "with `dropout: false` transformers does not checkpoint activations"
        raise error(
            "PLM303",
            message,
            "train.dropout",
            cure="remove `gradient_checkpointing` or `dropout: false`",
        )


def _check_smoothing(settings: Train, lesson: Lesson) -> None:
    unlike = ("sentence-similarity", "feature-extraction", "question-answering")
    classes = lesson.task not in unlike
    if settings.arguments.get("label_smoothing_factor") and not classes:
        message = f"{lesson.task} has no classes or tokens whose labels could be smoothed"
        cure = "remove `label_smoothing_factor`"
        raise error("PLM303", message, "train.arguments.label_smoothing_factor", cure=cure)


def _arguments(settings: Train, lesson: Lesson, folder: Path) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "save_total_limit": 2,  # a checkpoint that is being written leaves one that is whole
        "logging_steps": 25,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    on_cpu = not torch.cuda.is_available()
    chosen |= {
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu and not torch.backends.mps.is_available(),
    }
    if on_cpu and ranks.count() > 1:
        chosen["ddp_backend"] = "gloo"
    chosen |= dict(settings.arguments)
    try:
        return TrainingArguments(
            output_dir=str(folder),
            remove_unused_columns=False,
            seed=lesson.seed,
            **_without_seed(chosen),
        )
    except (ValueError, TypeError, ImportError) as problem:
        raise _refused(problem) from None


def _without_seed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "seed"}


@contextmanager
def _trainable(
    model: PreTrainedModel, settings: Train, replacements: Sequence[Replacement]
) -> Iterator[None]:
    """Freeze what the settings leave out; afterwards everything is as it was."""
    chosen = _left_out(model, settings, replacements)
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) in chosen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _left_out(
    model: PreTrainedModel, settings: Train, replacements: Sequence[Replacement]
) -> set[int]:
    """Return the ids of the parameters that are not to be trained."""
    if settings.trainable == "all":
        return set()
    if settings.trainable == "all_but_embeddings":
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        return {id(parameter) for table in tables for parameter in table.parameters()}
    ours = {id(p) for done in replacements for p in done.soft.parameters()}
    if not ours:
        message = (
            "`trainable: passes` leaves nothing to train: no pass of this stage has parameters"
        )
        raise error("PLM303", message, "train.trainable", cure="write `trainable: all`")
    return {id(p) for p in model.parameters()} - ours
