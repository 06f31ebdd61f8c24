"""`plmcc check-pass`: every check of the contract, for one pass on tiny models of many
architectures."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plmcc.api import Pass
from plmcc.diagnostics import Diagnostic, PlmccError, error
from plmcc.pipeline.prepare import prepares
from plmcc.recipe.load import parse_recipe
from plmcc.testing import model_checks as contract
from plmcc.testing import pass_checks as pass_contract
from plmcc.testing.dry_run import Verdict
from plmcc.testing.tiny import inputs, prompt
from plmcc.testing.variants import VARIANTS
from plmcc.utils.types import Values

_ALONE = "-"
_SLOW = (contract.modules_compile, contract.programs_take_any_size, contract.programs_run)
_ONCE = ("fresh_processes_agree", "modules_compile", "programs_run")
"""Checks that take long: made on the first architecture that the pass fits."""
_FLOAT32 = ("sites_have_all_tied_paths", "hardening_keeps_the_function")
"""Checks that half precision is too rough for, or that see nothing new there."""


@dataclass(frozen=True)
class Line:
    """A check on an architecture (`-` where it needs none), and why it is no pass."""

    architecture: str
    check: str
    about: str
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


def with_options(name: str, options: Sequence[str]) -> Pass:
    """Return a pass with options given as `name=value`.

    Raises:
        PlmccError: an option that does not exist or does not fit, or a pass that rewrites nothing.
    """
    head = f"passes.0.{name}."
    given, text = [head + option for option in options], f"plmcc: 1\npasses: [{name}]\n"
    try:
        chosen = parse_recipe(text, name, given, load_torch=True).passes[0]
    except PlmccError as problem:
        raise PlmccError(
            *(_as_option(d, f"--set {head}", name) for d in problem.diagnostics)
        ) from None
    if prepares(chosen):
        message = "it changes model and tokenizer before anything is matched"
        hint = "use `plmcc test` with a recipe"
        raise error("PLM502", message, name, got="`prepare`", allowed="`match`", hint=hint)
    return chosen


def _as_option(found: Diagnostic, head: str, name: str) -> Diagnostic:
    """An error of the recipe that nobody wrote, as one of the command line."""
    location = str(found.location)
    if found.code == "PLM130":
        return replace(found, message="this is not `name=value`", allowed="", location="--option")
    return replace(
        found, location=location.replace(head, "--option ") if head in location else name
    )


CHECK_NAMES = (
    *pass_contract.ALONE,
    *pass_contract.CHECKS,
    "it_is_saved",
    *contract.CHECKS,
    *(check.__name__ for check in _SLOW),
)
"""The names of all checks."""


def check_pass(
    chosen: Pass, architectures: Sequence[str], only: str | None = None
) -> Iterator[Line]:
    """Yield how each check of the contract ends, as it ends; with `only`, that of one check.

    An exception in the pass is a failed check. Where the pass does not fit an architecture there is
    a single line with the reason; where it fits none, a failed one at the end.
    """
    for check in pass_contract.ALONE.values():
        if only in (None, check.__name__):
            yield _line(_ALONE, check, chosen)
    if only in pass_contract.ALONE:
        return
    fits = False
    for architecture in architectures:
        case = _case(chosen, architecture)
        reason = _refusal(case)
        if reason:
            yield _line(architecture, pass_contract.sites_are_places, case, reason)
        else:
            lines = _on(case, architecture, not fits, only)
            yield from (line for line in lines if only in (None, line.check))
            fits = True
    if not fits:
        reason = "it fits none of the architectures: set other options with --option"
        yield Line(_ALONE, "it_fits", "A pass fits at least one architecture.", "fail", reason)


def _case(chosen: Pass, architecture: str) -> pass_contract.Case:
    variant = VARIANTS[architecture]
    given = inputs(variant.architecture)
    source = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    labeled = given | {"labels": given[source]}
    return pass_contract.Case(chosen, variant.model, given, labeled)


def _refusal(case: pass_contract.Case) -> str:
    """Why a pass does not fit an architecture; empty where it does, or fails in another way."""
    try:
        case.matched(case.original())
    except PlmccError as problem:
        said = problem.diagnostics[0]
        return f"it does not fit: {said.got or said.message}"
    except Exception:  # a pass is foreign code; the checks will say what is wrong
        return ""
    return ""


def _on(
    case: pass_contract.Case, architecture: str, first: bool, only: str | None
) -> Iterator[Line]:
    rounded = case.original().dtype != torch.float32
    for check in pass_contract.CHECKS.values():
        if only not in (None, check.__name__) or (rounded and check.__name__ in _FLOAT32):
            continue
        line = _line(architecture, check, case)
        yield line
        if check is pass_contract.sites_are_places and line.verdict == "fail":
            return
    if only in pass_contract.CHECKS or not VARIANTS[architecture].saved:
        return
    with tempfile.TemporaryDirectory(prefix="plmcc-check-") as folder:
        made: list[contract.Subject] = []

        def it_is_saved(case: pass_contract.Case) -> None:
            """It is hardened, and `save_pretrained` writes it."""
            model, _, records = case.hardened()
            model.save_pretrained(folder)
            given = Path(folder), case.inputs, prompt(VARIANTS[architecture].architecture)
            made.append(contract.Subject(model, case.original(), tuple(records), *given))

        yield _line(architecture, it_is_saved, case)
        checks = contract.CHECKS | {check.__name__: check for check in _SLOW}
        for name, done in checks.items() if made else ():
            if only not in (None, name):
                continue
            if first or name not in _ONCE:
                yield _line(architecture, done, made[0])


def _line(architecture: str, check: Callable[[Any], None], given: object, skip: str = "") -> Line:
    about, start = (check.__doc__ or check.__name__).strip(), time.perf_counter()
    verdict: Verdict = "pass"
    reason = ""
    try:
        check(given)
    except contract.NotApplicable as problem:
        verdict, reason = "skip", str(problem)
    except (contract.Broken, PlmccError) as problem:
        verdict, reason = "fail", " ".join(str(problem).split())
    except Exception as problem:  # a pass is foreign code, and failing is what is looked for
        verdict, reason = "fail", raised(problem)
    else:
        verdict, reason = ("skip", skip) if skip else (verdict, reason)
    seconds = round(time.perf_counter() - start, 3)
    return Line(architecture, check.__name__, about, verdict, reason, seconds)


def raised(problem: Exception) -> str:
    """Return an exception of foreign code in a line, with the place where it was raised."""
    words = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    at = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{words} ({Path(at.filename).name}, line {at.lineno})"
