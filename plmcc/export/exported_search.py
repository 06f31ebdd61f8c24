"""The programs of an exported translation model, loaded.

Nothing here imports transformers.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from plmcc.diagnostics import error
from plmcc.export.manifest import MANIFEST, Manifest
from plmcc.export.runners import open_aoti
from plmcc.inference.beam_search import GenerationSettings
from plmcc.utils.text import first_line
from plmcc.utils.types import Values


class ExportedSearch:
    """Programs of an export (`plmcc.inference.decode.Programs`), and their default search."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        assert manifest.translation is not None
        self._values: Values = manifest.translation
        known = self._values["search"]
        try:
            tuples = {name: tuple(known[name]) for name in ("eos", "banned")}
            self.search = GenerationSettings(**known | tuples)
        except (KeyError, TypeError, ValueError) as problem:
            message = f"the settings of the search make no sense: {first_line(problem)}"
            hint = "export the model again"
            raise error("PLM401", message, str(folder / MANIFEST), hint=hint) from None
        self._encode = open_aoti(folder / "encode.pt2", manifest.device)
        self._steps = {
            size: open_aoti(folder / f"step-{size}.pt2", manifest.device, replayed=True)
            for size in self._values["steps"]
        }

    @property
    def restrictions(self) -> tuple[tuple[int, ...], bool]:
        """What the model's generation config forbade to write."""
        return self.search.restrictions

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and width of each self-attention cache."""
        return [(heads, width) for heads, width in self._values["shapes"]]

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        """Read the source."""
        return self._encode([source_BS, mask_BS])

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        """Read one target token in each beam."""
        size = candidates if candidates == 1 else min(s for s in self._steps if s >= candidates)
        return self._steps[size](inputs)

    def check(self, search: GenerationSettings) -> None:
        """Refuse a search that there is no program for.

        Raises:
            PlmccError: it needs more candidates than the export was made for.
        """
        if search.candidates not in self._steps and (
            search.candidates == 1 or search.candidates > max(self._steps)
        ):
            message = f"the export has no program for {search.num_beams} beams"
            raise error("PLM502", message, hint="export the model with that --beam")
