"""A real tokenizer of 99 words, as many as the tiny models know."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def words(pad: bool = True) -> PreTrainedTokenizerFast:
    """Return the tokenizer: `w0` to `w93` and five special words, or four without `pad`."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(94))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    special |= {"unk_token": "[UNK]", "mask_token": "[MASK]"} | (
        {"pad_token": "[PAD]"} if pad else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=40, **special)
