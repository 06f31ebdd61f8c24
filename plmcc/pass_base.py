"""The base class of every pass: its options. Imports neither torch nor transformers.

`plmcc check` validates recipes against these classes and has to answer at once, so what is needed
to *describe* a pass stays apart from what is needed to *run* one (`plmcc.api`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from plmcc.ir.forms import Objective, Planned, Soft
    from plmcc.ir.pretrained import Preparation, Pretrained
    from plmcc.ir.program import Program
    from plmcc.ir.site import Miss, Site

Preserves = Literal["exact", "within", "lossy"]


def invalid(code: str, message: str, *at: str | int, hint: str = "") -> PydanticCustomError:
    """Return an error for a validator to raise, `at` a place below the model being validated."""
    context = {"text": message, "code": code, "at": at, "hint": hint}
    return PydanticCustomError("plmcc", "{text}", context)


def refuse_unused(options: BaseModel, used: Mapping[str, object], given: str) -> None:
    """Refuse options that are set although the others make them meaningless.

    Args:
        options: a pass, or a section of its options.
        used: for each name of an option whether it has an effect.
        given: what takes the effect away, after "has no effect", such as "with `rank`".

    Raises:
        ValueError: an option without effect differs from its default; it names the option.
    """
    fields = type(options).model_fields
    for name, has_effect in used.items():
        if not has_effect and getattr(options, name) != fields[name].default:
            raise ValueError(f"`{name}` has no effect {given}: remove it")


class Pass(BaseModel):
    """A compression technique. Its fields are the options a recipe may give.

    A subclass is frozen and refuses unknown options. `targets` says where it applies (an alias such
    as `input_embeddings`, a glob, `re:<regex>` or `class:<Name>`), `expect` how many sites it must
    find. A validator of several options begins its message with the one at fault, in backticks:
    the recipe is marked there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preserves: ClassVar[Preserves] = "lossy"
    """What the pass promises of the outputs before any training: "exact", "within" `tolerance`, or
    nothing ("lossy"); the contract tests check it."""
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

    @field_validator("targets")
    @classmethod
    def _are_regular_expressions(cls, targets: str | list[str]) -> str | list[str]:
        for index, target in enumerate([targets] if isinstance(targets, str) else targets):
            pattern = target.removeprefix("re:")
            try:
                regex.compile(pattern if pattern != target else "")
            except (regex.error, OverflowError, RecursionError) as problem:
                at = () if isinstance(targets, str) else (index,)
                message = f"`{pattern}` is not a regular expression: {problem}"
                hint = "put a backslash before characters that are meant literally"
                raise invalid("PLM107", message, *at, hint=hint) from None
        return targets

    def needs_training(self) -> str:
        """Return why a stage with this pass must have a `train` section, or nothing if it need
        not."""
        return ""

    def needs_data(self) -> str:
        """Return why the pass measures the model on data (`program.data`), or nothing if it does
        not. A recipe without data is then refused before anything is done."""
        return ""

    def calibrates_on(self) -> list[str]:
        """Return the files of raw text that the pass measures on, where it names its own: a recipe
        without `calibrate` then gets one with these."""
        return []

    def speed_target(self) -> tuple[float, int, int] | None:
        """Return how many times faster the model is to get, at which batch size and sequence length
        (tokens); None where the options ask for no speed. The finished model is measured there, and
        a result that is more than 5 % slower than asked is said."""
        return None

    def reads(self) -> list[str]:
        """Return the data files that this pass reads by itself; their digests are recorded."""
        return []

    def prepare(self, source: Pretrained, base: Path | None) -> Preparation | None:
        """Change the model in place and return its new tokenizer, before data is encoded.

        For passes that change the tokenizer: they have nothing to match, and belong in the first
        stage of a recipe. `base` is where relative paths may start. None: nothing to prepare.
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

    def replace(self, site: Site, program: Program) -> Soft:
        """Return the trainable replacement of a site, initialized from the matched weights.

        `program.data` measures the model on the data of the stage; in a plan, on the meta device,
        its statistics have shapes and no values.
        """
        raise NotImplementedError

    def objective(self, site: Site, soft: Soft) -> Objective | None:
        """Return what this site adds to training, or None. Sites of a pass may share one object."""
        return None
