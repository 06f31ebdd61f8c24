"""Translating rows with a model: for figures, and for a student that learns from the teacher's own
translations (sequence-level distillation; Kim and Rush, EMNLP 2016, 1606.07947)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.inference.aoti import CompiledPrograms
from plmcc.inference.batches import generated
from plmcc.inference.generate import Generate, compilable
from plmcc.recipe.load import Sequences
from plmcc.utils.attributes import kept
from plmcc.utils.files import replace_file

_MANY = 2000  # sentences whose translation takes longer than compiling the model


def with_teacher_targets(rows: Dataset, teacher: PreTrainedModel, settings: Sequences) -> Dataset:
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
    """`replace_file`, with a hint where nothing can be written."""
    try:
        with replace_file(file) as draft:
            yield draft
    except OSError as problem:
        hint = "set `cache:` to another directory"
        message = f"the teacher's translations cannot be cached: {problem.strerror}"
        location = "train.distill.sequence.cache"
        raise error("PLM501", message, location, got=str(file.parent), hint=hint) from None


@contextmanager
def _quick(model: PreTrainedModel, sentences: int) -> Iterator[None]:
    """Compile `generate` for a while, if there is enough to do."""
    if sentences < _MANY or not compilable(model) or "generate" in model.__dict__:
        yield
        return
    generator: object = Generate(model, CompiledPrograms(model))
    with kept(model, "generate"):
        model.__dict__["generate"] = generator
        yield


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
