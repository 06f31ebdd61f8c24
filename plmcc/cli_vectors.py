"""`plmcc vectors`: word-vector files on the command line."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plmcc.diagnostics import PlmccError, error

if TYPE_CHECKING:
    from plmcc.vector_codes import Codes
    from plmcc.vectors import Vectors

app = typer.Typer(no_args_is_help=True, help="Look into files of word vectors.")


class By(StrEnum):
    """What words are compared by."""

    cosine = "cosine"
    hamming = "hamming"


class To(StrEnum):
    """Formats of word-vector files."""

    word2vec = "word2vec"
    nlb = "nlb"


File = Annotated[
    Path,
    typer.Argument(help="word2vec (text, .bin), GloVe, .vec, .npy, NLB's codes, .gz; or a result."),
]
Words = Annotated[
    Path | None, typer.Option("--words", help="For .npy: a file with one word a line.")
]
Skip = Annotated[
    bool, typer.Option("--skip-broken", help="Leave broken lines out instead of stopping.")
]
Measure = Annotated[
    By | None,
    typer.Option(
        "--by",
        help="Compare (reconstructed) vectors by cosine, or codes by the share of equal bits. "
        "Default: hamming where there are binary codes.",
    ),
]


@app.command()
def nearest(
    file: File,
    query: Annotated[str, typer.Argument(help="A word, or an analogy: good:better::small:?")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many words.")] = 10,
    by: Measure = None,
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print the words nearest to a word, or that complete an analogy, with their similarities."""
    from plmcc.vectors import analogy

    asked = analogy(query)
    vectors = _loaded(file, words, skip, by)
    plus, minus = ([query], []) if asked is None else ([asked[1], asked[2]], [asked[0]])
    try:
        found = vectors.most_similar(plus, minus, top)
    except PlmccError as problem:  # a word is not there: say where
        raise PlmccError(*(replace(d, place=str(file)) for d in problem.diagnostics)) from None
    for word, similarity in found:
        typer.echo(f"{similarity:.4f}\t{word}")


@app.command()
def evaluate(
    file: File,
    datasets: Annotated[
        list[Path], typer.Option("--datasets", help="Word similarity or analogies; repeatable.")
    ],
    by: Measure = None,
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print Spearman's rho of word similarities and the accuracy on analogies, in percent."""
    from rich.console import Console
    from rich.table import Table

    from plmcc.vectors import evaluate as judge

    vectors = _loaded(file, words, skip, by)
    table = Table("data set", "kind", "score", "rows used", "out of vocabulary")
    for dataset in datasets:
        score = judge(vectors, dataset)
        table.add_row(
            score.dataset, score.kind, f"{score.score:.2f}", f"{score.used:,}",
            f"{score.out_of_vocabulary:.2f} %",
        )  # fmt: skip
    Console().print(table)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed word vectors.")],
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="word2vec: the reconstructed vectors, as text, or binary where FILE is "
            ".bin. nlb: the binary codes, as NLB's program writes them.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: DIR.vec or DIR.nlb."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
) -> None:
    """Write compressed word vectors as a file for other programs."""
    default = folder.resolve()
    file = output or default.with_name(f"{default.name}{'.nlb' if to is To.nlb else '.vec'}")
    if file.exists() and not overwrite:
        cure = "choose another file, or add --overwrite"
        raise error("PLM501", "there is a file already", str(file), cure=cure)

    from plmcc.terminal import calm
    from plmcc.vector_export import write_codes, write_vectors

    calm()
    notes = write_codes(folder, file) if to is To.nlb else write_vectors(folder, file)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"written to {file}")


def _loaded(file: Path, words: Path | None, skip: bool, by: By | None) -> Vectors | Codes:
    from plmcc.vectors import load

    if file.is_dir():  # it will import transformers anyway
        from plmcc.terminal import calm

        calm()
    asked: Literal["cosine", "hamming"] | None = by.value if by else None
    vectors = load(file, words, "skip" if skip else "refuse", by=asked)
    for note in vectors.notes:
        typer.echo(f"note: {note}", err=True)
    return vectors
