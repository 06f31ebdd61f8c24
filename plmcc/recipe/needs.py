"""What the passes of a recipe need beside their options: training, and data to measure on."""

from __future__ import annotations

from plmcc.diagnostics import error
from plmcc.recipe.load import Recipe


def check_trained(recipe: Recipe) -> None:
    """Check that stages train what has to be trained.

    Raises:
        PlmccError: one does not.
    """
    for number, stage in enumerate(recipe.steps()):
        for index, chosen in enumerate(stage.passes):
            reason = chosen.needs_training() if stage.train is None else ""
            if reason:
                hint = "add a `train` section to this stage"
                location = recipe.pass_location(number, index)
                raise error("PLM303", reason, location, got="no `train`", hint=hint)


def check_calibrated(recipe: Recipe) -> None:
    """Check that passes which measure the model have data to measure on.

    Raises:
        PlmccError: one has none.
    """
    steps = recipe.steps()
    for number, stage in enumerate(steps):
        if recipe.calibration() is not None or any(later.train for later in steps[number:]):
            continue
        for index, chosen in enumerate(stage.passes):
            if reason := chosen.needs_data():
                hint = "add `calibrate: {data: FILE}`, or `{data: synthetic}` for random token ids"
                own = "text" in type(chosen).model_fields
                hint = (
                    f"add `text: FILE` to the pass, or {hint.removeprefix('add ')}" if own else hint
                )
                location = recipe.pass_location(number, index)
                raise error("PLM303", reason, location, got="no data", hint=hint)
