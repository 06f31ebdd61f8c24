"""A translation model as compiled programs ahead of time (`exported.Exported.generate`)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.inference.aoti import cache_shapes, encode_program, package, room_for, step_program
from plmcc.inference.beam_search import GenerationSettings
from plmcc.inference.generate import compilable, search_of, translates
from plmcc.ir.probes import positions_of, vocabulary_of
from plmcc.utils.types import Values

_LONGEST = 256  # new tokens, where neither the model nor its generation config says how many


def write_translation(model: PreTrainedModel, folder: Path, num_beams: int) -> Values:
    """Write the programs of a translation model; return what only its manifest has.

    Args:
        model: an encoder-decoder that `check_programs` accepts.
        folder: where the programs go.
        num_beams: the most beams that can be asked for; greedy search is always there.

    Raises:
        PlmccError: its generation config asks for what compiled programs do not do.
    """
    search = default_search(model)
    steps = sorted({1, room_for(replace(search, num_beams=num_beams).candidates)})
    package(encode_program(model), folder / "encode.pt2")
    for size in steps:
        package(step_program(model, size, search.restrictions), folder / f"step-{size}.pt2")
    shapes = [list(shape) for shape in cache_shapes(model)]
    port = {"dtype": "int64", "shape": ["batch", "length"]}
    return {
        "inputs": [
            {"name": "input_ids", **port, "values": vocabulary_of(model)},
            {"name": "attention_mask", **port, "values": 2},
        ],
        "outputs": [{"name": "tokens", **port}],
        "dimensions": {"batch": [1, None], "length": [1, positions_of(model)]},
        "translation": {"shapes": shapes, "steps": steps, "search": asdict(search)},
    }


def check_translates(model: PreTrainedModel, name: str = "") -> None:
    """Refuse a model, named so by the user, that does not make text from text.

    Raises:
        PlmccError: it does not.
    """
    if not translates(model):
        message = f"{type(model).__name__} is not a translation model"
        hint = "use an encoder-decoder that reads text, such as Marian, BART, mBART or T5"
        raise error("PLM401", message, name, hint=hint)


def check_programs(model: PreTrainedModel) -> None:
    """Refuse a translation model that programs cannot run.

    Raises:
        PlmccError: its attention or cache is its own, or its generation config asks for what
            compiled programs do not do.
    """
    if not compilable(model):
        message = f"{type(model).__name__} cannot be exported: it has its own attention or cache"
        hint = "use `generate`; Marian, BART, mBART, M2M100, Pegasus and T5 can be exported"
        raise error("PLM401", message, hint=hint)
    default_search(model)


def default_search(model: PreTrainedModel) -> GenerationSettings:
    """Return the search of a model's generation config.

    Raises:
        PlmccError: it asks for something that compiled programs do not do, such as sampling.
    """
    search = search_of(_settings(model))
    if search is None:
        message = "the generation config uses features that compiled programs do not support"
        hint = "remove sampling, penalties and suppressed tokens from generation_config.json"
        raise error("PLM401", message, type(model).__name__, hint=hint)
    return search


def default_length(model: PreTrainedModel) -> int:
    """Return how many new tokens a model's generation config allows, whatever else it asks for."""
    return int(_settings(model).max_length) - 1


def _settings(model: PreTrainedModel) -> Any:
    """A model's complete generation config; `max_length` is set, and counts the start token."""
    generator: Any = model
    config, _ = generator._prepare_generation_config(None)
    own = generator.generation_config
    if own.max_new_tokens is not None:
        config.max_length = own.max_new_tokens + 1
    elif own.max_length is None:
        config.max_length = 1 + min(_LONGEST, positions_of(model, "decoder") or _LONGEST)
    return config
