"""Learning from a teacher: its logits at a temperature, its hidden states, its pooled output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from plmcc.data import classification, token_classification
from plmcc.data.classification import Kind, kind_of
from plmcc.data.pooling import Pooling, last_states
from plmcc.data.tasks import GENERATION, LABELS
from plmcc.diagnostics import error
from plmcc.ir.modules import output_depth
from plmcc.recipe.load import Distill
from plmcc.utils.numerics import by_rows, divergence
from plmcc.utils.types import Values

_TEACHER = "train.distill.teacher"
_LABELED = ("text-classification", token_classification.TASK)
_SPANS = ("start_logits", "end_logits")
"""What models of extractive question answering return: two distributions over the tokens."""


def layer_map(settings: Distill, mine: int, theirs: int) -> dict[int, int]:
    """Return which state of the teacher each state of the student follows; 0 is the output of the
    embedding.

    Args:
        settings: may name the layers.
        mine: layers of the student.
        theirs: layers of the teacher.

    Raises:
        PlmccError: they do not go together.
    """
    chosen, where = settings.layers, "train.distill.layers"
    if chosen is None and theirs % mine:
        hint = "write `layers: {student: teacher, ...}`"
        message = f"{mine} student layers cannot be mapped evenly to {theirs} teacher layers"
        raise error("PLM303", message, where, hint=hint)
    even = {i: i * (theirs // mine) for i in range(mine + 1)}
    mapping = even if chosen is None else dict(chosen)
    for student, teacher in mapping.items():
        if student > mine or teacher > theirs:
            given, allowed = f"{student}: {teacher}", f"student 0 to {mine}, teacher 0 to {theirs}"
            message = "`layers` names a layer that does not exist"
            raise error("PLM303", message, where, got=given, allowed=allowed)
    return mapping


class Distillation:
    """The teacher's part of the loss.

    Raises:
        PlmccError: the teacher's layers, sizes or outputs do not fit the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        settings: Distill,
        pooling: Pooling,
        task: str,
    ) -> None:
        self.teacher, self.pooling, self.settings = teacher.eval(), pooling, settings
        self.task = task
        self.kind: Kind = kind_of(model.config) if task == classification.TASK else "classes"
        self._check_inputs(model)
        self.order = self._label_order(model) if settings.logits else None
        states = bool(settings.hidden_states or settings.pooled)
        self.needs: Values = {"output_hidden_states": True} if states else {}
        self.task_weight = 1.0 if settings.task is None else settings.task
        self.layers = self._layer_map(model) if settings.hidden_states else {}
        self.encoder_layers = self._encoder_map(model) if settings.hidden_states else {}
        if task == "translation" and settings.pooled:
            raise error(
                "PLM303",
                "translation has no pooled output",
                "train.distill.pooled",
                hint="use `logits`, `hidden_states` or `sequence`",
            )
        if settings.sequence and task != "translation":
            raise error(
                "PLM303",
                f"{task} has no sequences to learn from",
                "train.distill.sequence",
                hint="use `logits`",
            )
        if settings.logits and task in ("sentence-similarity", "feature-extraction"):
            raise error(
                "PLM303",
                f"{task} has no logits",
                "train.distill.logits",
                hint="use `pooled` and `hidden_states`",
            )

    def _label_order(self, model: PreTrainedModel) -> list[int] | None:
        """Where the teacher has each label of a classifier, by its name; None for the same order.

        Raises:
            PlmccError: the labels are others.
        """
        if self.task not in _LABELED:
            return None
        if self.task == classification.TASK and kind_of(self.teacher.config) != self.kind:
            message = "the teacher's head predicts something else than the model's"
            kind: str = kind_of(self.teacher.config)
            raise error("PLM303", message, _TEACHER, got=kind, allowed=self.kind)
        if self.kind == "number":
            return None
        mine, theirs = (_labels(part) for part in (model, self.teacher))
        if mine == theirs or (len(mine) == len(theirs) and _is_numbered(mine, theirs)):
            return None
        if set(mine) != set(theirs) or len(mine) != len(theirs):
            given, allowed = ", ".join(theirs), ", ".join(mine)
            message = "the teacher has other labels than the model"
            hint = "choose a teacher with the model's labels, or name them alike in `id2label`"
            raise error("PLM303", message, _TEACHER, got=given, allowed=allowed, hint=hint)
        return [theirs.index(name) for name in mine]

    def _check_inputs(self, model: PreTrainedModel) -> None:
        """The teacher is given the student's token ids."""
        sizes = [part.config.get_text_config().vocab_size for part in (model, self.teacher)]
        if sizes[0] != sizes[1]:
            message = "the teacher has another vocabulary and would misread every token"
            given = f"{sizes[0]} and {sizes[1]} tokens"
            hint = "choose a teacher with the student's tokenizer, or `original`"
            raise error("PLM303", message, _TEACHER, got=given, hint=hint)
        if self.settings.hidden_states or self.settings.pooled:
            widths = [part.config.get_text_config().hidden_size for part in (model, self.teacher)]
            if widths[0] != widths[1]:
                message = "hidden states can only be compared when they have the same size"
                given = f"{widths[0]} and {widths[1]}"
                raise error("PLM303", message, "train.distill", got=given)

    def _layer_map(self, model: PreTrainedModel) -> dict[int, int]:
        """Student state -> teacher state; state 0 is the embedding output, as in
        `output_hidden_states`."""
        depths = output_depth(model.config), output_depth(self.teacher.config)
        return layer_map(self.settings, *depths)

    def _encoder_map(self, model: PreTrainedModel) -> dict[int, int]:
        """As `_layer_map` for the encoder of an encoder-decoder; empty where depths do not fit."""
        if not model.config.is_encoder_decoder:
            return {}
        configs = [part.config.get_text_config(encoder=True) for part in (model, self.teacher)]
        mine, theirs = (int(config.num_hidden_layers) for config in configs)
        return {} if theirs % mine else {i: i * (theirs // mine) for i in range(mine + 1)}

    @torch.no_grad()
    def teacher_forward(self, batch: dict[str, Tensor]) -> Any:
        """Return the teacher's output for a batch, or None where only its translations count."""
        self.teacher.to(batch["input_ids"].device)
        inputs = {name: value for name, value in batch.items() if name not in LABELS}
        if not (self.settings.logits or self.needs):
            return None
        return self.teacher(**inputs, **self.needs)

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any) -> Tensor:
        """Return the weighted sum of the terms."""
        mask_BL, states = batch["attention_mask"], "hidden_states"
        if "decoder_input_ids" in batch:
            # What a translation model predicts, and what its decoder computes, are the target's.
            mask_BL, states = (batch["labels"] != -100).long(), "decoder_hidden_states"
        total = torch.zeros((), device=mask_BL.device)
        if self.settings.logits:
            names = [name for name in _SPANS if name in output] or ["logits"]
            judged_BL = mask_BL
            if self.task == GENERATION and "labels" in batch:  # not before what is not learned
                unlearned_BL = (batch["labels"] == -100) & (mask_BL > 0)
                judged_BL = mask_BL.clone()
                judged_BL[:, :-1] *= ~unlearned_BL[:, 1:]
            if self.task == token_classification.TASK and "labels" in batch:
                judged_BL = (batch["labels"] != token_classification.IGNORED).long()
            terms = [self._logits(output[name], teacher[name], judged_BL) for name in names]
            total = total + self.settings.logits * torch.stack(terms).mean()
        if self.settings.hidden_states:
            terms = [
                relative_error(output[states][s], teacher[states][t], mask_BL)
                for s, t in self.layers.items()
            ]
            source_BL, states = batch["attention_mask"], "encoder_hidden_states"
            terms += [
                relative_error(output[states][s], teacher[states][t], source_BL)
                for s, t in self.encoder_layers.items()
            ]
            total = total + self.settings.hidden_states * torch.stack(terms).mean()
        if self.settings.pooled:
            student, goal = (self.pooling.unit(last_states(o), mask_BL) for o in (output, teacher))
            total = total + self.settings.pooled * (1 - (student * goal).sum(-1)).mean()
        return total

    def _logits(self, student: Tensor, teacher: Tensor, mask_BL: Tensor) -> Tensor:
        """KL(teacher || student) at temperature T, times T² (Hinton, Vinyals and Dean, 2015); of
        several labels at once, the sum over these; of a number, the squared error."""
        if student.shape != teacher.shape:
            given = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise error(
                "PLM303", "student and teacher have different logits", "train.distill", got=given
            )
        teacher = teacher if self.order is None else teacher[..., self.order]
        if self.kind == "number":
            return F.mse_loss(student.float(), teacher.float())
        warm, each = self.settings.temperature, self.kind == "labels"
        # What one part keeps for its gradient is computed again: else four copies of all logits
        # in float32, 17 GB for 4,096 tokens of a vocabulary of 262,144.
        rows = by_rows(student.flatten(0, -2), teacher.flatten(0, -2))
        parts = [
            checkpoint(
                _divergence, *pair, warm, each, use_reentrant=False, preserve_rng_state=False
            )
            for pair in rows
        ]
        found = torch.cat(parts).view(student.shape[:-1])
        if found.dim() == 2:
            return (found * mask_BL).sum() / mask_BL.sum().clamp(min=1) * warm**2
        return found.mean() * warm**2


def _divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float, each: bool) -> Tensor:
    """KL(teacher || student) of each row (N,), in float32."""
    return divergence(teacher_NV.float() / temperature, student_NV.float() / temperature, each)


def _labels(model: PreTrainedModel) -> list[str]:
    return [str(name) for _, name in sorted((model.config.id2label or {}).items())]


def _is_numbered(*labels: list[str]) -> bool:
    """Whether labels of one are `LABEL_0` and so on: then their order is all there is."""
    plain = [f"LABEL_{index}" for index in range(len(labels[0]))]
    return any(names == plain for names in labels)


def relative_error(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """||s - t||² / ||t||² over the real tokens: comparable between layers of different scale."""
    mask_BL1 = mask_BL[..., None]
    difference = ((student_BLD.float() - teacher_BLD.float()).square() * mask_BL1).sum()
    return difference / (teacher_BLD.float().square() * mask_BL1).sum().clamp(min=1e-12)
