"""An export directory: compiled programs that run without the model's code.

Nothing here imports transformers. A `.pt2` file holds machine code: load directories only that you
made or trust, as you would start a program.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from plmcc.diagnostics import error, listing
from plmcc.export.exported_search import ExportedSearch
from plmcc.export.manifest import Manifest
from plmcc.export.runners import open_program
from plmcc.inference.beam_search import GenerationSettings
from plmcc.inference.cuda_graphs import Run
from plmcc.inference.decode import decode, in_range
from plmcc.utils.types import Values


class Exported:
    """A loaded export directory: an encoder is called, a translation model has `generate`.

    Compiled programs are native code: those that this user has not exported on this machine are run
    with `trust_programs` only.

    Raises:
        PlmccError: it is damaged, this machine cannot run it, its runtime is not installed, or it
            is not trusted.
    """

    def __init__(self, folder: str | Path, *, trust_programs: bool = False) -> None:
        folder = Path(folder)
        self.manifest = Manifest.read(folder)
        self.manifest.check(folder, trust_programs)
        self._run: Run | None = None
        self._programs: ExportedSearch | None = None
        if self.manifest.kind == "translation":
            self._programs = ExportedSearch(folder, self.manifest)
        else:
            known = self.manifest
            names = ([port["name"] for port in ports] for ports in (known.inputs, known.outputs))
            self._run = open_program(folder, known.target, known.device, *names)

    @property
    def search(self) -> GenerationSettings:
        """What a translation model searches for when nothing is asked.

        Raises:
            PlmccError: the export does not translate.
        """
        return self._translator().search

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run an encoder.

        Args:
            input_ids: token ids `[batch, length]` (whole numbers).
            attention_mask: 1 for a token, 0 for padding, of the same shape; default all tokens.
            token_type_ids: which text a token belongs to, of the same shape; default the first.

        Returns:
            `last_hidden_state` `[batch, length, width]`, or the `logits`, or `start_logits` and
            `end_logits` of the model's head, by name.

        Raises:
            PlmccError: too many tokens or rows, none or unknown ones, inputs of other shapes, or
                the export is of a translation model.
        """
        if self._run is None:
            hint = "call `generate`"
            raise error("PLM502", "this is a translation model", self.manifest.name, hint=hint)
        self._check_ids(input_ids)
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        default = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        inputs = [input_ids]
        for port in self.manifest.inputs[1:]:
            name, value = port["name"], given[port["name"]]
            inputs.append(default[name](input_ids) if value is None else value)
            self._check_like(name, inputs[-1], input_ids, port["values"])
        self._check_size(*input_ids.shape)
        return self._outputs(self._run, inputs)

    def _outputs(self, run: Run, inputs: list[Tensor]) -> dict[str, Tensor]:
        least = self.manifest.dimensions["length"][0] or 1
        home, length = inputs[0].device, inputs[0].shape[1]
        # Lengths of one token are another case for torch.export.
        missing = max(0, least - length)
        placed = [x.to(self.manifest.device, torch.long) for x in inputs]
        found = run([functional.pad(x, (0, missing)).contiguous() for x in placed])
        outputs = {}
        for port, value in zip(self.manifest.outputs, found, strict=True):
            by_token = missing and port["shape"][1:2] == ["length"]
            outputs[port["name"]] = (value[:, :length] if by_token else value).to(home)
        return outputs

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
            PlmccError: too many tokens, none or unknown ones, a mask of another shape, more beams
                than the export has programs for, or the export is of an encoder.
        """
        programs = self._translator()
        given: Values = {
            "num_beams": num_beams,
            "max_length": None if max_new_tokens is None else max_new_tokens + 1,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        search = replace(programs.search, **{k: v for k, v in given.items() if v is not None})
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_ids(input_ids)
        self._check_like("attention_mask", attention_mask, input_ids, 2)
        self._check_search(input_ids.shape[1], search)
        programs.check(search)
        device = self.manifest.device
        source, mask = (x.to(device, torch.long) for x in (input_ids, attention_mask))
        return decode(programs, source, mask, search).to(input_ids.device)

    def _translator(self) -> ExportedSearch:
        if self._programs is None:
            outputs = listing([port["name"] for port in self.manifest.outputs])
            hint = f"call the export itself: it returns {outputs}"
            raise error("PLM502", "this model does not translate", self.manifest.name, hint=hint)
        return self._programs

    def _check_ids(self, input_ids: Tensor) -> None:
        """Programs trust their inputs: one token out of range would end the process."""
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            given = f"{input_ids.dtype} {list(input_ids.shape)}"
            allowed = "whole numbers [batch, length]"
            raise error("PLM302", "these are not token ids", got=given, allowed=allowed)
        vocabulary = self.manifest.vocabulary
        if not in_range(input_ids, vocabulary):
            given = f"{input_ids.min()} to {input_ids.max()}" if input_ids.numel() else "none"
            message, allowed = "the model does not have these tokens", f"0 to {vocabulary - 1}"
            hint = "use the tokenizer of the export"
            raise error("PLM302", message, got=given, allowed=allowed, hint=hint)

    def _check_like(self, name: str, value: Tensor, input_ids: Tensor, values: int) -> None:
        if value.shape != input_ids.shape:
            message = f"`{name}` does not have the shape of the token ids"
            given, allowed = str(list(value.shape)), str(list(input_ids.shape))
            raise error("PLM302", message, got=given, allowed=allowed)
        if not in_range(value, values):
            given, allowed = f"{value.min()} to {value.max()}", f"0 to {values - 1}"
            raise error("PLM302", f"`{name}` is out of range", got=given, allowed=allowed)

    def _check_size(self, batch: int, length: int) -> None:
        for name, size in (("batch", batch), ("length", length)):
            limit = self.manifest.dimensions[name][1]
            if limit is not None and size > limit:
                message = f"the {name} is larger than the program supports"
                raise error("PLM302", message, got=str(size), allowed=f"at most {limit}")

    def _check_search(self, length: int, search: GenerationSettings) -> None:
        for option, asked in (
            ("num_beams", search.num_beams),
            ("max_new_tokens", search.max_length - 1),
        ):
            if asked < 1:
                message = f"`{option}` is out of range"
                raise error("PLM502", message, got=str(asked), allowed="at least 1")
        limit = self.manifest.positions
        for what, size in (("source", length), ("translation", search.max_length - 1)):
            if limit is not None and size > limit:
                given, allowed = f"{size} tokens", f"{limit} tokens"
                raise error("PLM302", f"the {what} is too long", got=given, allowed=allowed)
