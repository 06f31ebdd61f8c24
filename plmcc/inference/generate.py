"""`model.generate` of a compiled encoder-decoder: our programs where they give the same tokens,
transformers' own method for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from plmcc.inference.aoti import has_programs
from plmcc.inference.beam_search import GenerationSettings
from plmcc.inference.decode import Programs, decode, in_range
from plmcc.ir.probes import positions_of, vocabulary_of
from plmcc.utils.types import Values

# Fields of a generation config that `Search` knows, or that change nothing without sampling. Any
# other must have its default value.
_KNOWN = {
    "max_length",
    "max_new_tokens",
    "early_stopping",
    "num_beams",
    "length_penalty",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "min_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "transformers_version",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "bad_words_ids",
    "renormalize_logits",
}


class Generate:
    """Stands in for `model.generate`, with the same arguments and the same tokens."""

    def __init__(self, model: PreTrainedModel, programs: Programs) -> None:
        self.model = model
        self.programs = programs

    def __call__(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> object:
        """Translate; arguments and result are those of transformers' `generate`."""
        settings = dict(options)
        source = settings.pop("input_ids", None) if inputs is None else inputs
        mask = settings.pop("attention_mask", None)
        search = None
        if self._takes(source) and set(settings) <= set(vars(GenerationConfig())):
            search = self._search(generation_config, settings)
        if search is not None and not self._fits(source, mask, search):
            search = None
        if search is None:
            return self._fallback(inputs, generation_config, options)
        ids = source.long()  # programs read memory as what they were compiled for
        mask = torch.ones_like(ids) if mask is None else mask.long()
        return decode(self.programs, ids, mask, search).to(source.device)

    def _fallback(
        self, inputs: Tensor | None, config: GenerationConfig | None, options: Values
    ) -> object:
        # Eager: with transformers' growing caches, the forward pass would compile again and again.
        kind: Any = type(self.model)
        with torch.compiler.set_stance("force_eager"):
            return kind.generate(self.model, inputs, generation_config=config, **options)

    def _takes(self, source: object) -> bool:
        """Whether this is a batch of token ids: a program ends the process at one out of range."""
        if not isinstance(source, Tensor) or source.ndim != 2 or source.dtype.is_floating_point:
            return False
        return in_range(source, vocabulary_of(self.model))

    def _search(
        self, config: GenerationConfig | None, settings: Values
    ) -> GenerationSettings | None:
        """What the arguments ask for, or None when only transformers can do it."""
        model: Any = self.model
        merged, _ = model._prepare_generation_config(config, **settings)
        own = (settings.get("max_length"), model.generation_config.max_length)
        default = all(x is None for x in own) and (config is None or config.max_length is None)
        lowest = (settings.get("min_length"), model.generation_config.min_length)
        merged = model._prepare_generated_length(
            generation_config=merged,
            has_default_max_length=default,
            has_default_min_length=all(x is None for x in lowest),
            model_input_name="input_ids",
            inputs_tensor=None,
            input_ids_length=1,
        )
        model._validate_generated_length(merged, 1, default)
        return search_of(merged)

    def _fits(self, source_BS: Tensor, mask_BS: Tensor | None, search: GenerationSettings) -> bool:
        """What does not fit is left to transformers, for its results or its error."""
        if search.restrictions != self.programs.restrictions:
            return False
        limit = positions_of(self.model)
        if limit is not None and max(source_BS.shape[1], search.max_length - 1) > limit:
            return False
        if mask_BS is None:
            return not bool((source_BS == search.pad).any())
        return mask_BS.shape == source_BS.shape


def translates(model: PreTrainedModel) -> bool:
    """Return whether a model makes text from text with an encoder and a decoder."""
    text = model.main_input_name == "input_ids"
    return bool(text and model.config.is_encoder_decoder and model.can_generate())


def compilable(model: PreTrainedModel) -> bool:
    """Return whether a model's `generate` can run programs (`aoti.has_programs`)."""
    return translates(model) and has_programs(model)


def search_of(config: GenerationConfig) -> GenerationSettings | None:
    """Return the search that a complete generation config describes (`max_length` counts the start
    token), or None if it asks for anything that `Search` does not know."""
    defaults: Values = GenerationConfig._get_default_generation_params()
    for name, value in vars(config).items():
        if name.startswith("_") or name in _KNOWN or value is None:
            continue
        if value != defaults.get(name, False):
            return None
    if config.num_beams < 1:
        return None
    eos = config.eos_token_id
    eos = [eos] if isinstance(eos, int) else eos
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    special = (start, config.forced_bos_token_id, config.forced_eos_token_id)
    if not eos or start is None or not all(x is None or isinstance(x, int) for x in special):
        return None
    words = [word for word in config.bad_words_ids or [] if word not in ([end] for end in eos)]
    if any(len(word) != 1 for word in words):
        return None
    pad = eos[0] if config.pad_token_id is None else config.pad_token_id
    return GenerationSettings(
        max_length=config.max_length,
        start=start,
        eos=tuple(eos),
        pad=pad,
        num_beams=config.num_beams,
        length_penalty=float(config.length_penalty),
        early_stopping=config.early_stopping,
        forced_bos=config.forced_bos_token_id,
        forced_eos=config.forced_eos_token_id,
        banned=tuple(sorted({word[0] for word in words})),
        renormalized=bool(config.renormalize_logits),
    )
