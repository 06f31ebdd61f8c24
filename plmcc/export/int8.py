"""int8 linear layers by torchao, for models that are about to be compiled."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from plmcc.utils.extras import library


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Quantize the linear layers of a model in place: weights by output row, activations by token.

    An output head that is tied to the embedding table gets an int8 copy of its own; the table stays
    as it is. The result computes, compiles and exports, but is not for `save_pretrained`.

    Args:
        model: in evaluation mode; its linear layers in float32 or bfloat16.

    Raises:
        PlmccError: torchao is not installed.
    """
    torchao = library("torchao.quantization", "quantize", "int8", "quantize")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            copied = module.weight.detach().clone()
            module.weight = nn.Parameter(copied, requires_grad=False)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model
