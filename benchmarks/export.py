"""An exported compressed encoder beside onnxruntime on the original, by batch and length.

    python benchmarks/export.py --work out/export --threads 2

all-MiniLM-L6-v2 exported as it is to ONNX, and with a table of compositional codes (untrained: it
decides nothing about speed) to AOTInductor and to ONNX, float32. Systems alternate within a round
after a warm-up; `ratio` is the median over rounds to onnxruntime on the original, `spread` the
distance of its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from minilm_codes import MODEL, ROOT
from transformers import AutoModel, AutoTokenizer

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.export.exporter import export_model
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.utils.files import write_json

ORIGINAL = "original, onnxruntime"
SYSTEMS = {
    ORIGINAL: ("onnx", False),
    "codes, AOTInductor": ("aoti", True),
    "codes, onnxruntime": ("onnx", True),
}
SHAPES = ((1, 32), (32, 32), (1, 128), (32, 128))


def exported(work: Path) -> dict[str, plmcc.Exported]:
    """Export what is not in the folder yet, and open everything."""
    found = {}
    for name, (to, coded) in SYSTEMS.items():
        folder = work / name.replace(", ", "-")
        if not folder.exists():
            print("exporting", name, file=sys.stderr, flush=True)
            model = AutoModel.from_pretrained(MODEL).eval()
            if coded:
                plmcc.Pipeline([CompositionalCodes(codebooks=64, codewords=8, rounds=0)])(model)
            export_model(model, AutoTokenizer.from_pretrained(MODEL), folder, to)
        found[name] = plmcc.Exported(folder)
    return found


def timed(systems: dict[str, plmcc.Exported], batch: int, length: int, rounds: int) -> list[Any]:
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    repeats = max(1, 64 // batch // (length // 32))
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for round_ in range(-2, rounds):  # two to warm up
        for name, system in systems.items():
            start = time.perf_counter()
            for _ in range(repeats):
                system(ids)
            if round_ >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    rows = []
    for name, found in seconds.items():
        ratios = [own / base for own, base in zip(found, seconds[ORIGINAL], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "system": name,
                "batch": batch,
                "length": length,
                "milliseconds": 1e3 * statistics.median(found),
                "ratio": statistics.median(ratios),
                "spread": high - low,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--note", help="written into the results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/export.json")
    run = parser.parse_args()
    torch.set_num_threads(run.threads)
    run.work.mkdir(parents=True, exist_ok=True)
    systems = exported(run.work)
    sizes = {
        name: sum(f.stat().st_size for f in (run.work / name.replace(", ", "-")).glob("model.*"))
        for name in SYSTEMS
    }
    rows = [row for shape in SHAPES for row in timed(systems, *shape, run.rounds)]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    write_json(
        run.output,
        {
            "command": f"python benchmarks/export.py --work out --threads {run.threads}",
            "commit": commit.stdout.strip(),
            "hardware": hardware(),
            "versions": versions(),
            "seeds": [0],
            "rows": [row | {"bytes": sizes[row["system"]]} for row in rows],
        }
        | ({"note": run.note} if run.note else {}),
    )


if __name__ == "__main__":
    main()
