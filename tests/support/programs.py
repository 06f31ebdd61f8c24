"""The programs of beam search without a compiler."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from plmcc.inference.aoti import cache_shapes, restrictions_of
from plmcc.inference.programs import DecoderStep, EncoderProgram


class Uncompiled:
    """The programs as they are traced, run by Python."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shapes, self.restrictions = cache_shapes(model), restrictions_of(model)
        self.steps = 0

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        return list(EncoderProgram(self.model)(source_BS, mask_BS))

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        self.steps += 1
        return list(DecoderStep(self.model, candidates, self.restrictions)(*inputs[:4], inputs[4:]))
