"""The base class of every pass: its options. Imports neither torch nor transformers.

`plmcc check` validates recipes against these classes and has to answer at once, so what is needed
to *describe* a pass stays apart from what is needed to *run* one (`plmcc.api`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from plmcc.api import Miss, Objective, Planned, Site, Soft
    from plmcc.program import Program
    from plmcc.source import Source

Preserves = Literal["exact", "within", "lossy"]


class Pass(BaseModel):
    """A compression technique. Its fields are the options a recipe may give.

    A subclass is frozen and refuses unknown options. `targets` says where it applies (an alias such
    as `input_embeddings`, a glob, `re:<regex>` or `class:<Name>`), `expect` how many sites it must
    find. A validator of several options begins its message with the one at fault, in backticks:
    the recipe is marked there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preserves: ClassVar[Preserves] = "lossy"
    tolerance: ClassVar[float] = 0.0
    """For `preserves = "within"`: the largest allowed difference of the outputs, relative to their
    scale."""
    paper: ClassVar[str] = ""
    """Where the technique comes from."""
    hazards: ClassVar[tuple[str, ...]] = ()
    """What a user should know before choosing it; one sentence each."""

    targets: str | list[str] = ""
    """Where to apply: an alias, a glob, `re:<regex>` or `class:<Name>`, or a list of them."""
    expect: int | None = Field(default=None, ge=1)
    """How many sites the targets must match; any other number is an error."""

    def needs_training(self) -> str:
        """Return why a stage with this pass must have a `train` section, or nothing if it need
        not."""
        return ""

    def reads(self) -> list[str]:
        """Return the data files that this pass reads by itself; their digests are recorded."""
        return []

    def prepare(self, source: Source, base: Path | None) -> dict[str, float] | None:
        """Change model and tokenizer in place, before data is encoded and anything is matched.

        Passes that do so have nothing to match; they stand in a recipe's first stage. `base` is
        where relative paths may start. Returns what the report says, or None: nothing to prepare.
        """
        return None

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the sites this pass will rewrite, and for each one it refuses a `Miss` with the
        reason."""
        raise NotImplementedError

    def plan(self, site: Site) -> Planned | None:
        """Return what a site of a model without weights (on the meta device) will become.

        For passes whose `replace` or `harden` looks at values. None, the default, leaves it to
        these two, run on the meta device.
        """
        return None

    def replace(self, site: Site) -> Soft:
        """Return the trainable replacement of a site, initialised from the matched weights."""
        raise NotImplementedError

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Return what this site adds to training, or None."""
        return None
