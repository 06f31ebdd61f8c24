"""The command line. A command imports what it needs when it runs: help and checks are fast."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from plmcc import (
    cli_bench,
    cli_check_pass,
    cli_compare,
    cli_diff,
    cli_plan,
    cli_proof,
    cli_search,
    cli_vectors,
)
from plmcc.cli_plan import Format, Output, Overrides, RecipePath, print_json
from plmcc.diagnostics import PlmccError, error, out_of_memory

_INTERRUPTED = 130  # what typer exits with after Ctrl-C

app = typer.Typer(
    name="plmcc",
    help="Compress a pretrained language model by a recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_vectors.app, name="vectors")
app.command("bench")(cli_bench.bench)
app.command("diff")(cli_diff.diff)
app.command("compare")(cli_compare.compare)
app.command("verify")(cli_proof.verify)
app.command("reproduce")(cli_proof.reproduce)
app.command("search")(cli_search.search)
app.command("check-pass")(cli_check_pass.check_pass)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, output: Output = Format.text) -> None:
    """Check a recipe, without a model and without data."""
    from plmcc.recipe import load_recipe

    try:
        steps = load_recipe(recipe, overrides or ()).steps()
    except PlmccError as problem:
        if output is Format.text:
            raise
        print_json({"ok": False, "file": str(recipe), "diagnostics": problem.to_json()})
        raise typer.Exit(1) from None
    stages, passes = len(steps), sum(len(step.passes) for step in steps)
    if output is Format.json:
        counts = {"stages": stages, "passes": passes}
        print_json({"ok": True, "file": str(recipe), "diagnostics": [], **counts})
    else:
        typer.echo(f"{recipe}: ok ({_count(stages, 'stage')}, {_count(passes, 'pass')})")


@app.command()
def schema(
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from plmcc.recipe_schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if file is None:
        typer.echo(text)
    else:
        file.write_text(text + "\n", encoding="utf-8")


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A single pass.")] = None,
    output: Output = Format.text,
) -> None:
    """List the passes, or show the options of one."""
    from plmcc import catalog_view

    if name is None:
        rows = catalog_view.overview()
        print_json(rows) if output is Format.json else catalog_view.print_overview(rows)
    else:
        details = catalog_view.details(name)
        print_json(details) if output is Format.json else catalog_view.print_details(details)


app.command()(cli_plan.plan)
app.command()(cli_plan.match)
app.command("test")(cli_plan.try_out)


@app.command()
def apply(
    recipe: RecipePath,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model directory or hub id.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result that plmcc wrote there.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an earlier run has finished.")
    ] = False,
    overrides: Overrides = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Word vectors: leave broken lines out.")
    ] = False,
) -> None:
    """Apply a recipe to a model: rewrite, train, write, and verify in a fresh process."""
    from plmcc.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # mistakes show at once, before torch is imported
    if output is None:
        raise error("PLM502", "no output directory is named", "--output", cure="add -o DIR")

    from rich.console import Console

    from plmcc import ranks
    from plmcc.compiler import apply as apply_recipe
    from plmcc.report import print_summary
    from plmcc.stages import folder_of
    from plmcc.terminal import calm

    calm()
    loaded = load_recipe(recipe, overrides or (), real=True)
    given = _vectors(model, loaded.task) if skip_broken else model
    say: Any = typer.echo if ranks.first() else lambda _: None
    for line in cli_plan.short(loaded, model, recipe.parent):
        say(line)
    chosen: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "base": recipe.parent}
    try:
        result = apply_recipe(loaded, given, output, **chosen, say=say)
    except KeyboardInterrupt:
        if folder_of(output).exists() and ranks.first():
            typer.echo("the same command with --resume goes on from here", err=True)
        raise
    if ranks.first():
        print_summary(result, Console())
    say(f"written to {output}; a fresh process reloaded it with the same outputs")
    ranks.leave()


def _vectors(model: str | None, task: str) -> Any:
    from plmcc.source import is_vectors, load_source

    if model is None or not is_vectors(Path(model)):
        given = model or "no model"
        raise error("PLM502", "this goes with a file of word vectors", "--skip-broken", given=given)
    return load_source(model, task, broken="skip")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the export goes.")
    ],
    to: Annotated[str, typer.Option("--to", help="aoti, onnx or executorch.")] = "aoti",
    beam: Annotated[
        int, typer.Option("--beam", min=1, help="Translation: the most beams to be asked for.")
    ] = 4,
    int8: Annotated[
        bool, typer.Option("--int8", help="Linear layers in int8 (aoti: extra `quantize`).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an export that plmcc wrote there.")
    ] = False,
) -> None:
    """Write an encoder, or a translation model, as programs that run without its Python code."""
    from plmcc.export_targets import check_target

    check_target(to)  # at once, before torch is imported

    from plmcc.export import export_directory
    from plmcc.terminal import calm

    calm()
    made = export_directory(model, output, to, num_beams=beam, overwrite=overwrite, int8=int8)
    if made.difference is not None:
        typer.echo(f"outputs within {made.difference:.1e} of their scale in a fresh process")
    code = "; its .pt2 files hold machine code" if to == "aoti" else ""
    typer.echo(f"written to {output}{code}")


@app.command()
def translate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, hub id or export directory.")
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A sentence on each line; or stdin.")
    ] = None,
    beam: Annotated[
        int | None, typer.Option("--beam", min=1, help="Beams; 1 is greedy search.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sentences at a time.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest translation.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile first: for long inputs.")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut sentences that are too long for the model.")
    ] = False,
) -> None:
    """Translate lines from a file or stdin to stdout."""
    name = "stdin" if file is None else str(file)
    # Opened first: a missing file shows before a model is loaded.
    with nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as opened:
        from plmcc.terminal import calm
        from plmcc.translate import Options, load_translator, stream

        calm()
        options = Options(beam, batch, max_new_tokens, truncate)
        translator = load_translator(model, device, compiled)
        stream(translator, opened, name, options, sys.stdout.buffer)


# Where torchao is installed, transformers imports it, and it tells of kernels for other machines.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Run the command line: a user error ends as text on stderr and exit code 1."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    try:
        app()
    except PlmccError as problem:
        _fail(problem.render())
    except BrokenPipeError:
        # The reader has left (`plmcc schema | head`); the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as problem:
        if out_of_memory(problem):
            cure = "a smaller batch, or bfloat16; `plmcc apply --resume` goes on with what is done"
            _fail(error("PLM504", "there is not enough memory", "plmcc", cure=cure).render())
        if not isinstance(problem, OSError):
            raise
        _fail(f"{problem.filename or 'plmcc'}: error PLM501: {problem.strerror or problem}")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("stopped", err=True)
        raise


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    sys.exit(1)


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


if __name__ == "__main__":
    main()
