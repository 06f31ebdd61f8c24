"""Tiny random models of many architectures, the same weights every time, and inputs for them: what
passes are checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from plmcc.utils.types import Values

VOCAB = 99
"""Tokens that the models know."""
PAD, BOS, EOS = 0, 1, 2
"""Their special tokens."""
_SEED = 20


@dataclass(frozen=True)
class _Entry:
    """`kind` is encoder, decoder, seq2seq or speech; `dropout` are fields of the config.

    `untied` gives the head a weight of its own where transformers ties whatever the config says.
    """

    kind: str
    model: str
    config: str
    dropout: tuple[str, ...]
    options: Values
    untied: bool = False


_TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
_LLAMA = _BERT | {"num_key_value_heads": 2}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 48,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": EOS,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": PAD,
}
_BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_BART_DROPOUT = ("dropout", "attention_dropout", "activation_dropout")
_ENTRIES = {
    "bert": _Entry("encoder", "BertForMaskedLM", "BertConfig", _BERT_DROPOUT, _BERT),
    "roberta": _Entry("encoder", "RobertaForMaskedLM", "RobertaConfig", _BERT_DROPOUT, _BERT),
    "distilbert": _Entry(
        "encoder",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        ("dropout", "attention_dropout"),
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 48},
    ),
    "electra": _Entry(
        "encoder",
        "ElectraForMaskedLM",
        "ElectraConfig",
        _BERT_DROPOUT,
        _BERT | {"embedding_size": 16},
    ),
    "albert": _Entry(
        "encoder",
        "AlbertForMaskedLM",
        "AlbertConfig",
        (*_BERT_DROPOUT, "classifier_dropout_prob"),
        _BERT | {"embedding_size": 16},
    ),
    "gpt2": _Entry(
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    ),
    "llama": _Entry("decoder", "LlamaForCausalLM", "LlamaConfig", ("attention_dropout",), _LLAMA),
    "qwen3": _Entry(
        "decoder",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        ("attention_dropout",),
        _LLAMA | {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "t5": _Entry("seq2seq", "T5ForConditionalGeneration", "T5Config", ("dropout_rate",), _T5),
    "t5_gated": _Entry(
        "seq2seq",
        "T5ForConditionalGeneration",
        "T5Config",
        ("dropout_rate",),
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        untied=True,
    ),
    "bart": _Entry("seq2seq", "BartForConditionalGeneration", "BartConfig", _BART_DROPOUT, _BART),
    "mbart": _Entry(
        "seq2seq",
        "MBartForConditionalGeneration",
        "MBartConfig",
        _BART_DROPOUT,
        _BART | {"scale_embedding": True},
    ),
    "marian": _Entry(
        "seq2seq",
        "MarianMTModel",
        "MarianConfig",
        _BART_DROPOUT,
        _BART | {"scale_embedding": True, "decoder_start_token_id": PAD},
    ),
    "whisper": _Entry(
        "speech",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _BART_DROPOUT,
        {key: value for key, value in _BART.items() if key != "max_position_embeddings"}
        | {
            "num_mel_bins": 8,
            "max_source_positions": 24,
            "max_target_positions": 24,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
    ),
}
NAMES = tuple(_ENTRIES)
"""The architectures."""
ENCODERS = tuple(name for name, entry in _ENTRIES.items() if entry.kind == "encoder")
DECODERS = tuple(name for name, entry in _ENTRIES.items() if entry.kind == "decoder")
SEQ2SEQ = tuple(name for name, entry in _ENTRIES.items() if entry.kind in ("seq2seq", "speech"))
GENERATIVE = DECODERS + SEQ2SEQ


def tiny(name: str, *, dropout: float = 0.0, attention: str = "eager") -> PreTrainedModel:
    """Return the model in eval mode: 2 layers, width 32, `VOCAB` tokens, weights fixed by a seed.

    Weights are larger than the libraries initialize them, so that outputs depend on every layer.
    """
    entry = _ENTRIES[name]
    config_class: Callable[..., object] = getattr(hf, entry.config)
    rates = dict.fromkeys(entry.dropout, dropout)
    config = config_class(**(_TOKENS | entry.options | rates), attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)  # GPUs go on as they were
        model: PreTrainedModel = getattr(hf, entry.model)(config)
        if entry.untied:
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train(False)
    return model


def inputs(name: str, batch: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Return keyword arguments for the model: ids `[batch, length]`, padded but for the first."""
    kind = _ENTRIES[name].kind
    random = torch.Generator().manual_seed(_SEED)

    def tokens(size: int) -> Tensor:
        return torch.randint(EOS + 1, VOCAB, (batch, size), generator=random)

    if kind == "speech":
        features = torch.randn(batch, 8, 48, generator=random)
        return {"input_features": features, "decoder_input_ids": tokens(length)}
    ids, mask = tokens(length), torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        padded = min(row, length - 1)
        # A decoder continues from its last token, so its padding has to be on the left.
        columns = slice(0, padded) if kind == "decoder" else slice(length - padded, length)
        ids[row, columns], mask[row, columns] = PAD, 0
    given = {"input_ids": ids, "attention_mask": mask}
    return given | {"decoder_input_ids": tokens(length - 2)} if kind == "seq2seq" else given


def prompt(name: str, batch: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Return keyword arguments for `model.generate`: `inputs` without the decoder's tokens."""
    given = inputs(name, batch, length)
    return {key: value for key, value in given.items() if key != "decoder_input_ids"}
