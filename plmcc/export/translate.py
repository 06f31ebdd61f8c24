"""`plmcc translate`: text from lines to lines, in order, with any model or export directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from plmcc.diagnostics import error
from plmcc.export.exported import Exported
from plmcc.export.manifest import is_export
from plmcc.utils.text import first_line

# Batches read ahead: sorting more lines by length wastes less on padding, but results come later.
_BATCHES_IN_CHUNK = 16


@dataclass(frozen=True)
class Options:
    """How to translate."""

    beams: int | None = None
    """Beams; 1 is greedy search; None leaves it to the model's generation config."""
    batch: int = 16
    """Sentences translated together."""
    max_new_tokens: int | None = None
    """Longest translation; None: the generation config's, else 256, else what the model can."""
    truncate: bool = False
    """Cut sentences that are too long for the model instead of refusing them."""


@dataclass(frozen=True)
class Translator:
    """A model or an export directory, ready to translate."""

    tokenizer: PreTrainedTokenizerBase
    generate: Callable[..., Tensor]
    positions: int | None
    """The longest source, in tokens; None is any."""
    max_new_tokens: int
    device: torch.device

    def lines(self, source: Iterable[bytes], name: str, options: Options) -> Iterator[str]:
        """Translate lines, in order, a chunk at a time; blank lines stay blank.

        Args:
            source: lines of UTF-8 text.
            name: what errors call the source.
            options: how to translate.

        Raises:
            PlmccError: a line is not UTF-8, or too long for the model.
        """
        numbered = enumerate(source, start=1)
        while chunk := list(islice(numbered, _BATCHES_IN_CHUNK * options.batch)):
            yield from self._chunk(chunk, name, options)

    def _chunk(self, chunk: list[tuple[int, bytes]], name: str, options: Options) -> list[str]:
        texts = [_text(line, f"{name}:{number}") for number, line in chunk]
        tokens = {
            index: self._tokens(texts[index], f"{name}:{chunk[index][0]}", options)
            for index in range(len(chunk))
            if texts[index].strip()
        }
        done = [""] * len(chunk)
        order = sorted(tokens, key=lambda index: len(tokens[index]))
        for start in range(0, len(order), options.batch):
            indices = order[start : start + options.batch]
            results = self._batch([tokens[index] for index in indices], options)
            for index, text in zip(indices, results, strict=True):
                done[index] = " ".join(text.split("\n"))
        return done

    def _tokens(self, text: str, location: str, options: Options) -> list[int]:
        limit = self.positions
        cut = {"truncation": True, "max_length": limit} if options.truncate and limit else {}
        ids: list[int] = self.tokenizer(text, verbose=False, **cut)["input_ids"]
        if limit is not None and len(ids) > limit:
            message = "the sentence is longer than the model can read"
            given, allowed = f"{len(ids)} tokens", f"{limit} tokens"
            hint = "split it, or add --truncate"
            raise error("PLM302", message, location, got=given, allowed=allowed, hint=hint)
        return ids

    def _batch(self, rows: list[list[int]], options: Options) -> list[str]:
        # Padding on the right, whatever the tokenizer does: the masks tell.
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        beams = {} if options.beams is None else {"num_beams": options.beams}
        found = self.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=options.max_new_tokens or self.max_new_tokens,
            **beams,
        )
        texts: list[str] = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_translator(
    name: str, device: str = "auto", compiled: bool = False, trust_programs: bool = False
) -> Translator:
    """Load a translation model.

    Args:
        name: an artifact, a transformers directory or hub id, or an export directory.
        device: "cpu", "cuda", "cuda:1" ... or "auto"; an export runs where it was made for.
        compiled: compile the model first; an export is compiled already.
        trust_programs: run the native code of an export from elsewhere.

    Raises:
        PlmccError: it cannot be loaded, is not a translation model, or comes without a tokenizer.
    """
    if is_export(Path(name)):
        return _exported(Path(name), device, trust_programs)
    from plmcc.export.translation import check_translates, default_length
    from plmcc.inference.compile import compile as lower
    from plmcc.ir.probes import positions_of
    from plmcc.models.source import load_source

    source = load_source(name)
    check_translates(source.model, name)
    tokenizer = source.need_tokenizer("translating")
    model: Any = source.model.eval()
    if device != "auto":
        model.to(_device(device))
    if model.device.type == "cpu":
        model.float()  # half precision is slower on most processors, and rounds more
    longest = default_length(model)
    if compiled:
        lower(model)
    positions = positions_of(model, "encoder")
    return Translator(tokenizer, model.generate, positions, longest, model.device)


def _exported(folder: Path, device: str, trust_programs: bool) -> Translator:
    exported = Exported(folder, trust_programs=trust_programs)
    made_for = exported.manifest.device
    if device not in ("auto", made_for):
        hint = "export the model on that device"
        message = "the export was made for another device"
        raise error("PLM502", message, "--device", got=device, allowed=made_for, hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        message = f"the tokenizer cannot be read: {first_line(problem)}"
        raise error("PLM401", message, str(folder)) from None
    longest = exported.search.max_length - 1
    location = torch.device("cpu")
    return Translator(tokenizer, exported.generate, exported.manifest.positions, longest, location)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise error("PLM502", "unknown device", "--device", got=name) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise error("PLM502", "torch does not find a GPU", "--device", got=name, hint="use cpu")
    return device


def _text(line: bytes, location: str) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        message = f"the line is not UTF-8 text: {problem.reason} at byte {problem.start + 1}"
        raise error(
            "PLM005", message, location, hint="convert it, for example with iconv"
        ) from None


def stream(
    translator: Translator, source: BinaryIO, name: str, options: Options, out: BinaryIO
) -> int:
    """Translate a file to another and return the number of lines; results are written as soon as
    their chunk is done, and counted on stderr where that is a terminal."""
    console = Console(file=sys.stderr)
    count = 0
    with console.status("translating") if console.is_terminal else nullcontext() as status:
        for count, line in enumerate(translator.lines(source, name, options), start=1):
            out.write(line.encode("utf-8") + b"\n")
            if count % options.batch == 0 and status is not None:
                status.update(f"{count} lines")
            out.flush()
    return count
