"""Inputs made up for a model, on which what it computes is compared before and after a change."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.diagnostics import error


def probe_inputs(
    model: PreTrainedModel, batch: int = 2, length: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Return arguments for a model, always the same ones for a seed.

    These are random ids `[batch, length]` with padding at the end of the last row, or audio
    features, and the decoder's ids if there is one.

    Raises:
        PlmccError: the model's main input is of another kind.
    """
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _vocabulary(model), (2, batch, length), generator=random)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - 2 :] = 0
    if model.main_input_name == "input_ids":
        given = {"input_ids": ids[0], "attention_mask": mask}
    elif model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        shape = (batch, model.config.num_mel_bins, frames)
        given = {"input_features": torch.randn(shape, generator=random).to(model.dtype)}
    else:
        raise error(
            "PLM303",
            f"plmcc cannot make up `{model.main_input_name}` for {type(model).__name__}",
            cure="pass inputs of your own",
        )
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[1]
    return {name: value.to(model.device) for name, value in given.items()}


def _vocabulary(model: PreTrainedModel) -> int:
    """Return how many ids there are; a table that a pass replaced does not say."""
    table = model.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    return int(model.config.get_text_config().vocab_size)
