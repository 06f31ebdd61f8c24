"""What every pass must satisfy before its result is saved: the first half of the contract.

`plmcc.testing.model_checks` has the second, of compressed models. The tests run both for every pass
on every small architecture, and `plmcc check-pass` for the pass of somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.api import Pass
from plmcc.artifact import format as artifact
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import CalibrationData
from plmcc.pipeline.expected import UNKNOWN, check_made, expected_sites
from plmcc.recipe.load import Recipe, parse_recipe
from plmcc.testing.model_checks import output, require, require_same_state
from plmcc.utils.numerics import relative_difference

_REFUSALS = ("PLM201", "PLM203")
_FOR_PROGRAMMERS = re.compile(r" at 0x|Traceback|Error\(|<class")


@dataclass(frozen=True)
class Case:
    """A pass on an architecture. `original` makes the same model anew with each call; `inputs` are
    arguments of it, `labeled` those with what its loss needs."""

    chosen: Pass
    original: Callable[[], PreTrainedModel]
    inputs: dict[str, Tensor]
    labeled: dict[str, Tensor]

    def matched(self, model: PreTrainedModel) -> rewrite.Matched:
        """Match the pass.

        Raises:
            PlmccError: it does not fit the model.
        """
        return rewrite.match(model, [self.chosen], data=CalibrationData.random(model))

    def softened(self) -> tuple[PreTrainedModel, list[rewrite.Replacement]]:
        """Return a new model with the trainable forms in place."""
        model = self.original()
        return model, rewrite.replace_all(model, self.matched(model))

    def hardened(self) -> tuple[PreTrainedModel, list[rewrite.Replacement], list[rewrite.Record]]:
        """Return a new model with the deployed forms in place, ready to be saved."""
        model, done = self.softened()
        records = rewrite.harden_all(model, done)
        artifact.adopt(model, records)
        return model, done, records


def is_sentence(text: str) -> bool:
    """Say whether a text is several words, and nothing that only a programmer reads."""
    return len(text.split()) >= 4 and not _FOR_PROGRAMMERS.search(text)


# --- what a pass says of itself


def options_survive_json(chosen: Pass) -> None:
    """Options are the same after a recipe has been written and read."""
    kind = type(chosen)
    require(
        kind.model_validate_json(chosen.model_dump_json()) == chosen,
        "the options are others after JSON",
    )
    recipe = Recipe(passes=[chosen])
    again = parse_recipe(recipe.to_yaml(), load_torch=True)
    same = again.passes[0] == chosen and type(again.passes[0]) is kind
    require(same, "a recipe that was written and read has other options")
    require(again.digest() == recipe.digest(), "a recipe that was read has another digest")


def options_are_fixed(chosen: Pass) -> None:
    """Unknown options and changes are refused."""
    try:
        type(chosen).model_validate(chosen.model_dump() | {"no_such_option": 1})
    except ValidationError as problem:
        require("no_such_option" in str(problem), "an unknown option gives another error")
    else:
        require(False, "an option that does not exist is accepted")
    try:
        chosen.targets = "linears"  # type: ignore[misc]
    except ValidationError:
        return
    require(False, "options can be changed after they were checked")


def a_pass_describes_itself(chosen: Pass) -> None:
    """Class and options have docstrings, the paper is named, hazards are sentences."""
    kind = type(chosen)
    require(kind.__doc__, "the class has no docstring")
    require(kind.paper, "`paper` does not say where the technique comes from")
    require(kind.preserves in ("exact", "within", "lossy"), f"`preserves` is {kind.preserves!r}")
    exact = (kind.tolerance > 0) == (kind.preserves == "within")
    require(exact, '`tolerance` is for `preserves = "within"`, and needed there')
    for hazard in kind.hazards:
        require(is_sentence(hazard), f"this hazard is no sentence: {hazard}")
    for option, about in kind.model_fields.items():
        require(about.description, f"the option `{option}` has no docstring")


# --- matching


def sites_are_places(case: Case) -> None:
    """What is matched or refused is in the model, and refusals are sentences."""
    model = case.original()
    try:
        found = case.matched(model)
    except PlmccError as problem:
        for said in problem.diagnostics:
            require(said.code in _REFUSALS, f"it is refused by {said.code}: {said.message}")
            require(is_sentence(said.message), f"this refusal is no sentence: {said.message}")
            reason = said.got or said.hint
            require(is_sentence(reason), f"this reason is no sentence: {reason}")
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for _, miss in found.misses:
        require(is_sentence(miss.reason), f"{miss.path}: this reason is no sentence: {miss.reason}")
        require(miss.path in modules, f"the model has no {miss.path}, which is refused")
    for _, site in found.sites:
        count = len(site.paths)
        require(
            count == len(site.roles) == len(site.modules),
            f"{site.path}: a site needs as many roles and modules as paths",
        )
        for path, module in zip(site.paths, site.modules, strict=True):
            require(modules.get(path) is module, f"{path} is another module than the site says")


def sites_have_all_tied_paths(case: Case) -> None:
    """A weight that is replaced is not left behind where it is tied."""
    model = case.original()
    for _, site in case.matched(model).sites:
        weights = {id(p) for m in site.modules for p in m.parameters() if p.dim() > 1}
        for path, module in model.named_modules(remove_duplicate=False):
            inside = any(f"{path}.".startswith(f"{own}.") for own in site.paths)
            shared = any(id(p) in weights for p in module.parameters(recurse=False))
            require(
                inside or not shared,
                f"{path} is tied to {site.path}, and not in `paths` of the site: it would keep "
                "the old weight",
            )


def matching_changes_nothing(case: Case) -> None:
    """Matching leaves modules and weights as they are."""
    model, untouched = case.original(), case.original()
    names = [(path, type(module)) for path, module in model.named_modules()]
    case.matched(model)
    after = [(path, type(module)) for path, module in model.named_modules()]
    require(names == after, "matching changes modules of the model")
    require_same_state(model, untouched)


def wrong_uses_are_errors(case: Case) -> None:
    """The same pass twice, targets that name nothing, another count than `expect`: errors."""
    chosen, name = case.chosen, catalog.name_of(type(case.chosen))
    nowhere = chosen.model_copy(update={"targets": "no.such.module"})
    counted = chosen.model_copy(update={"expect": 77})
    _require_error(case, [chosen, chosen], "PLM204", f"two `{name}` rewrite the same places")
    _require_error(case, [nowhere], "PLM201", "`targets` that name nothing are no error")
    _require_error(case, [counted], "PLM202", "`expect` is not looked at")


def _require_error(case: Case, passes: list[Pass], code: str, otherwise: str) -> None:
    try:
        rewrite.match(case.original(), passes)
    except PlmccError as problem:
        said = problem.diagnostics[0]
        require(said.code == code, f"{otherwise} as such: {said.code}, {said.message}")
    else:
        require(False, otherwise)


# --- the trainable form


def hardening_keeps_the_function(case: Case) -> None:
    """The deployed form computes what the trainable form does."""
    model, done = case.softened()
    soft = output(model, case.inputs)
    rewrite.harden_all(model, done)
    hard = output(model, case.inputs)
    require(torch.isfinite(hard).all(), "after hardening the outputs are not finite")
    _require_close(soft, hard, max(1e-4, case.chosen.tolerance), "hardening changes the outputs")


def its_plan_is_what_it_makes(case: Case) -> None:
    """The plan of each site has the bytes that are made."""
    recipe = Recipe(passes=[case.chosen])
    expected = expected_sites(recipe, case.original())
    (stage,) = recipe.steps()
    model, done, _ = case.hardened()
    unknown = [one.path for one in expected.values() if one.about.startswith(UNKNOWN)]
    require(not unknown, f"{', '.join(unknown[:2])}: the plan does not know what it becomes")
    check_made(expected, stage.name, model, [one.site.path for one in done])


def it_preserves_what_it_says(case: Case) -> None:
    """Shape and type of the outputs stay, and with `exact` or `within` their values."""
    original, (model, _, _) = case.original(), case.hardened()
    before, after = output(original, case.inputs), output(model, case.inputs)
    require(
        before.shape == after.shape,
        f"the outputs have the shape {tuple(after.shape)}, and had {tuple(before.shape)}",
    )
    require(before.dtype == after.dtype, f"the outputs are {after.dtype}, and were {before.dtype}")
    if case.chosen.preserves != "lossy":
        rounding = 1e-5 if before.dtype == torch.float32 else 2e-2
        bound = max(rounding, case.chosen.tolerance)
        what = f"`preserves` is {case.chosen.preserves}, and it changes the outputs"
        _require_close(before, after, bound, what)


def the_trainable_form_learns(case: Case) -> None:
    """Every parameter of the trainable form has a finite gradient, some of them not zero."""
    model, done = case.softened()
    model.train()(**case.labeled).loss.backward()
    for replacement in done:
        path = replacement.site.path
        learned = []
        for name, parameter in model.get_submodule(path).named_parameters():
            require(parameter.grad is not None, f"{path}.{name} has no gradient")
            assert parameter.grad is not None
            require(
                torch.isfinite(parameter.grad).all(), f"{path}.{name}: a gradient is not finite"
            )
            learned.append(bool(parameter.grad.any()))
        require(any(learned) or not learned, f"{path}: all gradients are zero")


def fitting_is_the_same_every_time(case: Case) -> None:
    """Fitting does not depend on the global random state."""
    torch.manual_seed(1)
    one = case.hardened()[0]
    torch.manual_seed(2)
    require_same_state(one, case.hardened()[0])


def it_works_without_data(case: Case) -> None:
    """A pass that does not say that it needs data works without."""
    if case.chosen.needs_data():
        return
    model = case.original()
    rewrite.replace_all(model, rewrite.match(model, [case.chosen]))
    require(torch.isfinite(output(model, case.inputs)).all(), "the outputs are not finite")


def layouts_are_json(case: Case) -> None:
    """A layout holds plain values, the same after JSON."""
    for record in case.hardened()[2]:
        for key, value in record.layout.items():
            location = f"{record.paths[0]}: `{key}` of the layout is no plain JSON value"
            try:
                same = json.loads(json.dumps(value)) == value
            except TypeError as problem:
                same, location = False, f"{location} ({problem})"
            require(same, f"{location}: {value!r}")


def _require_close(one: Tensor, two: Tensor, bound: float, what: str) -> None:
    difference = relative_difference(two, one)
    require(
        difference <= bound,
        f"{what} by {difference:.3g} of their scale; at most {bound:g} is allowed",
    )


ALONE: dict[str, Callable[[Pass], None]] = {
    check.__name__: check
    for check in (options_survive_json, options_are_fixed, a_pass_describes_itself)
}
"""Checks of a pass by itself."""

CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        sites_are_places,
        sites_have_all_tied_paths,
        matching_changes_nothing,
        wrong_uses_are_errors,
        hardening_keeps_the_function,
        it_preserves_what_it_says,
        the_trainable_form_learns,
        fitting_is_the_same_every_time,
        it_works_without_data,
        layouts_are_json,
        its_plan_is_what_it_makes,
    )
}
"""Checks of a pass on an architecture that it fits, in this order: later ones rely on the first."""
