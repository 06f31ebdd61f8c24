"""`plmcc apply`: run a recipe on a model and write the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plmcc.cli.options import Overrides, Overwrite, RecipePath, Weights
from plmcc.cli.recipes import CheckedRecipe, check_recipe
from plmcc.diagnostics import PlmccError, error
from plmcc.utils.outputs import free, output_place

if TYPE_CHECKING:
    from plmcc.recipe.load import Recipe

_Directory = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Directory for the result; required."),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run from its finished work.")
]
_SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Word vectors: skip lines that cannot be read.")
]
_DumpAfter = Annotated[
    list[str] | None,
    typer.Option(
        "--dump-after",
        metavar="PASS",
        help="Write the model as text into DIR.dumps after this pass; repeatable.",
    ),
]


_KeepCode = Annotated[
    bool,
    typer.Option("--keep-code", help="Copy the Python files beside the model; they are not run."),
]


def apply(
    recipe: RecipePath,
    model: Weights = None,
    output: _Directory = None,
    overwrite: Overwrite = False,
    resume: _Resume = False,
    overrides: Overrides = None,
    skip_broken: _SkipBroken = False,
    dump_after: _DumpAfter = None,
    keep_code: _KeepCode = False,
) -> None:
    """Apply a recipe to a model: rewrite, train, save, and verify in a fresh process."""
    checked = check_recipe(recipe, overrides)
    output = _place(output)
    _check_early(checked, model, output, overwrite)
    loaded = checked.load()

    from rich.console import Console

    from plmcc.pipeline.cache import folder_of
    from plmcc.pipeline.compiler import apply as apply_recipe
    from plmcc.report.documents import print_summary
    from plmcc.utils import distributed

    given = _vectors(model, loaded.task) if skip_broken else model
    log: Any = typer.echo if distributed.is_main_process() else lambda _: None
    for line in _plan_lines(loaded, model, recipe.parent):
        log(line)
    chosen: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "base": recipe.parent}
    chosen |= {"dump_after": dump_after or (), "keep_code": keep_code}
    try:
        result = apply_recipe(loaded, given, output, **chosen, log=log)
    except KeyboardInterrupt:
        if folder_of(output).exists() and distributed.is_main_process():
            typer.echo("interrupted; the same command with --resume continues here", err=True)
        raise
    if distributed.is_main_process():
        print_summary(result, Console())
    distributed.destroy()


def _place(output: Path | None) -> Path:
    if output is None:
        raise error("PLM502", "the output directory is missing", "--output", hint="add -o DIR")
    return output_place(output)


def _check_early(checked: CheckedRecipe, model: str | None, output: Path, overwrite: bool) -> None:
    """Say "no" in seconds, before torch is imported."""
    name = model or checked.recipe.model
    if name is None:
        hint = "add MODEL to the command line, or `model:` to the recipe"
        raise error("PLM502", "no model is given", f"recipe {checked.recipe.name}", hint=hint)
    checked.check_data(model)
    free(output, overwrite)


def _vectors(model: str | None, task: str) -> Any:
    from plmcc.models.source import is_vectors, load_source

    if model is None or not is_vectors(Path(model)):
        message = "this option needs a file of word vectors"
        raise error("PLM502", message, "--skip-broken", got=model or "no model")
    return load_source(model, task, broken="skip")


def _plan_lines(recipe: Recipe, model: str | None, base: Path) -> list[str]:
    """The plan in a few lines; nothing where making one would cost too much.

    Problems are left to `apply`, which looks at the weights too.
    """
    from plmcc.models.source import is_vectors
    from plmcc.pipeline.prepare import prepares
    from plmcc.planning.plan import plan as make
    from plmcc.planning.view import short_lines
    from plmcc.recipe.load import Scratch

    name = model or recipe.model
    costly = any(prepares(p) for stage in recipe.steps() for p in stage.passes)
    if name is None or isinstance(name, Scratch) or is_vectors(Path(name)) or costly:
        return []  # a plan would read all text or all vectors
    try:
        made = make(recipe, name, base, brief=True)
    except PlmccError:
        return []
    return ["plan", *short_lines(made)] if not made.problems else []
