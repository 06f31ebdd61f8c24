"""`plmcc export` and `plmcc translate`: models as programs, and translations from them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from plmcc.cli.recipes import check_model
from plmcc.diagnostics import did_you_mean, error
from plmcc.utils.outputs import free, output_place

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or a hub id.")]
_Directory = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the export.")
]
_Target = Annotated[
    str,
    typer.Option(
        "--to", help="aoti, onnx, executorch, or dense: an ordinary checkpoint without plmcc."
    ),
]
_Beam = Annotated[
    int, typer.Option("--beam", min=1, help="Translation: the largest beam width to support.")
]
_Int8 = Annotated[
    bool, typer.Option("--int8", help="Quantize linear layers to int8 (aoti: extra `quantize`).")
]
_Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        help="onnx: `hub` writes onnx/model.onnx, model_quantized.onnx and model_q4.onnx with "
        "pooling inside, for servers and browsers.",
    ),
]
_Precision = Annotated[
    list[str] | None,
    typer.Option("--precision", help="hub: fp32, int8 or q4; repeatable. By default all."),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier export in that directory.")
]


def export(
    model: _Model,
    output: _Directory,
    to: _Target = "aoti",
    beam: _Beam = 4,
    int8: _Int8 = False,
    layout: _Layout = "plmcc",
    precision: _Precision = None,
    overwrite: _Overwrite = False,
) -> None:
    """Export an encoder or a translation model as programs that run without its Python code."""
    from plmcc.export.targets import check_target

    if to == "dense":
        _dense(model, output, overwrite)
        return
    check_target(to, "dense")  # before torch is imported
    if layout != "plmcc" or precision:
        _hub(model, output, to, layout, precision, overwrite)
        return

    from plmcc.export.exporter import export_directory
    from plmcc.utils.terminal import calm

    calm()
    made = export_directory(model, output, to, num_beams=beam, overwrite=overwrite, int8=int8)
    if made.difference is not None:
        typer.echo(f"relative difference of the outputs in a fresh process: {made.difference:.1e}")
    code = "; its .pt2 files contain machine code" if to == "aoti" else ""
    typer.echo(f"written to {output}{code}")


def _check_early(model: str, output: Path, overwrite: bool) -> None:
    """Say "no" before torch is imported; whether an export may be replaced is seen later."""
    if not overwrite:
        free(output_place(output), overwrite)
    check_model(model)


def _dense(model: str, output: Path, overwrite: bool) -> None:
    _check_early(model, output, overwrite)

    from plmcc.export.exporter import export_dense
    from plmcc.report.words import megabytes
    from plmcc.utils.terminal import calm

    calm()
    before, after, difference = export_dense(model, output, overwrite=overwrite)
    typer.echo(f"{megabytes(before)} became {megabytes(after)}: tables and layers are decoded")
    typer.echo(f"relative difference of the outputs: {difference:.1e}")
    typer.echo(f"written to {output}; it loads without plmcc")


_PRECISIONS = ("fp32", "int8", "q4")


def _hub(
    model: str, output: Path, to: str, layout: str, precision: list[str] | None, overwrite: bool
) -> None:
    for option, given, known in (
        ("--layout", [layout], ["plmcc", "hub"]),
        ("--precision", precision or [], _PRECISIONS),
    ):
        for name in given:
            if name not in known:
                allowed, hint = ", ".join(known), did_you_mean(name, known)
                message = f"unknown {option.removeprefix('--')}"
                raise error("PLM502", message, option, got=name, allowed=allowed, hint=hint)
    if to != "onnx" or layout != "hub":
        message = "this needs `--to onnx --layout hub`"
        raise error("PLM502", message, "--layout", got=f"--to {to} --layout {layout}")
    _check_early(model, output, overwrite)

    from plmcc.export.hub import export_hub
    from plmcc.report.words import megabytes
    from plmcc.utils.terminal import calm

    calm()
    for file in export_hub(model, output, precisions=precision or _PRECISIONS, overwrite=overwrite):
        low = "; that is low: measure its quality before you use it" if file.low else ""
        size = megabytes(file.bytes)
        typer.echo(f"{file.name}: {size}, cosine with the model {file.cosine:.4f}{low}")
    typer.echo(f"written to {output}")


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
    trust_programs: Annotated[
        bool,
        typer.Option("--trust-programs", help="Run compiled programs that somebody else made."),
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
        translator = load_translator(model, device, compiled, trust_programs)
        stream(translator, opened, name, options, sys.stdout.buffer)
