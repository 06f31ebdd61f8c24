"""The Trainer of transformers with what plmcc adds: a loss of several parts, the passes' clock,
batches by tokens, and checkpoints of models that are being rewritten."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
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
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from plmcc.api import Objective
from plmcc.artifact.tensors import load_tensors, save_tensors, writing
from plmcc.data.collate import Collate, Masking
from plmcc.data.pooling import Pooling, last_states, similarity_loss
from plmcc.diagnostics import error
from plmcc.recipe.load import Train
from plmcc.training import checkpoints
from plmcc.training.distillation import Distillation
from plmcc.training.schedule import Average, ByEpoch, TokenBatches
from plmcc.utils import distributed

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainingData:
    """Everything a stage's training needs besides the model: encoded rows, the task, and the
    teacher."""

    task: str
    train: Dataset
    collate: Collate
    pooling: Pooling = field(default_factory=Pooling)
    eval: Dataset | None = None
    teacher: PreTrainedModel | None = None
    seed: int = 0


class ProgressCallback(TrainerCallback):
    """The only clock that a pass sees: 0 before the first step, 1 after the last."""

    def __init__(
        self, objectives: Sequence[Objective], collate: Collate, steps: int | None = None
    ) -> None:
        self.objectives, self.collate, self.steps = objectives, collate, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Tell the objectives how long the stage is."""
        for objective in self.objectives:
            objective.begin(self.steps or state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Tell the objectives how far the stage is."""
        for objective in self.objectives:
            objective.advance(state.global_step / max(1, state.max_steps))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Tell a collator that masks which epoch comes."""
        if isinstance(self.collate, Masking):
            self.collate.epoch = int(state.epoch or 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Tell the objectives that the stage is over."""
        for objective in self.objectives:
            objective.advance(1.0)


class DistillingTrainer(Trainer):
    """A Trainer whose loss is task + distillation + objectives, and whose checkpoints hold a model
    that is being rewritten."""

    def setup(
        self,
        settings: Train,
        training_data: TrainingData,
        distill: Distillation | None,
        objectives: Sequence[Objective],
        average: Average,
        timer: checkpoints.Timer,
    ) -> None:
        """Hand over what the constructor of Trainer has no place for."""
        self.gathered: list[checkpoints.Stateful] = [*objectives, average]
        self.timer = timer
        self.settings, self.training_data, self.distill, self.objectives = (
            settings,
            training_data,
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
        pairs = self.training_data.task == "sentence-similarity" and labels is not None
        batch = {k: v for k, v in inputs.items() if k != "labels"} if pairs else dict(inputs)
        wanted = self.distill.needs if self.distill else {}
        # Evaluation mode switches off every kind of dropout in every architecture.
        model.train(self.settings.dropout and model.training)
        # The models' own loss does not know label smoothing, and would be computed for nothing.
        smoothed = self.args.label_smoothing_factor > 0
        given = {k: v for k, v in batch.items() if not (smoothed and k == "labels")}
        output = model(**given, **wanted)
        loss = self._task_loss(output, batch, labels if pairs else None)
        teacher = self.distill.teacher_forward(batch) if self.distill else None
        if self.distill and teacher is not None:
            loss = self.distill.task_weight * loss + self.distill.loss(batch, output, teacher)
        loss = loss * (1 - max((one.loss_weight for one in self.objectives), default=0.0))
        for objective in self.objectives:
            extra = objective.loss(batch, output, teacher)
            loss = loss if extra is None else loss + extra
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            message = f"the loss is {float(loss.detach())} at step {step}"
            hint = "lower `learning_rate`, or look for broken rows near this step"
            raise error("PLM303", message, "train", hint=hint)
        return (loss, output) if return_outputs else loss

    def _task_loss(self, output: Any, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        if labels is not None:
            pooled = self.training_data.pooling.unit(last_states(output), batch["attention_mask"])
            return similarity_loss(pooled, labels)
        if self.args.label_smoothing_factor and "labels" in batch:
            return self._smoothed(output["logits"], batch["labels"])
        own = output.get("loss")
        return own if own is not None else torch.zeros((), device=self.args.device)

    def _smoothed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean of (1-e) * -log p(label) + e * mean over classes of -log p, labels -100 left out.

        In float32 under autocast too; otherwise the formula of transformers' LabelSmoother.
        """
        if self.training_data.task == "text-generation":
            logits, labels = logits[:, :-1], labels[:, 1:]
        smoothing = self.args.label_smoothing_factor
        flat = logits.float().flatten(0, -2)
        return F.cross_entropy(flat, labels.flatten(), label_smoothing=smoothing)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the objectives' figures beside the loss."""
        if "loss" in logs:
            found = [objective.metrics() for objective in self.objectives]
            for name in {name: None for metrics in found for name in metrics}:
                values = [metrics[name] for metrics in found if name in metrics]
                logs[name] = sum(values) / len(values)
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        # These two draw from the global generator, which a resumed training has in another state.
        drawn = isinstance(sampler, (LengthGroupedSampler, BatchRebalanceSampler))
        return ByEpoch(sampler, self.training_data.seed) if drawn else sampler

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        with writing("a checkpoint", Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)
        distributed.barrier()  # every process has written its random state
        if self.args.should_save:
            checkpoints.finish(
                Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            )
        self.timer.saved(time.monotonic() - start)

    def _whole(self) -> torch.nn.Module:
        assert isinstance(self.model, torch.nn.Module)
        return self.model

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._whole(), folder / _WEIGHTS)
        checkpoints.save_states(folder, self.gathered)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_tensors(self._whole(), folder / _WEIGHTS)
        checkpoints.load_states(folder, self.gathered)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches by tokens where asked, else the usual ones."""
        if self.settings.tokens_per_batch is None:
            return super().get_train_dataloader()
        sampler = TokenBatches(
            self.training_data.train, self.settings.tokens_per_batch, self.training_data.seed
        )
        rows: Any = self.training_data.train
        loader = DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[object] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
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
