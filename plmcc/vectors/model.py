"""Word vectors as a model: an embedding table, which passes rewrite like any other, and a tokenizer
whose tokens are the words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.modeling_outputs import BaseModelOutput

from plmcc.api import Hard
from plmcc.artifact.format import mark
from plmcc.diagnostics import error
from plmcc.vectors.codes import Codes
from plmcc.vectors.keyed import By, Vectors

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
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
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


@dataclass(frozen=True)
class Compressed:
    """A directory of compressed word vectors, loaded: no table is built before it is asked for."""

    folder: Path
    model: WordVectors
    words: list[str]

    @classmethod
    def of(cls, folder: Path) -> Compressed:
        """Load a directory.

        Raises:
            PlmccError: it holds no word vectors.
        """
        from plmcc.artifact.load import load

        if folder.is_file():
            message = "this is a file, but the result of `plmcc apply` is a directory"
            hint = "compress the file first: plmcc apply RECIPE FILE -o DIR"
            raise error("PLM401", message, str(folder), hint=hint)
        model: object = load(folder)
        if not isinstance(model, WordVectors):
            kind = type(model).__name__
            raise error("PLM401", "the directory contains no word vectors", str(folder), got=kind)
        words = FastTokenizer.from_pretrained(folder).get_vocab()
        return cls(folder, model, sorted(words, key=words.__getitem__))

    @torch.no_grad()
    def parts(self) -> Iterator[npt.NDArray[np.float32]]:
        """Go through the vectors, some rows (N, D) at a time."""
        for ids in torch.arange(len(self.words)).split(_BATCH):
            yield self.model(ids[None]).last_hidden_state[0].float().numpy()

    def vectors(self) -> Vectors:
        """Return the vectors that the directory stands for."""
        return Vectors(self.words, np.concatenate(list(self.parts())))

    def codes(self) -> Codes | None:
        """Return the binary codes, None if the pass does not make words into codes of n bits."""
        table = self.model.get_input_embeddings()
        found = table.binary_codes() if isinstance(table, Hard) else None
        return found and Codes.of(self.words, found[0].numpy(), found[1])

    def need_codes(self, why: str) -> Codes:
        """Return the binary codes.

        Raises:
            PlmccError: there are none.
        """
        codes = self.codes()
        if codes is None:
            names = [item["pass"] for item in self.model.config.quantization_config.modules]
            message = f"{why} needs one binary code per word, which `{names[0]}` does not produce"
            hint = "compress the vectors by `binary_embedding`"
            raise error("PLM401", message, str(self.folder), hint=hint)
        return codes


def read(folder: Path, by: By | None) -> Vectors | Codes:
    """Return what a compressed directory stands for: vectors (`cosine`), codes (`hamming`), or
    codes where there are some (None).

    Raises:
        PlmccError: it holds no word vectors, or no codes where they are asked for.
    """
    found = Compressed.of(folder)
    if by == "hamming":
        return found.need_codes("the Hamming distance")
    return (found.codes() if by is None else None) or found.vectors()
