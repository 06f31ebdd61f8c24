"""Time and memory of large tables of word vectors, each part in a fresh process:

    python benchmarks/vectors_speed.py PART VECTORS [WORK]

`binarize`: 256 bits, ten epochs. `query`: the ten words nearest to a word by their codes. `codes`:
16 codebooks of 32, residual quantization. `read`: a text file. The first three take 400,000 x 300
vectors (rows of VECTORS drawn at random, with noise of 0.3 of their standard deviation), the last
2,000,000 x 300. Prints one row of JSON: `seconds` by the clock, `cpu_seconds` of the process (with
one thread, what it would take on a core of its own) and `peak_gb`, the largest resident memory of
the process, libraries included. Called by `benchmarks/vectors.py --parts speed`.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plmcc.api import Pass
from plmcc.passes.binary_embedding import BinaryEmbedding
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.rewrite import harden_all, match, replace_all
from plmcc.vectors.codes import Codes
from plmcc.vectors.keyed import Vectors
from plmcc.vectors.load import load
from plmcc.vectors.model import model_of

ROWS, READ_ROWS, WIDTH = 400_000, 2_000_000, 300
QUERIES = 200
_LINES = 10_000
Row = dict[str, Any]


def structured(file: Path) -> Vectors:
    real, random = load(file), np.random.default_rng(0)
    table = real.vectors[random.integers(0, len(real), ROWS)]
    noise = 0.3 * float(real.vectors.std())
    for start in range(0, ROWS, _LINES):
        part = table[start : start + _LINES]
        part += noise * random.standard_normal(part.shape, dtype=np.float32)
    return Vectors([f"w{i}" for i in range(ROWS)], table)


def timed(work: Callable[[], Any]) -> tuple[Any, Row]:
    clock, cpu = time.perf_counter(), time.process_time()
    done = work()
    seconds, used = time.perf_counter() - clock, time.process_time() - cpu
    return done, {"seconds": round(seconds, 2), "cpu_seconds": round(used, 2)}


def compressed(file: Path, chosen: Pass) -> Row:
    model, _ = model_of(structured(file))

    def work() -> Any:
        done = replace_all(model, match(model, [chosen]))
        metrics = done[0].soft.statistics()
        harden_all(model, done)
        return metrics

    metrics, times = timed(work)
    kept = {k: round(v, 4) for k, v in metrics.items() if k in ("relative_error", "similarity")}
    return times | kept


def query(file: Path) -> Row:
    bits = np.random.default_rng(0).standard_normal((WIDTH, 256), dtype=np.float32)
    words = structured(file)
    codes = Codes.of(words.index_to_key, np.packbits(words.vectors @ bits > 0, axis=1), 256)
    taken = []
    for index in range(QUERIES):
        clock, cpu = time.perf_counter(), time.process_time()
        codes.most_similar(f"w{index * 1999}", topn=10)
        taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    seconds, used = (statistics.median(values) for values in zip(*taken, strict=True))
    return {"seconds": round(seconds, 5), "cpu_seconds": round(used, 5)}


def read(work: Path) -> Row:
    file = work / "large.vec"
    if not file.exists():
        random = np.random.default_rng(0)
        form = " ".join(["%.5f"] * WIDTH)
        texts = [form % tuple(row) for row in random.standard_normal((_LINES, WIDTH)).tolist()]
        with file.open("w") as stream:
            stream.write(f"{READ_ROWS} {WIDTH}\n")
            for index in range(READ_ROWS):
                stream.write(f"w{index} {texts[index % _LINES]}\n")
    found, times = timed(lambda: load(file))
    assert len(found) == READ_ROWS
    return times | {"table_gb": round(found.vectors.nbytes / 1e9, 2)}


def main() -> None:
    part, file = sys.argv[1], Path(sys.argv[2])
    if part == "binarize":
        row = compressed(file, BinaryEmbedding(bits=256, epochs=10))
    elif part == "codes":
        row = compressed(file, CompositionalCodes(codebooks=16, codewords=32))
    else:
        row = query(file) if part == "query" else read(Path(sys.argv[3]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows = READ_ROWS if part == "read" else ROWS
    print(
        json.dumps(
            {"rows": rows, "threads": torch.get_num_threads()} | row | {"peak_gb": round(peak, 2)}
        )
    )


if __name__ == "__main__":
    main()
