"""Fine-tuning a rewritten model: transformers.Trainer with the passes' objectives and
distillation."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from plmcc.data.tasks import LABELS
from plmcc.diagnostics import PlmccError, error, out_of_memory
from plmcc.recipe.load import Train
from plmcc.recipe.training_arguments import checkpoints_activations
from plmcc.rewrite import Replacement
from plmcc.training import checkpoints
from plmcc.training.adapters import adapters
from plmcc.training.distillation import Distillation
from plmcc.training.schedule import Average
from plmcc.training.trainer import DistillingTrainer, ProgressCallback, TrainingData
from plmcc.utils import distributed
from plmcc.utils.attributes import kept
from plmcc.utils.types import Values

__all__ = ["TrainingData", "check_training_data", "train"]


def train(
    model: PreTrainedModel,
    settings: Train,
    training_data: TrainingData,
    replacements: Sequence[Replacement],
    steps: int | None = None,
    folder: Path | None = None,
) -> list[dict[str, float]]:
    """Train in place and return the Trainer's log. Objectives are told that there are `steps`
    steps; by default as many as there are. With a `folder` checkpoints are written into it, and a
    training that has some there goes on.

    Raises:
        PlmccError: there is nothing to learn from, the teacher does not fit, or the loss is not
            finite.
    """
    check_training_data(settings, training_data)
    distill = None
    if settings.distill and training_data.teacher is not None:
        chosen = (settings.distill, training_data.pooling, training_data.task)
        distill = Distillation(model, training_data.teacher, *chosen)
    found = {id(done.objective): done.objective for done in replacements}  # sites may share one
    objectives = [objective for objective in found.values() if objective is not None]
    average, timer = Average(settings.average_last or 0), checkpoints.Timer()
    progress = ProgressCallback(objectives, training_data.collate, steps)
    callbacks = [progress, average, *([timer] if folder is not None else [])]
    with (
        _somewhere(folder) as location,
        _trainable(model, settings, replacements),
        # Mixed precision replaces `forward` on the instance: left there, the model would go on
        # computing in bfloat16. (accelerate's own way back strips transformers' decorators too.)
        kept(model, "forward", "_original_forward"),
        _configs_kept(model),
    ):
        trainer = _made(model, settings, training_data, location, callbacks)
        trainer.setup(settings, training_data, distill, objectives, average, timer)
        _run(trainer, checkpoints.latest(location))
        average.finish(model)
    model.eval()
    return _logged(trainer)


def _logged(trainer: DistillingTrainer) -> list[dict[str, float]]:
    """Return what was logged, without the summary at the end: it is of this process only, where an
    interrupted training was resumed."""
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


@contextmanager
def _configs_kept(model: PreTrainedModel) -> Iterator[None]:
    """Put back what the training changes in configurations: the Trainer turns the cache off."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: list[Any] = [part.config for part in parts]
    found += [c for p in parts if (c := getattr(p, "generation_config", None)) is not None]
    before = [(config, dict(vars(config))) for config in found]
    try:
        yield
    finally:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)


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
    training_data: TrainingData,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> DistillingTrainer:
    arguments = _arguments(settings, training_data, folder)
    try:
        trainer = DistillingTrainer(
            model=model,
            args=arguments,
            train_dataset=training_data.train,
            eval_dataset=training_data.eval,
            data_collator=training_data.collate,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, ImportError, ZeroDivisionError, RuntimeError) as problem:
        if out_of_memory(problem):
            raise
        raise _refused(problem) from None  # a tracker that is not installed is a RuntimeError
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        message = "sharded training is not supported: every device needs the whole model"
        raise error(
            "PLM303",
            message,
            "train.arguments",
            got="FSDP or DeepSpeed",
            hint="launch plain data parallelism (torchrun, MULTI_GPU)",
        )
    return trainer


def _run(trainer: DistillingTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except PlmccError:
        raise
    except (ValueError, ZeroDivisionError, ImportError) as problem:
        raise _refused(problem) from None
    if trainer.state.global_step == 0:
        hint = "check `max_steps`, `num_train_epochs` and the number of rows"
        raise error("PLM303", "the training ran no step", "train.arguments", hint=hint)


def _refused(problem: Exception) -> PlmccError:
    message = f"the Trainer rejects its arguments: {problem}"
    return error("PLM303", message, "train.arguments")


def check_training_data(settings: Train, training_data: TrainingData) -> None:
    """Check what can be known before anything is rewritten.

    Raises:
        PlmccError: there is nothing to learn from, or settings exclude each other.
    """
    _check_dropout(settings)
    _check_smoothing(settings, training_data)
    has_labels = any(name in training_data.train.column_names for name in LABELS)
    makes_labels = training_data.task in ("fill-mask", "text-generation")
    if training_data.task == "translation" and not has_labels:
        if settings.distill is None or settings.distill.sequence is None:
            hint = "add `target:` with the translations, or `sequence:` to learn from a teacher"
            raise error("PLM303", "the training rows have no translations", "train", hint=hint)
        return
    if settings.distill is None and not has_labels and not makes_labels:
        task = training_data.task
        message = f"there is nothing to learn from: {task} without labels and without `distill`"
        raise error(
            "PLM303",
            message,
            "train",
            hint="add `distill:` or set `label:` to the name of the column",
        )


def _check_dropout(settings: Train) -> None:
    key = checkpoints_activations(settings.arguments)
    if not settings.dropout and key:
        message = "with `dropout: false` transformers does not checkpoint activations"
        raise error(
            "PLM303",
            message,
            "train.dropout",
            hint=f"remove `{key}` or `dropout: false`",
        )


def _check_smoothing(settings: Train, training_data: TrainingData) -> None:
    unlike = ("sentence-similarity", "feature-extraction", "question-answering")
    labels = training_data.train.features.get("labels")
    numbers = getattr(labels, "dtype", "list").startswith(("float", "double", "list"))
    per_text = training_data.task == "text-classification" and labels is not None
    classes = training_data.task not in unlike and not (per_text and numbers)
    if settings.arguments.get("label_smoothing_factor") and not classes:
        message = f"{training_data.task} has no classes or tokens whose labels could be smoothed"
        hint = "remove `label_smoothing_factor`"
        raise error("PLM303", message, "train.arguments.label_smoothing_factor", hint=hint)


def _arguments(settings: Train, training_data: TrainingData, folder: Path) -> TrainingArguments:
    chosen: Values = {
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
    if on_cpu and distributed.world_size() > 1:
        chosen["ddp_backend"] = "gloo"
    chosen |= dict(settings.arguments)
    try:
        return TrainingArguments(
            output_dir=str(folder),
            remove_unused_columns=False,
            seed=training_data.seed,
            **_without_seed(chosen),
        )
    except (ValueError, TypeError, ImportError) as problem:
        raise _refused(problem) from None


def _without_seed(arguments: Values) -> Values:
    return {name: value for name, value in arguments.items() if name != "seed"}


@contextmanager
def _trainable(
    model: PreTrainedModel, settings: Train, replacements: Sequence[Replacement]
) -> Iterator[None]:
    """Freeze what the settings leave out, and what is computed and not saved, such as sinusoidal
    positions (transformers 5.24 loads them as trainable); afterwards everything is as it was."""
    asked = settings.lora()
    beside = nullcontext() if asked is None else adapters(model, asked)
    with beside, _frozen(model, settings, replacements):
        yield


@contextmanager
def _frozen(
    model: PreTrainedModel, settings: Train, replacements: Sequence[Replacement]
) -> Iterator[None]:
    unsaved = set(model._keys_to_ignore_on_save or ())
    chosen = {id(p) for name, p in model.named_parameters() if name in unsaved}
    chosen |= _left_out(model, settings, replacements)
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
    if settings.lora() is not None:
        ours = {id(p) for done in replacements for p in done.soft.parameters()}
        names = (n for n, _ in model.named_parameters() if ".lora_" in n)
        ours |= {id(model.get_parameter(name)) for name in names}
        return {id(p) for p in model.parameters()} - ours
    if settings.trainable == "all_but_embeddings":
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        return {id(parameter) for table in tables for parameter in table.parameters()}
    ours = {id(p) for done in replacements for p in done.soft.parameters()}
    if not ours:
        message = (
            "`trainable: passes` leaves nothing to train: no pass of this stage has parameters"
        )
        raise error("PLM303", message, "train.trainable", hint="write `trainable: all`")
    return {id(p) for p in model.parameters()} - ours
