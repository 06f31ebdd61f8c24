"""The token table of all-MiniLM-L6-v2 in 8 to 100 times fewer bytes: STS-B by method.

    python benchmarks/embeddings.py --data ../shared/data --work out/embeddings

At each size the passes on tables, and the rivals that take no more bytes (8 and 4 bits by
torchao, a truncated SVD, PQ and RQ by FAISS, the most frequent tokens only): all trained for the
same --steps on the same unlabeled sentences with the same losses, by recipes/embedding/. Tables of
torchao and FAISS have no gradient, so that only the rest of the model trains. Choices were made on
STS-B dev. Finished rows in --work are used again, so that parts can run at different times.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from minilm_codes import MODEL, ROOT, sentences

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.size import file_bytes, module_bytes
from plmcc.experiments.baselines import baselines, product_codes
from plmcc.experiments.compare import (
    Compared,
    Comparison,
    baseline_row,
    original,
    pruned_row,
    recipe_row,
)
from plmcc.models.source import load_source
from plmcc.recipe.load import parse_recipe
from plmcc.utils.files import write_json

ROWS, DIMS = 30522, 384
TABLE = 4 * ROWS * DIMS
POINTS = (8, 16, 32, 64, 100)
METHODS = (
    "pruned_codes",
    "product_codes",
    "compositional_codes",
    "binary_embedding",
    "distilled_factorization",
    "adaptive_codes",
    "rivals",
    "vocabulary",
    "combined",
)
OURS = METHODS[:6]
PRUNED = {
    8: (27000, 384, 16),
    16: (18900, 192, 64),
    32: (14000, 192, 16),
    64: (13900, 96, 16),
    100: (12800, 64, 16),
}
"""Tokens to keep, codebooks and codewords, chosen on dev: fewer words, each with more bits."""


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def options(method: str, point: int) -> dict[str, Any]:
    """The largest of its kind in TABLE / point bytes."""
    limit = TABLE // point
    if method == "pruned_codes":
        keep, codebooks, codewords = PRUNED[point]
        codes = {"codebooks": codebooks, "codewords": codewords, "initialization": "product"}
        return {"keep": keep} | codes
    if method == "product_codes":
        codebooks, bits = product_codes(ROWS, DIMS, limit) or (1, 1)
        return {"codebooks": codebooks, "codewords": 2**bits, "initialization": "product"}
    if method == "compositional_codes":
        codewords = 16 if point <= 8 else 8 if point <= 32 else 4
        each = ROWS * math.log2(codewords) / 8 + 4 * codewords * DIMS
        quick = {"beam": 4, "rounds": 1} if point <= 16 else {}
        return {"codebooks": int(limit / each), "codewords": codewords} | quick
    if method == "binary_embedding":
        bits = int((limit - 4 * DIMS) / (ROWS / 8 + 4 * DIMS))
        return {"bits": bits // 8 * 8}
    if method == "distilled_factorization":
        return {"rank": limit // (ROWS + 4 * DIMS), "storage": "uint8"}
    # Two codebooks, one of twice the length of the other, as many words in each.
    unit = int((limit - 8 * DIMS - ROWS / 8) / (1.5 * ROWS / 8 + 12 * DIMS))
    return {"lengths": [unit, 2 * unit], "bits_per_word": 1.5 * unit + 1}


def recipe(method: str, chosen: dict[str, Any], run: argparse.Namespace) -> plmcc.Recipe:
    name = method if method in OURS[2:] else "compositional_codes"
    chosen = dict(chosen)
    keep = chosen.pop("keep", None)
    raw = yaml.safe_load((ROOT / f"recipes/embedding/{name}.yaml").read_text("utf-8"))
    found = raw["passes"][0][name]
    kept = {key: found[key] for key in found if key.endswith(("targets", "expect", "_rate"))}
    raw["passes"] = [{name: kept | chosen}]
    if keep is not None:
        text = str(run.work / "sentences.txt")
        raw["passes"].insert(0, {"prune_vocabulary": {"text": text, "keep": keep}})
    raw["seed"] = run.seed
    raw["train"]["data"]["train"] = str(run.work / "sentences.txt")
    raw["train"]["data"]["limit"] = 48 * run.steps
    raw["train"]["arguments"]["max_steps"] = run.steps
    return parse_recipe(yaml.safe_dump(raw, sort_keys=False), load_torch=True)


def work(asked: Comparison, run: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Names of rows, and what makes them."""
    yield "original-1", lambda: original(asked, recipe("", {"codebooks": 8}, run))
    for point in run.points:
        for method in run.methods:
            if method in OURS:
                chosen = recipe(method, options(method, point), run)
                yield f"{method}-{point}", lambda m=method, c=chosen: recipe_row(asked, m, c)
        plain = recipe("", {"codebooks": 8}, run)
        if "rivals" in run.methods:
            for baseline in baselines(ROWS, DIMS, TABLE // point):
                if not (baseline.name.startswith("int") and point > min(run.points)):
                    name = f"{baseline.name}-{point}".replace(" ", "_")
                    yield name, lambda r=baseline, p=plain: baseline_row(asked, p, r)
        if "vocabulary" in run.methods:
            keep = TABLE // point // (4 * DIMS)
            yield f"vocabulary-{point}", lambda k=keep, p=plain: pruned_row(asked, p, k)
    if "combined" in run.methods:
        yield "combined-0", lambda: combined(asked, run)
    if "rivals" in run.methods:  # larger than any point
        plain = recipe("", {"codebooks": 8}, run)
        for baseline in baselines(ROWS, DIMS, TABLE // 3):
            if baseline.name.startswith("int"):
                name = f"{baseline.name}-0".replace(" ", "_")
                yield name, lambda r=baseline, p=plain: baseline_row(asked, p, r)


def combined(asked: Comparison, run: argparse.Namespace) -> Compared:
    """The recipe that makes everything smaller, through its artifact; three times the steps."""
    folder, file = run.work / "combined", ROOT / "recipes/embedding-int8-minilm.yaml"
    if not folder.exists():
        settings = [
            f"train.arguments.max_steps={3 * run.steps}",
            f"seed={run.seed}",
            f"train.data.train={run.work}/sentences.txt",
            f"passes.0.prune_vocabulary.text={run.work}/sentences.txt",
        ]
        plmcc.apply(plmcc.load_recipe(file, settings, load_torch=True), MODEL, folder, log=log)
    start = time.perf_counter()  # of judging it; training is in the artifact's report
    source = load_source(folder, "sentence-similarity")
    table: Any = source.model.get_input_embeddings()
    name = "pruned_codes, int8 linears"
    metrics = asked.metrics(source)
    seconds = round(time.perf_counter() - start, 1)
    chosen = "12000 tokens, 96 x 4 bits"
    return Compared(
        name, "combined", chosen, module_bytes(table), file_bytes(folder), metrics, True, seconds
    )


def values(row: Compared, point: int) -> dict[str, Any]:
    return {
        "method": row.name,
        "kind": row.kind,
        "settings": row.settings,
        "point": point,
        "table_bytes": row.table_bytes,
        "table_compression": round(TABLE / row.table_bytes, 2),
        "stsb_dev": row.metrics[0],
        "stsb_test": row.metrics[1],
        "model_bytes": row.model_bytes,
        "seconds": row.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--points", nargs="*", type=int, default=POINTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--note", help="written into the results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/embeddings.json")
    run = parser.parse_args()
    if run.threads:
        torch.set_num_threads(run.threads)
    run.work = run.work.resolve()
    (run.work / "rows").mkdir(parents=True, exist_ok=True)
    text = run.work / "sentences.txt"
    if not text.exists():
        text.write_text("\n".join(sentences(run.data)) + "\n", encoding="utf-8")
    data = [str(run.data / name) for name in ("stsb/en_dev.tsv.gz", "stsb/en_test.tsv")]
    asked = Comparison([], str(MODEL), data, "spearman")
    for name, make in work(asked, run):
        file = run.work / "rows" / f"{name}.json"
        if not file.exists():
            row = make()
            found = {} if row is None else values(row, int(name.rsplit("-", 1)[1]))
            log(found or f"{name}: cannot be so small")
            write_json(file, found)
    rows = [json.loads(file.read_text("utf-8")) for file in run.work.glob("rows/*.json")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": f"python benchmarks/embeddings.py --data ../shared/data --work out "
        f"--steps {run.steps} --seed {run.seed}"
        + (f" --threads {run.threads}" if run.threads else ""),
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [run.seed],
        "rows": sorted(filter(None, rows), key=lambda r: (-r["table_bytes"], r["method"])),
    }
    if run.note:
        result["note"] = run.note
    write_json(run.output, result)


if __name__ == "__main__":
    main()
