"""Word vectors as a model: an embedding table, which passes rewrite like any other, and a tokenizer
whose tokens are the words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.modeling_outputs import BaseModelOutput

from plmcc.artifact import mark
from plmcc.diagnostics import error
from plmcc.vectors import Vectors

TYPE = "word_vectors"
_BATCH = 8192


class WordVectorsConfig(PreTrainedConfig):
    """`vocab_size` words, `hidden_size` numbers each."""

    model_type = TYPE
    vocab_size: int = 1
    hidden_size: int = 1


class WordVectors(PreTrainedModel):
    """Look words up."""

    config_class = WordVectorsConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: WordVectorsConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in place."""
        self.embeddings = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Return the vectors of words `input_ids` (B, L) as `last_hidden_state` (B, L, D)."""
        states: Any = self.embeddings(input_ids)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


AutoConfig.register(TYPE, WordVectorsConfig)
AutoModel.register(WordVectorsConfig, WordVectors)
_COMPRESSED = WordVectorsConfig()
mark(_COMPRESSED)  # gives it the class of the configs of artifacts
AutoModel.register(type(_COMPRESSED), WordVectors)


def model_of(vectors: Vectors) -> tuple[WordVectors, FastTokenizer]:
    """Return the model and the tokenizer of word vectors."""
    config = WordVectorsConfig(vocab_size=len(vectors), hidden_size=vectors.vector_size)
    config.architectures = [WordVectors.__name__]
    with torch.device("meta"):  # the table is there already
        model = WordVectors(config)
    table = nn.Embedding.from_pretrained(torch.from_numpy(vectors.vectors), freeze=False)
    model.set_input_embeddings(table)
    # No unknown token: a word without a vector is an error, not another word.
    raw = Tokenizer(models.WordLevel(vectors.key_to_index, unk_token=""))
    raw.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    tokenizer = FastTokenizer(tokenizer_object=raw)
    model.train(False)
    return model, tokenizer


@torch.no_grad()
def vectors_of(folder: Path) -> Vectors:
    """Return the vectors that a compressed directory stands for.

    Raises:
        PlmccError: it holds no word vectors.
    """
    from plmcc.lower import load

    model: Any = load(folder)
    if not isinstance(model, WordVectors):
        kind = type(model).__name__
        raise error("PLM401", "this directory holds no word vectors", str(folder), given=kind)
    tokenizer = FastTokenizer.from_pretrained(folder)
    words = tokenizer.get_vocab()
    ids = torch.arange(len(words)).split(_BATCH)
    table = torch.cat([model(part[None]).last_hidden_state[0].float() for part in ids])
    return Vectors(sorted(words, key=words.__getitem__), table.numpy())
