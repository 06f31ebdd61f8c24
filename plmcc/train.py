"""Fine-tuning a rewritten model: transformers.Trainer with the passes' objectives and
distillation."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from plmcc.api import Objective
from plmcc.diagnostics import PlmccError, error
from plmcc.distill import Distillation
from plmcc.recipe import Train
from plmcc.rewrite import Replacement
from plmcc.schedule import Average, TokenBatches
from plmcc.tasks import LABELS, Pooling, last_states, similarity_loss


@dataclass(frozen=True)
class Lesson:
    """Everything a stage's training needs besides the model: encoded rows, the task, and the
    teacher."""

    task: str
    train: Dataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    pooling: Pooling = field(default_factory=Pooling)
    eval: Dataset | None = None
    teacher: PreTrainedModel | None = None
    seed: int = 0


def train(
    model: PreTrainedModel,
    settings: Train,
    lesson: Lesson,
    replacements: Sequence[Replacement],
    steps: int | None = None,
) -> list[dict[str, float]]:
    """Train in place and return the Trainer's log (losses, learning rates, steps).

    Objectives are told that there are `steps` steps; by default as many as there are.

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
    folder = tempfile.mkdtemp(prefix="plmcc-train-")
    try:
        with _trainable(model, settings, replacements), _forward_kept(model):
            average = Average(settings.average_last or 0)
            trainer = _made(model, settings, lesson, folder, [_Clock(objectives, steps), average])
            trainer.setup(settings, lesson, distill, objectives)
            _run(trainer)
            average.finish(model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    model.eval()
    return list(trainer.state.log_history)


def _made(
    model: PreTrainedModel,
    settings: Train,
    lesson: Lesson,
    folder: str,
    callbacks: list[TrainerCallback],
) -> _Trainer:
    arguments = _arguments(settings, lesson, folder)
    try:
        return _Trainer(
            model=model,
            args=arguments,
            train_dataset=lesson.train,
            eval_dataset=lesson.eval,
            data_collator=lesson.collate,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, ImportError, ZeroDivisionError) as problem:
        raise _refused(problem) from None


def _run(trainer: _Trainer) -> None:
    try:
        trainer.train()
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


def _arguments(settings: Train, lesson: Lesson, folder: str) -> TrainingArguments:
    chosen = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 25,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    on_cpu = not torch.cuda.is_available()
    chosen |= {
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu and not torch.backends.mps.is_available(),
    }
    chosen |= dict(settings.arguments)
    try:
        return TrainingArguments(
            output_dir=folder,
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


class _Clock(TrainerCallback):
    """The only clock that a pass sees: 0 before the first step, 1 after the last."""

    def __init__(self, objectives: Sequence[Objective], steps: int | None = None) -> None:
        self.objectives, self.steps = objectives, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the objectives how long the stage is."""
        for objective in self.objectives:
            objective.begin(self.steps or state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the objectives how far the stage is."""
        for objective in self.objectives:
            objective.advance(state.global_step / max(1, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the objectives that the stage is over."""
        for objective in self.objectives:
            objective.advance(1.0)


class _Trainer(Trainer):
    """A Trainer whose loss is task + distillation + objectives."""

    def setup(
        self,
        settings: Train,
        lesson: Lesson,
        distill: Distillation | None,
        objectives: Sequence[Objective],
    ) -> None:
        """Hand over what the constructor of Trainer has no place for."""
        self.settings, self.lesson, self.distill, self.objectives = (
            settings,
            lesson,
            distill,
            objectives,
        )
        # The loss is computed here, so gradients of accumulated steps have to be averaged by the
        # Trainer.
        self.model_accepts_loss_kwargs = False
        # Distillation has a loss without labels; evaluation asks for it only if told so.
        self.label_names: list[str] = []
        self.can_return_loss = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and the model's output if asked."""
        labels = inputs.get("labels")
        pairs = self.lesson.task == "sentence-similarity" and labels is not None
        batch = {k: v for k, v in inputs.items() if k != "labels"} if pairs else dict(inputs)
        wanted = self.distill.needs if self.distill else {}
        # Evaluation mode switches off every kind of dropout in every architecture.
        model.train(self.settings.dropout and model.training)
        # The models' own loss does not know label smoothing, and would be computed for nothing.
        smoothed = self.args.label_smoothing_factor > 0
        given = {k: v for k, v in batch.items() if not (smoothed and k == "labels")}
        output = model(**given, **wanted)
        loss = self._task_loss(output, batch, labels if pairs else None)
        teacher = self.distill.teach(batch) if self.distill else None
        if self.distill and teacher is not None:
            loss = self.distill.task_weight * loss + self.distill.loss(batch, output, teacher)
        loss = loss * (1 - max((one.share for one in self.objectives), default=0.0))
        for objective in self.objectives:
            extra = objective.loss(batch, output, teacher)
            loss = loss if extra is None else loss + extra
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            message = f"the loss is {float(loss.detach())} at step {step}"
            cure = "lower `learning_rate`, or look for broken rows near this step"
            raise error("PLM303", message, "train", cure=cure)
        return (loss, output) if return_outputs else loss

    def _task_loss(self, output: Any, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        if labels is not None:
            pooled = self.lesson.pooling(last_states(output), batch["attention_mask"])
            return similarity_loss(pooled, labels)
        if self.args.label_smoothing_factor and "labels" in batch:
            return self._smoothed(output["logits"], batch["labels"])
        own = output.get("loss")
        return own if own is not None else torch.zeros((), device=self.args.device)

    def _smoothed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean of (1-e) * -log p(label) + e * mean over classes of -log p, labels -100 left out.

        In float32 under autocast too; otherwise the formula of transformers' LabelSmoother.
        """
        if self.lesson.task == "text-generation":
            logits, labels = logits[:, :-1], labels[:, 1:]
        smoothing = self.args.label_smoothing_factor
        flat = logits.float().flatten(0, -2)
        return F.cross_entropy(flat, labels.flatten(), label_smoothing=smoothing)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the objectives' figures beside the loss."""
        if "loss" in logs:
            found = [objective.figures() for objective in self.objectives]
            for name in {name: None for figures in found for name in figures}:
                values = [figures[name] for figures in found if name in figures]
                logs[name] = sum(values) / len(values)
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches by tokens where asked, else the usual ones."""
        if self.settings.tokens_per_batch is None:
            return super().get_train_dataloader()
        sampler = TokenBatches(self.lesson.train, self.settings.tokens_per_batch, self.lesson.seed)
        rows: Any = self.lesson.train
        loader = DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the usual optimizer, then move the objectives' parameters into groups of their
        own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        groups = [group for objective in self.objectives for group in objective.parameter_groups()]
        own = {id(p) for group in groups for p in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        for group in groups:
            optimizer.add_param_group({"weight_decay": 0.0, **group})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer
