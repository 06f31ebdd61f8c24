"""An export directory: compiled programs that translate without the model's code.

Nothing here imports transformers. A `.pt2` file holds machine code: load directories only that you
made or trust, as you would start a program.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmcc.diagnostics import PlmccError, error
from plmcc.replay import Run, load
from plmcc.runtime import in_range, translate
from plmcc.search import Search

MANIFEST = "plmcc_export.json"
FORMAT = 3
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs the code of those before it


@dataclass(frozen=True)
class Manifest:
    """What `plmcc_export.json` says of the programs beside it."""

    name: str
    architecture: str
    device: str
    torch: str
    cpu: str
    """What the code needs of the processor, in torch's words."""
    shapes: list[list[int]]
    """Heads and width of each self-attention cache: keys of all layers, then values."""
    steps: list[int]
    """How many candidates each `step-N.pt2` returns."""
    positions: int | None
    """How many tokens the model can read and write, if there is a limit."""
    vocabulary: int
    """How many tokens the model can read."""
    search: dict[str, Any]
    """The fields of `plmcc.search.Search`: what is searched for when nothing is asked."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            PlmccError: there is none, or it cannot be understood.
        """
        place = str(folder / MANIFEST)
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            cure = "make one with `plmcc export`"
            raise error("PLM401", "this is no export directory", place, cure=cure) from None
        except (OSError, ValueError) as problem:
            raise error("PLM401", f"it cannot be read: {problem}", place) from None
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != known or values["format"] != FORMAT:
            cure = "export the model again"
            raise error("PLM401", "another version of plmcc wrote this", place, cure=cure)
        return cls(**values)

    def check(self, folder: Path) -> None:
        """Refuse code that this machine or this torch cannot run.

        Raises:
            PlmccError: it cannot.
        """
        cure = "export the model here"
        if _minor(self.torch) != _minor(torch.__version__):
            message = "the programs were compiled by another version of torch"
            given, allowed = self.torch, torch.__version__
            raise error("PLM402", message, str(folder), given=given, allowed=allowed, cure=cure)
        here = torch.backends.cpu.get_cpu_capability()
        if self.cpu != here and not _runs(self.cpu, here):
            message = "the programs were compiled for another processor"
            raise error("PLM402", message, str(folder), given=self.cpu, allowed=here, cure=cure)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise error("PLM402", "the programs need a GPU", str(folder), cure=cure)


class Exported:
    """A loaded export directory.

    Raises:
        PlmccError: it is damaged, or this machine cannot run it.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.manifest = Manifest.read(folder)
        self.manifest.check(folder)
        known = self.manifest.search
        self.search = Search(**known | {n: tuple(known[n]) for n in ("eos", "banned")})
        device = self.manifest.device
        self._encode = _load(folder / "encode.pt2", device, replayed=False)
        self._steps = {
            size: _load(folder / f"step-{size}.pt2", device, replayed=True)
            for size in self.manifest.steps
        }

    @property
    def restrictions(self) -> tuple[tuple[int, ...], bool]:
        """What the model's generation config forbade to write (`plmcc.runtime.Programs`)."""
        return self.search.restrictions

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and width of each self-attention cache (`plmcc.runtime.Programs`)."""
        return [(heads, width) for heads, width in self.manifest.shapes]

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        """Read the source (`plmcc.runtime.Programs`)."""
        return self._encode([source_BS, mask_BS])

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        """Read one target token in each beam (`plmcc.runtime.Programs`)."""
        size = candidates if candidates == 1 else min(s for s in self._steps if s >= candidates)
        return self._steps[size](inputs)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
    ) -> Tensor:
        """Translate; what is not given is as in the model's generation config.

        Args:
            input_ids: token ids `[batch, length]` (int64).
            attention_mask: 1 for a token, 0 for padding, of the same shape; default all tokens.
            num_beams: 1 is greedy search.
            max_new_tokens: longest translation, in tokens.
            length_penalty: exponent of the length that divides a beam's log probability.
            early_stopping: True, False or "never", as in transformers.

        Returns:
            Token ids `[batch, length]` from the start token on: those of the model's `generate`.

        Raises:
            PlmccError: too many tokens, none or unknown ones, a mask of another shape, or more
                beams than the export has programs for.
        """
        given: dict[str, Any] = {
            "num_beams": num_beams,
            "max_length": None if max_new_tokens is None else max_new_tokens + 1,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        search = replace(self.search, **{k: v for k, v in given.items() if v is not None})
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_ids(input_ids, attention_mask)
        self._check(input_ids.shape[1], search)
        device = self.manifest.device
        source, mask = (x.to(device, torch.long) for x in (input_ids, attention_mask))
        return translate(self, source, mask, search).to(input_ids.device)

    def _check_ids(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Programs trust their inputs: one token out of range would end the process."""
        size, masked = (list(x.shape) for x in (input_ids, attention_mask))
        if len(size) != 2 or input_ids.dtype.is_floating_point:
            given = f"{input_ids.dtype} {size}"
            allowed = "whole numbers [batch, length]"
            raise error("PLM302", "these are no token ids", given=given, allowed=allowed)
        if masked != size:
            message = "the mask has another shape than the token ids"
            raise error("PLM302", message, given=str(masked), allowed=str(size))
        vocabulary = self.manifest.vocabulary
        if not in_range(input_ids, vocabulary):
            given = f"{input_ids.min()} to {input_ids.max()}" if input_ids.numel() else "none"
            message, allowed = "the model does not have these tokens", f"0 to {vocabulary - 1}"
            cure = "use the tokenizer of the export"
            raise error("PLM302", message, given=given, allowed=allowed, cure=cure)

    def _check(self, length: int, search: Search) -> None:
        for option, asked in (
            ("num_beams", search.num_beams),
            ("max_new_tokens", search.max_length - 1),
        ):
            if asked < 1:
                message = f"`{option}` is out of range"
                raise error("PLM502", message, given=str(asked), allowed="at least 1")
        limit = self.manifest.positions
        for what, size in (("source", length), ("translation", search.max_length - 1)):
            if limit is not None and size > limit:
                given, allowed = f"{size} tokens", f"{limit} tokens"
                raise error("PLM302", f"the {what} is too long", given=given, allowed=allowed)
        if search.candidates not in self.manifest.steps and (
            search.candidates == 1 or search.candidates > max(self.manifest.steps)
        ):
            message = f"the export has no program for {search.num_beams} beams"
            raise error("PLM502", message, cure="export the model with that --beam")


def _load(file: Path, device: str, replayed: bool) -> Run:
    if not file.is_file():
        cure = "export the model again"
        raise error("PLM402", "a program of the export is missing", str(file), cure=cure)
    try:
        return load(file, device, replayed)
    except RuntimeError as problem:
        raise _broken(file, problem) from None


def _broken(file: Path, problem: RuntimeError) -> PlmccError:
    line = (str(problem).strip() or "damaged").splitlines()[0]
    return error("PLM402", f"a program of the export cannot be loaded: {line}", str(file))


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _runs(code: str, here: str) -> bool:
    known = code in _CAPABILITIES and here in _CAPABILITIES
    return known and _CAPABILITIES.index(code) <= _CAPABILITIES.index(here)
