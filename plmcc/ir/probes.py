"""What a model can read, and inputs made up for it, on which what it computes is compared before
and after a change."""

from __future__ import annotations

import torch
from torch import Tensor
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
    ids = torch.randint(0, vocabulary_of(model), (2, batch, length), generator=random)
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
            f"plmcc cannot generate `{model.main_input_name}` for {type(model).__name__}",
            hint="pass inputs of your own",
        )
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[1]
    return {name: value.to(model.device) for name, value in given.items()}


def positions_of(config: object, part: str = "") -> int | None:
    """Return how many tokens a model can read and write, None if there is no limit.

    Args:
        config: the model's.
        part: only what "encoder" or "decoder" can, where a model has a limit for each (LED).
    """
    parts = [part] if part else ["encoder", "decoder"]
    names = ["max_position_embeddings", *(f"max_{p}_position_embeddings" for p in parts)]
    limits = [getattr(config, name, None) for name in names]
    return min((limit for limit in limits if limit), default=None)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read: rows of its table, also of one that a pass made; by
    the configuration where a table does not say."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(model.config.get_text_config().vocab_size if count is None else count)
