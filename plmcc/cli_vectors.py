"""`plmcc vectors`: word-vector files on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from plmcc.vectors import Vectors

app = typer.Typer(no_args_is_help=True, help="Look into files of word vectors.")

File = Annotated[
    Path, typer.Argument(help="word2vec (text, .bin), GloVe, .vec, .npy, .gz; or a result.")
]
Words = Annotated[
    Path | None, typer.Option("--words", help="For .npy: a file with one word a line.")
]
Skip = Annotated[
    bool, typer.Option("--skip-broken", help="Leave broken lines out instead of stopping.")
]


@app.command()
def nearest(
    file: File,
    query: Annotated[str, typer.Argument(help="A word, or an analogy: man:king::woman:?")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many words.")] = 10,
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print the words nearest to a word, or that complete an analogy, with their cosines."""
    from plmcc.vectors import analogy

    vectors = _loaded(file, words, skip)
    asked = analogy(query)
    found = (
        vectors.most_similar(query, topn=top)
        if asked is None
        else vectors.most_similar([asked[1], asked[2]], [asked[0]], top)
    )
    for word, cosine in found:
        typer.echo(f"{cosine:.4f}\t{word}")


@app.command()
def evaluate(
    file: File,
    datasets: Annotated[
        list[Path], typer.Option("--datasets", help="Word similarity or analogies; repeatable.")
    ],
    words: Words = None,
    skip: Skip = False,
) -> None:
    """Print Spearman's rho of word similarities and the accuracy on analogies, in percent."""
    from rich.console import Console
    from rich.table import Table

    from plmcc.vectors import evaluate as judge

    vectors = _loaded(file, words, skip)
    table = Table("data set", "kind", "score", "rows used", "out of vocabulary")
    for dataset in datasets:
        score = judge(vectors, dataset)
        table.add_row(
            score.dataset, score.kind, f"{score.score:.2f}", f"{score.used:,}",
            f"{score.out_of_vocabulary:.2f} %",
        )  # fmt: skip
    Console().print(table)


def _loaded(file: Path, words: Path | None, skip: bool) -> Vectors:
    from plmcc.vectors import load

    if file.is_dir():  # it will import transformers anyway
        from plmcc.terminal import calm

        calm()
    vectors = load(file, words, "skip" if skip else "refuse")
    for note in vectors.notes:
        typer.echo(f"note: {note}", err=True)
    return vectors
