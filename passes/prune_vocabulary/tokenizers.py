"""Tokenizers and models with fewer tokens (a helper of the vocabulary pruning pass, not a pass).

Only the JSON of the `tokenizers` library is edited: WordPiece, BPE, Unigram and WordLevel models.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Container, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from plmcc.api import Values

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_CONFIGURED = ("tokenizer_config.json", "special_tokens_map.json")


def definition(tokenizer: PreTrainedTokenizerBase) -> Values | None:
    """Return the JSON of a tokenizer, None if it is not of the `tokenizers` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    values: Values | None = None if backend is None else json.loads(backend.to_str())
    return values


def normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return text as the tokenizer's model sees it: lower case, say, or without accents."""
    normalizer: Any = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


def pieces(values: Values) -> dict[str, int]:
    """Return the tokens of the model in a definition, by text."""
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def readable(values: Values) -> list[tuple[str, int]]:
    """Return the tokens of a definition as they are read, with their ids."""
    found = list(pieces(values).items())
    if not _byte_level(values):
        return found
    decoder = ByteLevel()
    return [(decoder.decode([piece]), index) for piece, index in found]


def special(values: Values) -> set[int]:
    """Return the ids that stay whatever the text says: added tokens, the unknown token, and the
    bytes that everything can be written in."""
    model, vocabulary = values["model"], pieces(values)
    found = {token["id"] for token in values["added_tokens"]}
    if isinstance(model.get("unk_token"), str):
        found |= {vocabulary[t] for t in [model["unk_token"]] if t in vocabulary}
    if model.get("unk_id") is not None:
        found.add(model["unk_id"])
    if values.get("padding"):
        found.add(values["padding"]["pad_id"])
    found |= {i for t, i in vocabulary.items() if len(t) == 6 and t.startswith("<0x")}
    if model["type"] == "BPE" and _byte_level(values):
        found |= {index for text, index in vocabulary.items() if len(text) == 1}
    return found


def unknown_token(values: Values) -> int | None:
    """Return the id of the token for what has none; None where everything can be written."""
    model = values["model"]
    if model.get("byte_fallback"):
        return None
    if isinstance(model.get("unk_token"), str):
        return pieces(values).get(model["unk_token"])
    found: int | None = model.get("unk_id")
    return found


def _byte_level(values: Values) -> bool:
    return '"ByteLevel"' in json.dumps([values["pre_tokenizer"], values["decoder"]])


def characters(values: Values, text: set[str]) -> set[int]:
    """Return the tokens of single characters of a text, with which its words can be spelt."""
    prefix = values["model"].get("continuing_subword_prefix") or ""
    found = pieces(values)
    names = {name for one in text for name in (one, f"{prefix}{one}", f"\u2581{one}")}
    return {found[name] for name in names if name in found}


def probable(values: Values, text: set[str]) -> list[int]:
    """Return the tokens that are written with characters of a text, the most probable ones first:
    of Unigram by their scores, of others in the order in which they were learned."""
    model = values["model"]
    prefix = model.get("continuing_subword_prefix") or "\u2581"
    scored = model["vocab"] if model["type"] == "Unigram" else []
    scores = {index: -score for index, (_, score) in enumerate(scored)}
    found = [
        index
        for piece, index in readable(values)
        if (word := piece.removeprefix(prefix).strip()) and text.issuperset(word)
    ]
    return sorted(found, key=lambda index: (scores.get(index, 0.0), index))


class Spelling:
    """Which tokens BPE makes others from: these have to stay with them."""

    def __init__(self, values: Values) -> None:
        self.vocabulary = pieces(values)
        self.names = {index: text for text, index in self.vocabulary.items()}
        self.made: dict[str, list[tuple[str, str]]] = {}
        for left, right in _merges(values) if values["model"]["type"] == "BPE" else ():
            self.made.setdefault(left + right, []).append((left, right))

    def parts(self, kept: set[int], known: Container[int] = ()) -> set[int]:
        """Return tokens with those that they are made from, as far as these are not known."""
        found, open_ = set(kept), [self.names[i] for i in kept if i in self.names]
        while open_ and self.made:
            for part in (p for pair in self.made.get(open_.pop(), []) for p in pair):
                index = self.vocabulary[part]
                if index not in found and index not in known:
                    found.add(index)
                    open_.append(part)
        return found

    def filled(self, kept: set[int], order: Iterable[int], count: int) -> set[int]:
        """Return `count` tokens: those given, and of others, in their order, all that fit with what
        they are made from."""
        found = set(kept)
        for index in order:
            if len(found) >= count:
                break
            new = self.parts({index}, found) if index not in found else set()
            if len(found) + len(new) <= count:
                found |= new
        return found


def _merges(values: Values) -> list[tuple[str, str]]:
    pairs = [m.split(" ") if isinstance(m, str) else m for m in values["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def shortened(values: Values, kept: list[int]) -> Values:
    """Return the definition with only these tokens, numbered in their order."""
    new = {old: index for index, old in enumerate(kept)}
    values = copy.deepcopy(values)
    model, vocabulary = values["model"], pieces(values)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {t: new[i] for t, i in vocabulary.items() if i in new}
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]
    if model["type"] == "BPE":
        left = model["vocab"]
        pairs = [m for m in _merges(values) if all(t in left for t in (*m, "".join(m)))]
        model["merges"] = [list(pair) for pair in pairs]
    for token in values["added_tokens"]:
        token["id"] = new[token["id"]]
    if values.get("padding"):  # what other readers of the file pad with
        values["padding"]["pad_id"] = new[values["padding"]["pad_id"]]
    _renumber(values["post_processor"], new)
    return values


def _renumber(part: object, new: dict[int, int]) -> None:
    """Number the special tokens of a post-processor anew: `ids` of templates, and (token, id)."""
    if isinstance(part, list):
        for item in part:
            _renumber(item, new)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == "ids":
            part[key] = [new[index] for index in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            part[key] = [value[0], new[value[1]]]
        else:
            _renumber(value, new)


def rebuilt(tokenizer: PreTrainedTokenizerBase, values: Values) -> PreTrainedTokenizerBase:
    """Return a tokenizer with another definition and the same settings, as it will be loaded."""
    with TemporaryDirectory(prefix="plmcc-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():  # other forms of the vocabulary
            kept = file.name in _CONFIGURED or file.suffix == ".jinja" or file.is_dir()
            if not kept:
                file.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # all of them are in tokenizer.json
        file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


# --- the model


def rows_of(model: PreTrainedModel) -> dict[str, int]:
    """Return the tensors that have an entry for each token, with the dimension of it.

    Raises:
        ValueError: which tensors these are does not follow from the shapes.
    """
    table: Any = model.get_input_embeddings()
    size = table.weight.shape[0]
    inside = {id(table.weight)}
    head: Any = model.get_output_embeddings()
    inside |= {id(head.weight)} if head is not None else set()
    found: dict[str, int] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 0:
            continue
        flat = value.dim() == 1 or (value.dim() == 2 and value.shape[0] == 1)
        if id(value) in inside or isinstance(_owner(model, name), nn.Embedding):
            if value.shape[0] == size:
                found[name] = 0
        elif flat and value.shape[-1] == size and not name.endswith("_ids"):
            found[name] = value.dim() - 1
    return found


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@torch.no_grad()
def cut(model: PreTrainedModel, kept: list[int]) -> list[str]:
    """Keep these tokens' entries, numbered in their order, and tell the configuration.

    Returns:
        The entries of config and generation config that held other ids.

    Raises:
        ValueError: a model of the new configuration has other shapes.
    """
    new = {old: index for index, old in enumerate(kept)}
    wanted, table = dict(rows_of(model)), model.get_input_embeddings()
    size = int(table.weight.shape[0])  # type: ignore[index]
    _check_shapes(model, wanted, size, new)
    index = torch.tensor(kept)
    for name, dim in wanted.items():
        value = _tensor(model, name)
        value.data = value.data.index_select(dim, index.to(value.device)).contiguous()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == size:
            module.num_embeddings = len(module.weight)
            if module.padding_idx is not None:
                module.padding_idx = new.get(module.padding_idx)
        if isinstance(module, nn.Linear) and module.out_features == size:
            module.out_features = len(module.weight)
        if getattr(module, "vocab_size", None) == size:
            module.vocab_size = len(kept)  # type: ignore[assignment]
    changed = []
    for config in _configurations(model):
        _shorten(config, size, len(kept))
        changed += renumber(config, new)
    if getattr(model, "generation_config", None) is not None:
        changed += [f"generation {name}" for name in renumber(model.generation_config, new)]
    return list(dict.fromkeys(changed))


def _check_shapes(
    model: PreTrainedModel, wanted: dict[str, int], size: int, new: dict[int, int]
) -> None:
    """Check that a model of the new configuration has the shapes that cutting makes."""
    config, count = copy.deepcopy(model.config), len(new)
    for part in (config, config.get_text_config()):
        renumber(part, new)  # the table refuses a padding token beyond its rows
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in wanted or any(value is _tensor(model, other) for other in wanted):
            shapes[name][wanted.get(name, 0)] = count
    _shorten(config, size, count)
    with torch.device("meta"):
        trial: Any = type(model)._from_config(config)
    built = {name: list(value.shape) for name, value in trial.state_dict().items()}
    if built != shapes:
        other = next(n for n in {**built, **shapes} if built.get(n) != shapes.get(n))
        raise ValueError(
            f"{other} would have the shape {shapes.get(other)}, not {built.get(other)}"
        )


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), last)
    return value


def _configurations(model: PreTrainedModel) -> list[object]:
    found: dict[int, object] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            found[id(part.config)] = part.config
            found[id(part.config.get_text_config())] = part.config.get_text_config()
    return list(found.values())


def _shorten(config: Any, size: int, length: int) -> None:
    parts = (config, config.get_text_config(), config.get_text_config(decoder=True))
    for part in {id(part): part for part in parts}.values():
        for name, value in list(vars(part).items()):
            if name.endswith("vocab_size") and value == size:
                setattr(part, name, length)


_IDS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens", "_to_id")
"""How the names of entries end whose values are token ids: numbers, lists, or values of names."""
_PHRASES = ("bad_words_ids", "force_words_ids", "sequence_bias")
"""Entries with sequences of ids: one of them that is dropped makes the sequence impossible."""


def renumber(config: object, new: dict[int, int]) -> list[str]:
    """Number the token ids in a configuration anew, in place; ids of dropped tokens go.

    Returns:
        The names of the entries that changed.
    """
    changed = []
    for name, value in list(vars(config).items()):
        found = value
        if name.endswith(_PHRASES):
            found = _phrases(value, new)
        elif name.endswith(_IDS):
            found = _renumbered(value, new)
        elif name == "forced_decoder_ids" and value:
            found = [[at, new.get(token)] for at, token in value]
        if found != value:
            setattr(config, name, found)
            changed.append(name)
    return changed


def _renumbered(value: object, new: dict[int, int]) -> object:
    if isinstance(value, dict):
        found = {key: _renumbered(item, new) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not None}
    if isinstance(value, bool) or not isinstance(value, (int, list)):
        return value
    if isinstance(value, int):
        return new.get(value) if value >= 0 else value
    left = [_renumbered(item, new) for item in value]
    return [item for item in left if item is not None and item != []]


def _phrases(value: object, new: dict[int, int]) -> object:
    """Sequences of ids: a list of them, of lists of them, or with a number beside each (pairs, or
    the values of a dictionary). None where none is left."""
    if isinstance(value, dict):
        return {
            tuple(new[i] for i in ids): bias for ids, bias in value.items() if _all(ids, new)
        } or None
    if not isinstance(value, (list, tuple)):
        return value
    left: list[object] = []
    for item in value:
        pair = len(item) == 2 and isinstance(item[0], (list, tuple)) and isinstance(item[1], float)
        if pair:
            left += [[[new[i] for i in item[0]], item[1]]] if _all(item[0], new) else []
        elif item and isinstance(item[0], (list, tuple)):
            inner = _phrases(item, new)
            left += [inner] if inner else []
        else:
            left += [[new[i] for i in item]] if _all(item, new) else []
    return left or None


def _all(ids: Iterable[int], new: dict[int, int]) -> bool:
    return all(index in new for index in ids)
