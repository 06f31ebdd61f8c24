"""`plmcc export` and `plmcc translate`: models as programs, and translations from them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the export.")
    ],
    to: Annotated[str, typer.Option("--to", help="aoti, onnx or executorch.")] = "aoti",
    beam: Annotated[
        int, typer.Option("--beam", min=1, help="Translation: the largest beam width to support.")
    ] = 4,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantize linear layers to int8 (aoti: extra `quantize`)."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in that directory.")
    ] = False,
) -> None:
    """Export an encoder or a translation model as programs that run without its Python code."""
    from plmcc.export.targets import check_target

    check_target(to)  # before torch is imported

    from plmcc.export.exporter import export_directory
    from plmcc.utils.terminal import calm

    calm()
    made = export_directory(model, output, to, num_beams=beam, overwrite=overwrite, int8=int8)
    if made.difference is not None:
        typer.echo(f"relative difference of the outputs in a fresh process: {made.difference:.1e}")
    code = "; its .pt2 files contain machine code" if to == "aoti" else ""
    typer.echo(f"written to {output}{code}")


def translate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model directory, export directory or hub id."),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="One sentence a line; default: stdin.")
    ] = None,
    beam: Annotated[
        int | None, typer.Option("--beam", min=1, help="Beam width; 1 is greedy search.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sentences in a batch.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Maximum length of a translation in tokens."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Compile first; pays off for long inputs."),
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut sentences that are too long for the model.")
    ] = False,
) -> None:
    """Translate lines from a file or stdin to stdout."""
    name = "stdin" if file is None else str(file)
    # Opened first: a missing file is reported before a model is loaded.
    with nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as opened:
        from plmcc.export.translate import Options, load_translator, stream
        from plmcc.utils.terminal import calm

        calm()
        options = Options(beam, batch, max_new_tokens, truncate)
        translator = load_translator(model, device, compiled)
        stream(translator, opened, name, options, sys.stdout.buffer)
