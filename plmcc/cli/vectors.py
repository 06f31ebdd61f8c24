"""`plmcc vectors`: look up, evaluate and convert word vectors."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plmcc.diagnostics import PlmccError, error

if TYPE_CHECKING:
    from plmcc.vectors.codes import Codes
    from plmcc.vectors.keyed import Vectors

app = typer.Typer(no_args_is_help=True, help="Look up, evaluate and convert word vectors.")


class By(StrEnum):
    """The similarity of two words."""

    cosine = "cosine"
    hamming = "hamming"


class To(StrEnum):
    """The format of a word-vector file."""

    word2vec = "word2vec"
    nlb = "nlb"


File = Annotated[
    Path,
    typer.Argument(
        help="word2vec (text, .bin), GloVe, .vec, .npy, NLB codes, .gz; or compressed vectors."
    ),
]
Words = Annotated[
    Path | None, typer.Option("--words", help="For .npy files: a text file with one word a line.")
]
Skip = Annotated[
    bool, typer.Option("--skip-broken", help="Skip lines that cannot be read, instead of failing.")
]
Measure = Annotated[
    By | None,
    typer.Option(
        "--by",
        help="Similarity: cosine of the (reconstructed) vectors, or hamming, the share of equal "
        "bits; the default for binary codes is hamming.",
    ),
]


@app.command()
def nearest(
    file: File,
    query: Annotated[str, typer.Argument(help="A word, or an analogy: good:better::small:?")],
    top: Annotated[int, typer.Option("--top", min=1, help="Number of words.")] = 10,
    by: Measure = None,
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print the nearest words of a word, or the answers to an analogy, with similarities."""
    from plmcc.vectors.keyed import analogy

    asked = analogy(query)
    vectors = _loaded(file, words, skip, by)
    plus, minus = ([query], []) if asked is None else ([asked[1], asked[2]], [asked[0]])
    try:
        found = vectors.most_similar(plus, minus, top)
    except PlmccError as problem:
        raise PlmccError(*(replace(d, location=str(file)) for d in problem.diagnostics)) from None
    for word, similarity in found:
        typer.echo(f"{similarity:.4f}\t{word}")


@app.command()
def evaluate(
    file: File,
    datasets: Annotated[
        list[Path],
        typer.Option("--datasets", help="A file of word similarities or analogies; repeatable."),
    ],
    by: Measure = None,
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print Spearman's rho on word similarities and the accuracy on analogies, in percent."""
    from rich.console import Console
    from rich.table import Table

    from plmcc.vectors.keyed import evaluate as judge

    vectors = _loaded(file, words, skip, by)
    table = Table("dataset", "kind", "score", "rows used", "out of vocabulary")
    for dataset in datasets:
        score = judge(vectors, dataset)
        table.add_row(
            score.dataset,
            score.kind,
            f"{score.score:.2f}",
            f"{score.used:,}",
            f"{score.out_of_vocabulary:.2f} %",
        )
    Console().print(table)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Word vectors that plmcc apply has compressed.")
    ],
    to: Annotated[
        To,
        typer.Option(
            "--to",
            help="word2vec: the reconstructed vectors, as text, or binary if FILE ends in .bin; "
            "nlb: the binary codes in the format of the original NLB program.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file to write; default: DIR.vec or DIR.nlb."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Write compressed word vectors as a file for other programs."""
    default = folder.resolve()
    file = output or default.with_name(f"{default.name}{'.nlb' if to is To.nlb else '.vec'}")
    if file.exists() and not overwrite:
        hint = "choose another file, or add --overwrite"
        raise error("PLM501", "the file exists already", str(file), hint=hint)

    from plmcc.utils.terminal import calm
    from plmcc.vectors.export import write_codes, write_vectors

    calm()
    notes = write_codes(folder, file) if to is To.nlb else write_vectors(folder, file)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"written to {file}")


def _loaded(file: Path, words: Path | None, skip: bool, by: By | None) -> Vectors | Codes:
    from plmcc.vectors.load import load

    if file.is_dir():  # it will import transformers anyway
        from plmcc.utils.terminal import calm

        calm()
    asked: Literal["cosine", "hamming"] | None = by.value if by else None
    vectors = load(file, words, "skip" if skip else "refuse", by=asked)
    for note in vectors.notes:
        typer.echo(f"note: {note}", err=True)
    return vectors
