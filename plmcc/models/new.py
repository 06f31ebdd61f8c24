"""A new model with random weights: its config from the recipe, its tokenizer trained or taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from plmcc.data.classification import head_task
from plmcc.data.rows import data_files, load_rows
from plmcc.data.tasks import auto_class, task_of
from plmcc.diagnostics import did_you_mean, error, listing
from plmcc.ir.probes import positions_of
from plmcc.models.source import Source, load_tokenizer
from plmcc.recipe.load import Recipe, Scratch, TrainTokenizer
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_ALPHABET = 1000  # characters that get a piece of their own, the most frequent ones


def new_source(recipe: Recipe, base: Path | None = None, *, meta: bool = False) -> Source:
    """Return the model that a recipe describes, with random weights by the recipe's seed.

    Args:
        recipe: one whose `model` is a `Scratch`.
        base: where relative paths start, if they do not exist in the current directory.
        meta: without weights, on the meta device.

    Raises:
        PlmccError: an unknown architecture or config value, a task that the architecture cannot
            do, or a tokenizer that cannot be trained or found.
    """
    asked = recipe.model
    assert isinstance(asked, Scratch)
    kind = _config_class(recipe, asked)
    _check_keys(recipe, asked, kind)
    tokenizer, notes = _tokenizer(recipe, asked, base)
    config = _config(recipe, asked, kind, tokenizer)
    known = tokenizer.model_max_length
    tokenizer.model_max_length = min(known, positions_of(config) or known)
    model, task = _model(recipe, config, meta)
    name = f"a new {config.model_type}"
    return Source(model, task, name, tokenizer, notes=notes, scratch=True)


def _config_class(recipe: Recipe, asked: Scratch) -> object:
    name = asked.config.get("model_type")
    if name not in CONFIG_MAPPING or name == "plmcc":
        names = [known for known in CONFIG_MAPPING if known != "plmcc"]
        location = recipe.location(("model", "config", "model_type"))
        if name is None:
            hint = "add `model_type: mbart` or another one"
            raise error("PLM102", "`config` needs the key `model_type`", location, hint=hint)
        hint = did_you_mean(name, names, "see `AutoConfig` of transformers for the names")
        raise error(
            "PLM105", "transformers has no such architecture", location, got=str(name), hint=hint
        )
    return CONFIG_MAPPING[str(name)]


def _check_keys(recipe: Recipe, asked: Scratch, kind: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    # transformers takes it as an argument of every config. Short rows train faster with "eager".
    names |= {"attn_implementation"}
    for key in asked.config:
        if key != "model_type" and key not in names:
            location = recipe.location(("model", "config", key), key=True)
            own = sorted(names - {f.name for f in dataclasses.fields(PreTrainedConfig)})
            raise error(
                "PLM101",
                f"the config of {kind.model_type} has no `{key}`",
                location,
                allowed=listing(own, 40),
                hint=did_you_mean(key, names),
            )


def _config(
    recipe: Recipe, asked: Scratch, kind: Any, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config, with what the tokenizer knows unless the recipe says it."""
    tokens = {"vocab_size": len(tokenizer)} | {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    tokens |= {"forced_eos_token_id": tokens["eos_token_id"]}
    tokens |= {"decoder_start_token_id": tokens["pad_token_id"]}
    names = {field.name for field in dataclasses.fields(kind)}
    given = {key: value for key, value in asked.config.items() if key != "model_type"}
    values = {key: value for key, value in tokens.items() if key in names} | given
    try:
        config: PreTrainedConfig = AutoConfig.for_model(asked.config["model_type"], **values)
    except (StrictDataclassError, TypeError, ValueError) as problem:
        raise _refused(recipe, given, problem) from None
    size = int(config.get_text_config().vocab_size)
    if size < len(tokenizer):
        location = recipe.location(("model", "config", "vocab_size"))
        raise error(
            "PLM303",
            "the tokenizer has more tokens than the model",
            location,
            got=f"{len(tokenizer)} and {size}",
            hint="remove `vocab_size`",
        )
    return config


def _refused(recipe: Recipe, given: Values, problem: Exception) -> Exception:
    """The error at the value that the text of a problem names, else at the config."""
    words = " ".join(str(problem).split())
    named = next((key for key in given if f"'{key}'" in words), None)
    path = ("model", "config") if named is None else ("model", "config", named)
    return error("PLM107", f"transformers rejects the config: {words}", recipe.location(path))


def _model(recipe: Recipe, config: PreTrainedConfig, meta: bool) -> tuple[PreTrainedModel, str]:
    task = head_task(recipe.task)
    if task == "auto":
        if not config.is_encoder_decoder:
            message = "a new model needs a task, which determines its head"
            hint = "write `task: fill-mask` or another one"
            raise error("PLM303", message, recipe.location(("task",)), hint=hint)
        task = "translation"
    auto = auto_class(task, config)
    transformers.set_seed(recipe.seed)
    try:
        with torch.device("meta" if meta else "cpu"):
            model: PreTrainedModel = auto.from_config(config)
    except ValueError as problem:
        location = recipe.location(("model", "config"))
        words = first_line(problem).split(".")[0]
        raise error("PLM303", f"there is no such model for {task}: {words}", location) from None
    if not meta:
        placed: torch.nn.Module = model
        placed.to("cuda" if torch.cuda.is_available() else "cpu")
    assert task != "translation" or task_of(type(model).__name__) == task
    return model, task


def _tokenizer(
    recipe: Recipe, asked: Scratch, base: Path | None
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    wanted = asked.tokenizer
    if isinstance(wanted, TrainTokenizer):
        made = train_tokenizer(wanted, base)
        short = len(made) < wanted.vocab_size
        note = f"the text gives {len(made)} pieces, not {wanted.vocab_size}"
        return made, (note,) if short else ()
    beside = base / wanted if base is not None and not Path(wanted).is_dir() else Path(wanted)
    found = load_tokenizer(beside if beside.is_dir() else wanted)
    if found is None:
        location = recipe.location(("model", "tokenizer"))
        raise error(
            "PLM401",
            "there is no tokenizer",
            location,
            got=wanted,
            hint="pass a directory with a tokenizer, or write `{train: files}`",
        )
    return found, ()


def train_tokenizer(asked: TrainTokenizer, base: Path | None = None) -> FastTokenizer:
    """Return a tokenizer of byte-pair pieces (Sennrich, Haddow and Birch, ACL 2016) of some text.

    A space becomes the mark `▁` at the beginning of the next piece, so that decoding gives the text
    back (in the form NFC, with single spaces); every text ends with `</s>`.

    Raises:
        PlmccError: the text cannot be read, or has more characters than there may be pieces.
    """
    raw = Tokenizer(models.BPE(unk_token=UNKNOWN))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    special = [PAD, END, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=asked.vocab_size,
        limit_alphabet=_ALPHABET,
        special_tokens=special,
        show_progress=False,
    )
    raw.train_from_iterator(_texts(asked, base), trainer)
    if raw.get_vocab_size() > asked.vocab_size:
        given = f"{raw.get_vocab_size() - len(special)} characters, {asked.vocab_size} pieces"
        raise error(
            "PLM303",
            "the vocabulary is smaller than the alphabet of the text",
            "model.tokenizer.vocab_size",
            got=given,
            hint="increase it",
        )
    pair, end = f"$A $B {END}", [(END, special.index(END))]
    raw.post_processor = processors.TemplateProcessing(f"$A {END}", pair, end)
    return FastTokenizer(tokenizer_object=raw, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def _texts(asked: TrainTokenizer, base: Path | None) -> Iterator[str]:
    sources = [asked.train] if isinstance(asked.train, str) else asked.train
    for source in sources:
        files = data_files(source, base) if not source.startswith("hub:") else [source]
        for file in files:
            rows = load_rows(str(file), limit=asked.limit, base=base)
            for column in range(len(rows.text)):
                yield from rows.texts(column)
