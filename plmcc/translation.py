"""Translating rows with a model: for figures, and for a student that learns from the teacher's own
translations (sequence-level distillation; Kim and Rush, EMNLP 2016, 1606.07947)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.compiled import CompiledPrograms
from plmcc.diagnostics import error
from plmcc.generate import Generate, compilable
from plmcc.programs import positions_of
from plmcc.progress import Progress
from plmcc.recipe import Sequences

_TOKENS = 2048  # source tokens of a batch, times beams
_MANY = 2000  # sentences whose translation takes longer than compiling the model


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
    positions = positions_of(model.config, "decoder")
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


def taught(rows: Dataset, teacher: PreTrainedModel, settings: Sequences) -> Dataset:
    """Return the rows with the teacher's translations as labels, from the cache if it has them.

    The cache is keyed by the teacher's weights and config, the sources and the search. (Sources and
    translations are token ids: the tokenizer adds nothing.) A file of it is complete or not there.

    Raises:
        PlmccError: the cache cannot be written; nothing has been translated then.
    """
    sources: list[list[int]] = rows["input_ids"][:]
    key = _digest(sources, teacher, settings)
    file = Path(settings.cache).expanduser() / f"{key}.json"
    if file.exists():
        labels = json.loads(file.read_text(encoding="utf-8"))
    else:
        search = (settings.num_beams, settings.max_new_tokens)
        with _draft(file) as draft, _quick(teacher, len(sources)):
            labels = generated(teacher, sources, *search, "the teacher translates")
            draft.write_text(json.dumps(labels), encoding="utf-8")
    if "labels" in rows.column_names:
        rows = rows.remove_columns(["labels"])
    return rows.add_column("labels", labels)


@contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """A file beside `file` that gets its name when all went well."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".unfinished-")
        os.close(handle)
    except OSError as problem:
        cure = "name another folder by `cache:`"
        message = f"the teacher's translations cannot be kept: {problem.strerror}"
        place = "train.distill.sequence.cache"
        raise error("PLM501", message, place, given=str(file.parent), cure=cure) from None
    draft = Path(name)
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _quick(model: PreTrainedModel, sentences: int) -> Iterator[None]:
    """Compile `generate` for a while, if there is enough to do."""
    if sentences < _MANY or not compilable(model) or "generate" in vars(model):
        yield
        return
    generator: Any = Generate(model, CompiledPrograms(model))
    vars(model)["generate"] = generator
    try:
        yield
    finally:
        del vars(model)["generate"]


def _digest(sources: list[list[int]], teacher: PreTrainedModel, settings: Sequences) -> str:
    digest = hashlib.sha256(json.dumps([settings.num_beams, settings.max_new_tokens]).encode())
    digest.update(json.dumps(sources).encode())
    for config in (teacher.config, teacher.generation_config):
        values = config.to_dict() | {"transformers_version": "", "_name_or_path": ""}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, value in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
