"""Token states as one vector: what a sentence encoder does after its transformer.

A directory of sentence-transformers says it in `modules.json`. Mean, CLS and max pooling are
computed here; every other module of that library (Dense, LayerNorm, other poolings) is loaded and
run by the library itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.diagnostics import error
from plmcc.utils.extras import library
from plmcc.utils.files import read_json
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_OWN = ("mean", "cls", "max")
_LIBRARY = "sentence_transformers"
_SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": F.cosine_similarity,
    "dot": lambda one_ND, two_ND: (one_ND * two_ND).sum(-1),
    "euclidean": lambda one_ND, two_ND: -(one_ND - two_ND).norm(dim=-1),
    "manhattan": lambda one_ND, two_ND: -(one_ND - two_ND).norm(1, dim=-1),
}


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector, and how texts are read and vectors compared, as the
    model's own files say."""

    mode: str = "mean"
    """`mean`, `cls` or `max` over the real tokens; empty where `later` pools."""
    later: tuple[nn.Module, ...] = ()
    """Modules of sentence-transformers that come after it."""
    prompt: str = ""
    """What is put before each text."""
    prompts: tuple[str, ...] = ()
    """All that the model knows; a user chooses one by its name."""
    prompt_tokens: int = 0
    """How many tokens of it later modules are told about; they may leave them out."""
    max_length: int | None = None
    """Tokens of a text that are read."""
    dims: int | None = None
    """Dimensions of the vector that are kept."""
    measure: str = "cosine"
    """How two vectors are compared: `cosine`, `dot`, `euclidean` or `manhattan`."""

    @classmethod
    def of(cls, folder: Path | None) -> Pooling:
        """Read a sentence-transformers folder; mean pooling where it says nothing.

        Raises:
            PlmccError: the folder names a module that cannot be loaded, or is malformed.
        """
        if folder is None:
            return cls()
        listed = _json(folder / MODULES, list)
        modules = [_Named.of(folder, values) for values in listed or []]
        if not modules and (folder / "1_Pooling").is_dir():
            modules = [_Named(folder, "Pooling", f"{_LIBRARY}.models.Pooling", "1_Pooling")]
        settings = _json(folder / _SETTINGS, dict) or {}
        prompts = settings.get("prompts") or {}
        read = _json(folder / "sentence_bert_config.json", dict) or {}
        measure = settings.get("similarity_fn_name") or "cosine"
        if measure not in _SIMILARITIES:
            where, allowed = str(folder / _SETTINGS), ", ".join(_SIMILARITIES)
            raise error("PLM303", "unknown similarity", where, got=str(measure), allowed=allowed)
        found = cls(
            prompt=prompts.get(settings.get("default_prompt_name")) or "",
            prompts=tuple(text for text in prompts.values() if text),
            max_length=read.get("max_seq_length"),
            dims=settings.get("truncate_dim"),
            measure=measure,
        )
        after = [one for one in modules if one.name not in ("Transformer", "Dropout")]
        if not after:
            return found
        own = after[0].pooling()
        later = tuple(one.load() for one in (after[1:] if own else after))
        return replace(found, mode=own, later=later)

    @property
    def told(self) -> str:
        """What a user should know of how vectors are made, in a few words; empty if nothing."""
        parts = [f"the prompt {self.prompt!r}"] if self.prompt else []
        parts += [f"{self.dims} dimensions"] if self.dims else []
        parts += [f"the similarity {self.measure}"] if self.measure != "cosine" else []
        parts += [type(one).__name__ for one in self.later if not isinstance(one, Normalize)]
        return ", ".join(parts)

    def __call__(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return one vector a row (B, D), float32, as `SentenceTransformer.encode` does."""
        pooled_BD = self._pooled(states_BLD, mask_BL).float() if self.mode else None
        values: Values = {"token_embeddings": states_BLD.float(), "attention_mask": mask_BL}
        values |= {"sentence_embedding": pooled_BD} if pooled_BD is not None else {}
        values |= {"prompt_length": self.prompt_tokens} if self.prompt_tokens else {}
        for module in self.later:
            if next(module.parameters(), states_BLD).device != states_BLD.device:
                module.to(states_BLD.device)
            values = module(values)
        found: Tensor = values["sentence_embedding"]
        return found[:, : self.dims]

    def unit(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return one vector a row (B, D), float32, of length 1."""
        return F.normalize(self(states_BLD, mask_BL), dim=-1)

    def similarity(self, one_ND: Tensor, two_ND: Tensor) -> Tensor:
        """Return how similar the vectors of each row are (N), by the model's own measure."""
        return _SIMILARITIES[self.measure](one_ND, two_ND)

    def _pooled(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        mask_BL1 = mask_BL[..., None].to(states_BLD.dtype)
        if self.mode == "cls":
            first_B = mask_BL.argmax(-1)
            return states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), first_B]
        if self.mode == "max":
            return states_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(1)
        return (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)


class Normalize(nn.Module):
    """Makes each vector one of length 1."""

    def forward(self, values: Values) -> Values:
        """Return the values with another `sentence_embedding` (B, D)."""
        return values | {"sentence_embedding": F.normalize(values["sentence_embedding"], dim=-1)}


@dataclass(frozen=True)
class _Named:
    """An entry of `modules.json`."""

    folder: Path
    name: str
    kind: str
    path: str

    @classmethod
    def of(cls, folder: Path, values: Values) -> _Named:
        kind = str(values.get("type"))
        return cls(folder, kind.rpartition(".")[2], kind, str(values.get("path", "")))

    def pooling(self) -> str:
        """Return the mode, if it is a pooling that is computed here; otherwise an empty text."""
        if self.name != "Pooling":
            return ""
        values = _json(self.folder / self.path / "config.json", dict) or {}
        if values.get("include_prompt") is False:
            return ""
        named = values.get("pooling_mode")
        modes = [named] if isinstance(named, str) else [*_modes(values)]
        return modes[0] if len(modes) == 1 and modes[0] in _OWN else ""

    def load(self) -> nn.Module:
        """Return the module with its weights.

        Raises:
            PlmccError: it is not of sentence-transformers, that is not installed, or it fails.
        """
        where = f"{self.folder / MODULES}: {self.path or self.name}"
        if self.name == "Normalize":
            return Normalize()
        if self.kind.partition(".")[0] != _LIBRARY:
            message = f"`{self.kind}` is code of the model's own, which plmcc does not run"
            allowed = "modules of sentence-transformers"
            raise error("PLM303", message, where, got=self.kind, allowed=allowed)
        library(_LIBRARY, "demo", f"the module {self.name}", where)
        try:
            kind: Any = getattr(import_module(self.kind.rpartition(".")[0]), self.name)
            found = kind.load(str(self.folder), subfolder=self.path, local_files_only=True)
        except Exception as problem:  # whatever that library makes of a folder
            message = f"the module {self.name} cannot be loaded: {first_line(problem)}"
            raise error("PLM303", message, where) from None
        assert isinstance(found, nn.Module)
        return found.eval().requires_grad_(False)


def _modes(values: Values) -> list[str]:
    return [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, chosen in values.items()
        if key.startswith("pooling_mode_") and chosen
    ]


def _json(file: Path, kind: type) -> Any:
    """The values in a file, or None if there is no such file.

    Raises:
        PlmccError: it is not JSON of that kind.
    """
    if not file.is_file():
        return None
    try:
        values = read_json(file)
    except (OSError, ValueError) as problem:
        raise error("PLM401", f"this file cannot be read: {problem}", str(file)) from None
    if not isinstance(values, kind):
        raise error("PLM401", f"this file has to hold a {kind.__name__}", str(file))
    return values


def similarity_loss(pooled_BD: Tensor, labels_N: Tensor) -> Tensor:
    """Mean squared difference of cosine and label; rows N to 2N-1 are the second texts."""
    first_ND, second_ND = pooled_BD.chunk(2)
    return F.mse_loss((first_ND * second_ND).sum(-1), labels_N.float())


def last_states(output: Any) -> Tensor:
    """Return the last hidden states (B, L, D) of any model's output."""
    states = output.get("last_hidden_state")
    if states is None:
        states = output["hidden_states"][-1]
    assert isinstance(states, Tensor)
    return states
