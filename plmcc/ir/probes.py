"""What a model can read, and inputs made up for it, on which what it computes is compared before
and after a change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

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


def positions_of(model: PreTrainedModel | PreTrainedConfig, part: str = "") -> int | None:
    """Return how many tokens a model can read and write, None if there is no limit.

    The configuration may count rows of the table of positions that no token has: RoBERTa's first
    token is at `padding_idx + 1`.

    Args:
        model: a model, or a configuration alone, which is then believed.
        part: only what "encoder" or "decoder" can, where a model has a limit for each (LED).
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    parts = [part] if part else ["encoder", "decoder"]
    names = ["max_position_embeddings", *(f"max_{p}_position_embeddings" for p in parts)]
    limits = [getattr(config, name, None) for name in names]
    if isinstance(model, PreTrainedModel):
        limits += [rows for name, rows in _position_tables(model) if part in name or not part]
    return min((limit for limit in limits if limit), default=None)


def _position_tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield the path of each learned table of positions, and how many tokens it has rows for."""
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("position" in last or last == "wpe"):
            continue
        if "relative" in path or "bias" in path:
            continue
        first = getattr(module, "offset", None)
        if first is None and type(module) is nn.Embedding and module.padding_idx is not None:
            first = module.padding_idx + 1
        yield path, module.num_embeddings - int(first or 0)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many tokens a model can read: rows of its table, also of one that a pass made; by
    the configuration where a table does not say."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(model.config.get_text_config().vocab_size if count is None else count)
