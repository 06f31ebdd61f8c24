"""Translating token ids in batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.ir.probes import positions_of
from plmcc.utils.progress import Progress

_TOKENS = 2048  # source tokens of a batch, times beams


@torch.no_grad()
def generated(
    model: PreTrainedModel,
    sources: Sequence[Sequence[int]],
    num_beams: int,
    max_new_tokens: int,
    title: str = "translating",
) -> list[list[int]]:
    """Translate token ids by beam search, longest first, in batches of like length.

    Args:
        model: an encoder-decoder; it is left in evaluation mode.
        sources: token ids of each sentence, its end included.
        num_beams: width of the beam search; 1 is greedy.
        max_new_tokens: longest translation; less where the model has fewer positions.
        title: of the progress bar.

    Returns:
        for each source the tokens without start and padding, the end included if it was reached.
    """
    model.eval()
    generate: Any = model.generate
    positions = positions_of(model, "decoder")
    max_new_tokens = min(max_new_tokens, (positions or max_new_tokens + 1) - 1)
    config = model.generation_config
    ends = config.eos_token_id
    eos = set(ends if isinstance(ends, list) else [ends])
    found: list[list[int]] = [[] for _ in sources]
    with Progress(title) as progress:
        batches = _batches(sources, num_beams)
        for done, rows in enumerate(batches):
            progress.step(f"{len(sources)} sentences", done / len(batches))
            batch = {k: v.to(model.device) for k, v in _padded(model, sources, rows).items()}
            options = {"num_beams": num_beams, "do_sample": False, "use_cache": True}
            tokens = generate(**batch, max_new_tokens=max_new_tokens, **options)
            for row, ids in zip(rows, tokens[:, 1:].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
                found[row] = ids[:end]
    return found


def _batches(sources: Sequence[Sequence[int]], num_beams: int) -> list[list[int]]:
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    batches: list[list[int]] = []
    for row in order:
        longest = len(sources[batches[-1][0]]) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) * num_beams > max(_TOKENS, longest):
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded(
    model: PreTrainedModel, sources: Sequence[Sequence[int]], rows: Sequence[int]
) -> dict[str, Tensor]:
    length = max(len(sources[row]) for row in rows)
    pad = model.config.pad_token_id or 0
    ids = [[*sources[row], *[pad] * (length - len(sources[row]))] for row in rows]
    mask = [[1] * len(sources[row]) + [0] * (length - len(sources[row])) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
