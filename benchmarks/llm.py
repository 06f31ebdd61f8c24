"""One-shot pruning of a small language model, and what some steps of distillation bring back.

    python benchmarks/llm.py DATA MODEL [--system NAME ...] [--removed SHARE ...] [--seed N ...]

DATA is a folder with `wiki_en/` (calibration and distillation) and `wikitext2/` (perplexity), MODEL
a decoder-only model. Every row is written when it is finished; rows that are there and of the same
code are not computed again. `torch_pruning` needs the package of that name.

Perplexity is of the first `WINDOWS` windows of WikiText-2 test, raw, in bfloat16 products. Each
seed draws other windows of calibration text.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import plmcc
from plmcc import rewrite
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.stock import needs_plmcc
from plmcc.ir.calibration import CalibrationData
from plmcc.kit.parts import plain
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.structured_pruning import StructuredPruning
from plmcc.planning.cost import cost
from plmcc.recipe import parse_recipe
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "llm.json"
CONTEXT, WINDOWS = 1024, 40
CALIBRATION, LENGTH = 40, 512
MULTIPLE = 8
CODE = ("cuts", "elimination", "sizes")
"""What decides on the results of the pass: rows of other versions are dropped."""
DISTILLED = {"steps": 400, "batch": 2, "learning_rate": 3.0e-4}
ONE_SHOT = ("structured_pruning", "wanda_sp", "magnitude", "random", "depth", "torch_pruning")


class Bench:
    """The model, its texts, and what is measured of the original."""

    def __init__(self, data: Path, model: str) -> None:
        self.data, self.name = data, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        with gzip.open(data / "wikitext2" / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
            ids = self.tokenizer(file.read(), return_tensors="pt", verbose=False)["input_ids"][0]
        self.test_WL = ids[: CONTEXT * WINDOWS].view(-1, CONTEXT)
        with gzip.open(data / "wiki_en" / "shard0.txt.gz", "rt", encoding="utf-8") as file:
            text = file.read(3_000_000)
        self.text = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        self.dense = self.perplexity(self.original)
        self.flops = self._flops(self.original)

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of windows that a seed has drawn."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self.text) - LENGTH
        starts = torch.randint(0, last, (CALIBRATION,), generator=generator)
        windows = torch.stack([self.text[s : s + LENGTH] for s in starts])
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
            for part in windows.split(4)
        ]

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        """Return the perplexity of the test text."""
        total = torch.zeros(())
        for row_L in self.test_WL:
            with torch.autocast("cpu", torch.bfloat16):
                logits_LV = model(input_ids=row_L[None]).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits_LV, row_L[1:])
        return float((total / len(self.test_WL)).exp())

    def _flops(self, model: Any) -> float:
        outline = copy.deepcopy(model).to("meta")
        return float(cost(outline, LENGTH).flops or 0)

    def row(self, model: Any, **values: Any) -> dict[str, Any]:
        """Measure a result."""
        found = self.perplexity(model)
        layers = sum(p.numel() for p in model.model.layers.parameters())
        whole = sum(p.numel() for p in self.original.model.layers.parameters())
        return {
            **values,
            "perplexity": round(found, 3),
            "perplexity_ratio": round(found / self.dense, 4),
            "layers_left": round(layers / whole, 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": 4 * sum(p.numel() for p in model.parameters()),
            "stock": needs_plmcc(model) == "",
            "flops_ratio": round(self._flops(model) / self.flops, 4),
        }

    def decode_ratio(self, model: Any, batch: int, tokens: int = 24) -> float:
        """Return how many times as fast the model generates as the original, compiled: the ratio of
        the shortest of five times each, in turn."""
        prompt = self.text[: batch * 32].view(batch, 32)
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        settings["pad_token_id"] = self.tokenizer.eos_token_id
        models: list[Any] = [plmcc.compile(copy.deepcopy(m)) for m in (self.original, model)]
        times: list[list[float]] = [[], []]
        for turn in range(6):
            for which in (0, 1) if turn % 2 else (1, 0):
                start = time.perf_counter()
                models[which].generate(prompt, **settings)
                if turn:
                    times[which].append(time.perf_counter() - start)
        return round(min(times[0]) / min(times[1]), 3)


def apply_pass(model: Any, chosen: Any, data: list[dict[str, Tensor]]) -> Any:
    """Rewrite a model by a pass, without training."""
    with torch.autocast("cpu", torch.bfloat16):
        matched = rewrite.match(model, [chosen], data=CalibrationData(data))
        done = rewrite.replace_all(model, matched)
    rewrite.harden_all(model, done)
    return model.eval()


def structured(bench: Bench, removed: float, seed: int, **options: Any) -> Any:
    target = {"parameters": 1 - removed}
    chosen = StructuredPruning(target=target, multiple_of=MULTIPLE, **options)
    return apply_pass(copy.deepcopy(bench.original), chosen, bench.calibration(seed))


def width(model: Any, removed: float) -> int:
    """Return how many neurons of a Llama's layer stay."""
    layer = model.model.layers[0]
    whole, each = sum(p.numel() for p in layer.parameters()), 3 * model.config.hidden_size
    size: int = model.config.intermediate_size
    kept: int = MULTIPLE * round((size - removed * whole / each) / MULTIPLE)
    return kept


@torch.no_grad()
def keep_neurons(bench: Bench, removed: float, scores: Callable[[Any], Tensor]) -> Any:
    """Keep the neurons of each layer that a score of the feed-forward network ranks highest."""
    model = copy.deepcopy(bench.original)
    count = width(model, removed)
    for layer in model.model.layers:
        network = layer.mlp
        kept = scores(network).topk(count).indices.sort().values
        for name in ("gate_proj", "up_proj"):
            old = getattr(network, name)
            setattr(network, name, plain(old, old.weight[kept], None))
        network.down_proj = plain(
            network.down_proj, network.down_proj.weight[:, kept].contiguous(), None
        )
    model.config.intermediate_size = count
    return model


def magnitude(network: Any) -> Tensor:
    """Return the product of the norms of a neuron's weights."""
    made = network.gate_proj.weight.norm(dim=1) * network.up_proj.weight.norm(dim=1)
    found: Tensor = made * network.down_proj.weight.norm(dim=0)
    return found


def torch_pruning(bench: Bench, removed: float, seed: int) -> Any:
    """Torch-Pruning: groups of its dependency graph, its Taylor importance, the same number of
    neurons in each layer."""
    tp = importlib.import_module("torch_pruning")
    model = copy.deepcopy(bench.original)
    batches, count = bench.calibration(seed), width(model, removed)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs={"input_ids": batches[0]["input_ids"][:1, :16]}
    )
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
    importance = tp.importance.GroupTaylorImportance()
    for layer in model.model.layers:
        network = layer.mlp
        every = list(range(network.up_proj.out_features))
        group = graph.get_pruning_group(network.up_proj, tp.prune_linear_out_channels, every)
        gone = importance(group).argsort()[: len(every) - count].tolist()
        part = graph.get_pruning_group(network.up_proj, tp.prune_linear_out_channels, gone)
        part.prune()
    model.config.intermediate_size = count
    model.zero_grad()
    return model


def one_shot(bench: Bench, system: str, removed: float, seed: int) -> Any:
    """Return the model of a system."""
    if system == "structured_pruning":
        return structured(bench, removed, seed)
    if system == "wanda_sp":
        return structured(bench, removed, seed, importance="activations", reconstruct=False)
    if system == "magnitude":
        return keep_neurons(bench, removed, magnitude)
    if system == "random":
        generator = torch.Generator().manual_seed(seed)
        size = bench.original.config.intermediate_size
        return keep_neurons(bench, removed, lambda _: torch.rand(size, generator=generator))
    if system == "torch_pruning":
        return torch_pruning(bench, removed, seed)
    assert system == "depth", system
    model = copy.deepcopy(bench.original)
    depth = round(len(model.model.layers) * (1 - removed))
    chosen = DropLayers(targets="layers", keep=depth, select="importance")
    return apply_pass(model, chosen, bench.calibration(seed))


RECIPE = """
plmcc: 1
name: llm
task: text-generation
seed: {seed}
passes:
  - structured_pruning: {{target: {{parameters: {left}}}, multiple_of: {multiple}, text: [{text}]}}
train:
  data: {{train: [{train}], pack: true, max_length: {length}, limit: 40000}}
  distill: {{logits: 1.0, temperature: 1.0}}
  arguments:
    max_steps: {steps}
    learning_rate: {learning_rate}
    lr_scheduler_type: cosine
    warmup_steps: 20
    per_device_train_batch_size: {batch}
    weight_decay: 0.0
    bf16: true
    logging_steps: 20
"""


def distilled(bench: Bench, removed: float, seed: int, work: Path) -> Any:
    """Prune and distill by a recipe, as a user would; a run that was interrupted continues."""
    wiki = bench.data / "wiki_en"
    values: dict[str, Any] = {
        "seed": seed,
        "left": 1 - removed,
        "multiple": MULTIPLE,
        "length": LENGTH,
    }
    values |= {"text": wiki / "valid.txt.gz", "train": wiki / "shard0.txt.gz"}
    recipe = parse_recipe(RECIPE.format(**values, **DISTILLED), load_torch=True)
    place = work / f"distilled-{removed:g}-{seed}"
    if not place.exists():
        plmcc.apply(recipe, bench.name, output=place, resume=True)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--system", nargs="+", default=ONE_SHOT)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--distill", action="store_true", help="also the trained rows")
    parser.add_argument("--decode", action="store_true", help="also the speed of generation")
    parser.add_argument("--work", type=Path, default=Path("llm-work"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.data, asked.model)
    found = _read(bench)
    for seed in asked.seed:
        for removed in asked.removed:
            for system in asked.system:
                _add(found, bench, asked, system, removed, seed, 0)
            if asked.distill:
                _add(found, bench, asked, "structured_pruning", removed, seed, None)


def _add(
    found: dict[str, Any],
    bench: Bench,
    asked: argparse.Namespace,
    system: str,
    removed: float,
    seed: int,
    steps: int | None,
) -> None:
    """Add a row, unless it is there."""
    steps = int(DISTILLED["steps"]) if steps is None else steps
    key = {"system": system, "removed": removed, "steps": steps, "seed": seed}
    if any(key.items() <= row.items() and row["code"] == found["code"] for row in found["rows"]):
        return
    start = time.perf_counter()
    if steps:
        model = distilled(bench, removed, seed, asked.work)
    else:
        model = one_shot(bench, system, removed, seed)
    row = bench.row(model, **key) | {"code": found["code"]}
    row["seconds"] = round(time.perf_counter() - start, 1)
    if asked.decode:
        row["decode_ratio"] = {str(batch): bench.decode_ratio(model, batch) for batch in (1, 16)}
    found["rows"] = [old for old in found["rows"] if not key.items() <= old.items()] + [row]
    write_json(RESULTS, found)
    print(json.dumps(row), flush=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _read(bench: Bench) -> dict[str, Any]:
    """Return the results so far, with rows of the present code only."""
    files = [f"HEAD:passes/structured_pruning/{name}.py" for name in CODE]
    code = " ".join(_git("rev-parse", "--short", file) for file in files)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {
        "command": "python benchmarks/llm.py DATA MODEL --distill",
        "commit": _git("rev-parse", "HEAD"),
        "code": code,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "context": CONTEXT,
        "windows": WINDOWS,
        "calibration_tokens": CALIBRATION * LENGTH,
        "distillation": DISTILLED | {"length": LENGTH},
        "dense_perplexity": round(bench.dense, 3),
        "rows": [row for row in rows if row["code"] == code],
    }


if __name__ == "__main__":
    main()
