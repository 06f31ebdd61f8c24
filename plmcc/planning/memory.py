"""An estimate of the memory that training takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from plmcc.planning.cost import activation_bytes
from plmcc.recipe.load import Stage, Train
from plmcc.recipe.sections import Synthetic
from plmcc.recipe.training_arguments import checkpoints_activations
from plmcc.training import adapters

_BATCH = 8  # of transformers.TrainingArguments


@dataclass(frozen=True)
class Memory:
    """Bytes that the training of a stage needs, estimated.

    `activations` is what autograd keeps of a batch (`cost.activation_bytes`); what the
    libraries need beside it, and fragmentation, is not in the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int | None
    batch: int
    length: int

    @property
    def total(self) -> int:
        """The sum; without activations where these are not known."""
        known = (self.weights, self.gradients, self.optimizer, self.teacher)
        return sum(known) + (self.activations or 0)


@dataclass
class Extra:
    """What training holds beside the planned modules: parameters that train, and bytes that do not;
    and how many numbers the passes train in all."""

    trained: int = 0
    frozen: int = 0
    ours: int = 0


def training_memory(
    model: PreTrainedModel, stage: Stage, settings: Train, extra: Extra, original: int
) -> Memory:
    """Estimate what training a stage takes.

    Args:
        model: on the meta device, with the trainable forms of all sites.
        stage: what is trained.
        settings: its `train` section.
        extra: what passes hold beside the model.
        original: bytes of the original, which may be the teacher.
    """
    width = model.dtype.itemsize
    trained = extra.ours
    asked = settings.lora()
    if asked is not None:
        trained = extra.ours + adapters.count(model, asked)
    elif settings.trainable != "passes":
        left = model.modules() if settings.trainable == "all_but_embeddings" else ()
        tables = {id(p) for m in left if isinstance(m, nn.Embedding) for p in m.parameters()}
        own = (p for p in model.parameters() if p.requires_grad and id(p) not in tables)
        trained = extra.trained + sum(p.numel() for p in own)
    weights = sum(t.nbytes for t in {id(t): t for t in _tensors(model)}.values())
    batch, length = _batch(settings, model)
    checkpointing = checkpoints_activations(settings.arguments) is not None
    return Memory(
        weights=weights + extra.trained * width + extra.frozen,
        gradients=trained * width,
        optimizer=round(trained * _optimizer_bytes(settings, width)),
        teacher=original if settings.distill else 0,
        activations=activation_bytes(model, batch, length, checkpointing),
        batch=batch,
        length=length,
    )


def _tensors(model: nn.Module) -> Sequence[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _optimizer_bytes(settings: Train, width: int) -> float:
    """Bytes of optimizer state for a number: two moments, or what is known of others."""
    name = str(settings.arguments.get("optim", "adamw_torch"))
    if "8bit" in name:
        return 2
    if name.startswith(("sgd", "adafactor")):
        return 0
    return 2 * width


def _batch(settings: Train, model: PreTrainedModel) -> tuple[int, int]:
    """Return sequences in a batch and tokens in a sequence, the longest that there can be."""
    data = settings.data
    length = data.max_length
    if data.train == "synthetic":
        length = (data.synthetic or Synthetic()).length
    if settings.tokens_per_batch is not None:
        return max(1, settings.tokens_per_batch // length), length
    return int(settings.arguments.get("per_device_train_batch_size", _BATCH)), length
