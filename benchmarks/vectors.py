"""Binary codes of word vectors: how much of their similarity is left, by bits.

    python benchmarks/vectors.py --vectors ../shared/data/wordvec_wiki50k/vectors.f16.npy \
        --datasets ../shared/data/wordsim/*.txt

Rows: `real` vectors, `binary_embedding` (codes compared by the share of equal bits, Sokal and
Michener), the vectors that it `reconstructed`, and codes by `random hyperplanes`. `dataset` is a
word similarity set (Spearman's rho), analogies (accuracy), or `preservation`: Spearman's rho
between cosines of the real vectors and similarities of codes over 20,000 random pairs of words.

`--parts speed` measures large tables instead (`benchmarks/vectors_speed.py` says what); rows of
parts that are not asked for stay in the output as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from plmcc.artifact.environment import hardware, versions
from plmcc.passes._shared.bits import unpack
from plmcc.passes.binary_embedding import BinaryEmbedding
from plmcc.rewrite import harden_all, match, replace_all
from plmcc.utils.files import write_json
from plmcc.vectors.keyed import Vectors, evaluate
from plmcc.vectors.load import load
from plmcc.vectors.model import model_of

ROOT = Path(__file__).parent.parent
PAIRS = 20_000
SPEED = ("binarize", "query", "codes", "read")
Row = dict[str, Any]


def signs(bits_Vn: np.ndarray[Any, Any], words: list[str]) -> Vectors:
    """Codes as vectors of -1 and 1: their cosine is 2 s - 1 of the share s of equal bits."""
    return Vectors(words, bits_Vn.astype(np.float32) * 2 - 1)


def hyperplanes(vectors: Vectors, bits: int, seed: int) -> Vectors:
    normal = np.random.default_rng(seed).standard_normal((vectors.vector_size, bits))
    return signs(vectors.vectors @ normal > 0, vectors.index_to_key)


def binarized(vectors: Vectors, bits: int, seed: int) -> tuple[Vectors, Vectors, float]:
    """Return codes, reconstructed vectors, and seconds."""
    copy = Vectors(vectors.index_to_key, vectors.vectors.copy())
    model, _ = model_of(copy)
    start = time.perf_counter()
    done = replace_all(model, match(model, [BinaryEmbedding(bits=bits, seed=seed)]))
    harden_all(model, done)
    seconds = time.perf_counter() - start
    table: Any = model.get_input_embeddings()
    codes = unpack(table.codes, bits, 1).numpy()
    with torch.no_grad():
        rows = table.rows(torch.arange(len(vectors))).float().numpy()
    words = vectors.index_to_key
    return signs(codes > 0, words), Vectors(words, rows), seconds


def preservation(real: Vectors, other: Vectors) -> float:
    one, two = np.random.default_rng(0).integers(0, len(real), (2, PAIRS))
    cosines = [(v.unit()[one] * v.unit()[two]).sum(1) for v in (real, other)]
    return 100 * float(spearmanr(*cosines).statistic)


def judged(
    name: str,
    method: str,
    bits: int | None,
    seed: int,
    real: Vectors,
    found: Vectors,
    datasets: list[Path],
) -> Iterator[Row]:
    known = {"vectors": name, "method": method, "bits": bits, "seed": seed}
    if found is not real:
        kept = round(preservation(real, found), 2)
        yield known | {"dataset": "preservation", "spearman": kept, "out_of_vocabulary": 0.0}
    for file in datasets:
        score = evaluate(found, file)
        yield known | {
            "dataset": score.dataset,
            "spearman": round(score.score, 2),
            "out_of_vocabulary": round(score.out_of_vocabulary, 2),
        }


def kept(output: Path, parts: list[str], measures: list[str]) -> list[Row]:
    """Rows of earlier runs that this one does not replace."""
    known = json.loads(output.read_text("utf-8"))["rows"] if output.exists() else []
    return [
        row
        for row in known
        if ("measure" not in row and "quality" not in parts)
        or ("measure" in row and ("speed" not in parts or row["measure"] not in measures))
    ]


def measured(part: str, vectors: Path, work: Path) -> Row:
    command = [sys.executable, str(ROOT / "benchmarks/vectors_speed.py"), part, str(vectors)]
    done = subprocess.run([*command, str(work)], stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    shown = "../shared/data/wordvec_wiki50k/vectors.f16.npy"
    return {
        "measure": part,
        "command": f"python benchmarks/vectors.py --vectors {shown} --parts speed",
    } | found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, nargs="+", required=True)
    parser.add_argument("--datasets", type=Path, nargs="+", default=[])
    parser.add_argument("--parts", nargs="+", choices=("quality", "speed"), default=["quality"])
    parser.add_argument("--measure", nargs="+", choices=SPEED, default=SPEED, help="with speed")
    parser.add_argument("--work", type=Path, help="where the large file goes; else it is removed")
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/vectors.json")
    arguments = parser.parse_args()
    if "quality" in arguments.parts and not arguments.datasets:
        parser.error("the part `quality` needs --datasets")
    rows = kept(arguments.output, arguments.parts, arguments.measure)
    if "speed" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            for part in arguments.measure:
                rows.append(measured(part, arguments.vectors[0], arguments.work or Path(folder)))
                print(rows[-1], file=sys.stderr, flush=True)
    for file in arguments.vectors if "quality" in arguments.parts else ():
        real, seed = load(file), arguments.seed
        rows += judged(file.parent.name, "real", None, seed, real, real, arguments.datasets)
        for bits in arguments.bits:
            codes, back, seconds = binarized(real, bits, seed)
            print(file, bits, f"{seconds:.1f} s", file=sys.stderr, flush=True)
            made = {
                "binary_embedding": codes,
                "reconstructed": back,
                "random hyperplanes": hyperplanes(real, bits, seed),
            }
            for method, found in made.items():
                rows += judged(
                    file.parent.name, method, bits, seed, real, found, arguments.datasets
                )
                print(rows[-len(arguments.datasets) - 1], file=sys.stderr, flush=True)
    result = {
        "command": "python benchmarks/vectors.py --vectors "
        "../shared/data/wordvec_wiki50k/vectors.f16.npy --datasets ../shared/data/wordsim/EN-*.txt",
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [arguments.seed],
        "rows": rows,
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
