"""What the passes of a recipe will leave of each site, found out on the meta device.

`plmcc plan` shows it. `apply` looks at it before anything is trained, so that what cannot be saved
is refused first, and compares it with what was made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from plmcc import rewrite
from plmcc.api import Hard, Pass, Planned, Site, Soft
from plmcc.artifact.size import module_bytes, parameter_count
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError, error
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.program import Program
from plmcc.pipeline.prepare import prepares
from plmcc.recipe.load import Recipe
from plmcc.utils.text import first_line

UNKNOWN = "unknown, counted as it is"


@dataclass(frozen=True)
class PlannedSite:
    """A place that a rule rewrites, before and after. `about` says why the size is not exact."""

    path: str
    tied: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    """Of the weight; of a layer, empty."""
    module: str
    becomes: str
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    about: str = ""


Expected = Mapping[tuple[str, str], PlannedSite]
"""By the names of a stage and the primary path of a site."""


def expected_sites(recipe: Recipe, model: PreTrainedModel) -> Expected:
    """Return what each stage will make, as far as shapes say it.

    Args:
        recipe: with passes of real classes.
        model: as it is before the first stage; it is not changed.

    Raises:
        PlmccError: what a pass makes could not be saved and loaded.
    """
    outline, found = on_meta(model), {}
    for stage in recipe.steps():
        data = CalibrationData(planned=True)
        program = Program(outline, data)
        chosen = [one for one in stage.passes if not prepares(one)]
        try:
            # All before any of them changes the model.
            matched = [(one, rewrite.match_pass(program, one, "")[0]) for one in chosen]
        except Exception:  # it looks at values, or the stage does not fit: said when it is matched
            break
        for one, sites in matched:
            program.data.sites = sites
            for site in sites:
                made, planned = carry_out(program, one, site)
                found[stage.name, site.path] = made
                if planned is None:
                    return found  # what later stages will see is unknown
    return found


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model without its values: its tensors are on the meta device."""
    memo: dict[int, object] = {}
    for value in model.parameters():
        memo[id(value)] = nn.Parameter(value.to("meta"), value.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def carry_out(program: Program, chosen: Pass, site: Site) -> tuple[PlannedSite, Planned | None]:
    """Give a site the form that it will have; None: nobody knows which.

    Raises:
        PlmccError: that form could not be saved and loaded.
    """
    module, before = type(site.module).__name__, module_bytes(site.module)
    count, shape = (
        parameter_count(site.module),
        () if site.roles[0] == "layer" else _shape(site.module),
    )
    planned = _planned(chosen, site, program)
    about = planned if isinstance(planned, str) else planned.about
    if isinstance(planned, Planned):
        _check_saved(chosen, site, planned)
        rewrite.splice(program, site.paths, site.roles, planned.module)
    after = program.model.get_submodule(site.path)
    name = type(planned.module if isinstance(planned, Planned) else after).__name__
    made = PlannedSite(
        site.path,
        site.paths[1:],
        site.kind,
        shape,
        module,
        name,
        count,
        parameter_count(after),
        before,
        module_bytes(after),
        about,
    )
    return made, planned if isinstance(planned, Planned) else None


def _planned(chosen: Pass, site: Site, program: Program) -> Planned | str:
    """Return what a site becomes, or why nobody knows."""
    dtype = next((p.dtype for p in site.module.parameters() if p.is_floating_point()), None)
    try:
        with torch.device("meta"):
            planned = chosen.plan(site)
            if planned is None:
                soft = chosen.replace(site, program)
                rewrite.check_form(chosen, "replace", soft, site)
                more = _count(soft)
                hard = soft.harden()
                planned = Planned(hard, trained=max(0, more - _count(hard)))
    except PlmccError:
        raise
    except Exception as problem:  # a pass of somebody else, which may look at values
        return f"{UNKNOWN}: {first_line(problem)}"
    planned.module.to(dtype=dtype)
    planned.module.train(site.module.training)
    return planned


def _check_saved(chosen: Pass, site: Site, planned: Planned) -> None:
    """Check that a record of the form would build it again.

    Raises:
        PlmccError: it would not.
    """
    hard, name = planned.module, catalog.name_of(type(chosen))
    if isinstance(hard, Soft):
        return
    rewrite.check_form(chosen, "harden", hard, site)
    assert isinstance(hard, Hard)
    record = rewrite.Record(name, site.paths, site.roles, type(hard).__name__, hard.layout, ())
    try:
        again = rewrite.Record.from_json(json.loads(json.dumps(record.to_json())))
    except (TypeError, ValueError) as problem:
        message = f"`{name}` could not save what it makes: its layout is not JSON: {problem}"
        raise error("PLM112", message, f"model: {site.path}") from None
    try:
        built = rewrite.build(again)
    except PlmccError as problem:  # said of a config.json that there is not yet
        here = f"model: {site.path}"
        found = [replace(d, code="PLM112", location=here) for d in problem.diagnostics]
        raise PlmccError(*found) from None
    one, two = ({n: v.shape for n, v in m.state_dict().items()} for m in (hard, built))
    if again.layout != hard.layout or (site.roles[0] != "layer" and one != two):
        message = f"`{name}` could not load what it saves: its layout builds another module"
        raise error("PLM112", message, f"model: {site.path}", got=type(hard).__name__)


def check_made(
    expected: Expected, stage: str, model: PreTrainedModel, paths: Iterable[str]
) -> None:
    """Compare the sites of a finished stage with what was planned.

    Raises:
        PlmccError: a site whose size was known exactly has another one, or one that was planned as
            `at most` so many bytes has more.
    """
    for path in paths:
        planned = expected.get((stage, path))
        bound = planned is not None and planned.about.startswith("at most")
        if planned is None or (planned.about and not bound):
            continue
        made = module_bytes(model.get_submodule(path))
        if made > planned.bytes_after or (made < planned.bytes_after and not bound):
            message = "the plan of this site is wrong: `plan` of its pass has to be mended"
            most = "at most " if bound else ""
            given = f"{most}{planned.bytes_after:,} bytes planned, {made:,} made"
            raise error("PLM112", message, f"model: {path}", got=given)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return tuple(weight.shape) if weight is not None else ()
