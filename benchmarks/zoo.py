"""Every architecture that transformers can build small, under every pass.

    python benchmarks/zoo.py                          # all, some hours; continues where it stopped
    python benchmarks/zoo.py --types bert,gpt_neo     # some

A pair of model type and pass is

- `right`: rewritten, and the same outputs and tokens after saving and reloading, by the Auto class
  and by the model's own class;
- `refused`: `plan` gives a reason;
- `late`: `plan` promises what rewriting then refuses;
- `wrong`: other outputs after reloading;
- `crash`: anything but an error of plmcc.

Results go to `benchmarks/results/zoo.json`, a line a pair in `build/zoo.jsonl` until then.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedModel, set_seed
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.utils import logging

import plmcc
from plmcc.artifact.verify import caches_exactly, check_cache, first_output
from plmcc.ir.probes import probe_inputs
from plmcc.models.source import Source
from plmcc.pipeline.expected import on_meta
from plmcc.planning.plan import plan
from plmcc.recipe.load import parse_recipe
from plmcc.utils.numerics import relative_difference
from plmcc.utils.text import first_line

ROOT = Path(__file__).parents[1]
LINES = ROOT / "build/zoo.jsonl"
RESULT = ROOT / "benchmarks/results/zoo.json"
SECONDS = 60
"""For one pair."""
DEPTH = 2
"""Layers of a model."""
PARAMETERS = 20_000_000
"""A larger model is not small."""

PASSES = {
    "compositional_codes": "compositional_codes: {codebooks: 2, codewords: 4, rounds: 0}",
    "binary_embedding": "binary_embedding: {bits: 16}",
    "distilled_factorization": "distilled_factorization: {rank: 4}",
    "adaptive_codes": "adaptive_codes: {lengths: [8, 16]}",
    "movement_pruning, weights": "movement_pruning: {method: magnitude, density: 0.5}",
    "movement_pruning, structured": (
        "movement_pruning: {method: magnitude, granularity: structured, density: 0.5}"
    ),
    "drop_layers": "drop_layers: {keep: 1, select: even}",
    "share_layers": "share_layers",
    "compressed_attention": "compressed_attention",
    "low_rank": "low_rank: {rank: 4, weighting: none}",
    "quantized_linears, int8": "quantized_linears: {scheme: int8}",
    "quantized_linears, int4": "quantized_linears: {scheme: int4}",
    "optimum": "optimum",
    "structured_pruning": (
        "structured_pruning: {target: {parameters: 0.8}, multiple_of: 4, uniform: false}"
    ),
}
_SIZES = {
    "vocab_size": 99,
    "decoder_vocab_size": 99,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_target_positions": 64,
    "max_source_positions": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "embedding_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "state_size": 4,
    "rotary_dim": 4,
}
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "model_dim")
_INNER = (
    "intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "dim_feedforward",
    "ffn_hidden_size",
)
_HEADS = (
    "num_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
)
_LAYERS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
)
_HEADED = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


class TooLongError(Exception):
    """A pair took more than its time."""


def types() -> list[str]:
    """Return every model type that has a model of its own."""
    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def small_config(model_type: str) -> Any:
    """Return the default config of a type with small sizes."""
    config = configuration_auto.CONFIG_MAPPING[model_type]()
    values = dict(_SIZES) | dict.fromkeys(_WIDTHS, 32) | dict.fromkeys(_INNER, 48)
    values |= dict.fromkeys(_HEADS, 4) | dict.fromkeys(_LAYERS, DEPTH)
    known = config.to_dict()
    if known.get("vocab_size", 0) is None:  # ESM's default
        config.vocab_size, config.pad_token_id = _SIZES["vocab_size"], 1
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1  # checkpoints have one
    for name, value in values.items():
        if isinstance(known.get(name), int) and not isinstance(known[name], bool):
            setattr(config, name, min(known[name], value))
    for name, value in known.items():
        depth = isinstance(value, list) and len(value) > DEPTH and "layer" in name
        if depth:
            setattr(config, name, value[:DEPTH])
        if name.endswith("token_id") and isinstance(value, int) and value >= 99:
            setattr(config, name, min(value, {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2)))
    return config


def build(model_type: str) -> PreTrainedModel | str:
    """Return a small random model of a type that reads text, or why there is none."""
    logging.set_verbosity_error()
    for names in _HEADED:
        named = names.get(model_type)
        for name in (named,) if isinstance(named, str) else named or ():
            set_seed(0)
            try:
                kind = getattr(transformers, name)
                config = small_config(model_type)
                with torch.device("meta"):
                    count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
                if count > PARAMETERS:
                    reason = f"{count:,} parameters"
                    continue
                model: PreTrainedModel = kind(config).eval()
                first_output(model, probe_inputs(model))
                with tempfile.TemporaryDirectory() as folder:  # some configs do not allow it
                    model.save_pretrained(folder)
                    kind.from_pretrained(folder)
            except Exception as problem:  # a type that needs more than small numbers, or pictures
                reason = f"{type(problem).__name__}: {first_line(problem)}"
                continue
            else:
                return model
    return reason


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` after some seconds."""

    def stop(*_: object) -> None:
        raise TooLongError(f"{seconds} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def judged(model: PreTrainedModel, entry: str) -> tuple[str, str]:
    """Return the verdict on a pair, with the reason."""
    text = f"plmcc: 1\npasses: [{entry}]\ncalibrate: {{data: synthetic}}\n"
    recipe = parse_recipe(text, load_torch=True)
    source = Source.of(model)
    try:
        planned = plan(recipe, Source.of(on_meta(model)))
    except plmcc.PlmccError as problem:
        return _unless_slow("refused", problem.diagnostics[0].message)
    if planned.problems:
        return _unless_slow("refused", planned.problems[0].message)
    exact = caches_exactly(model, probe_inputs(model))
    try:
        passes = [*recipe.passes]
        done = plmcc.Pipeline(passes, calibrate=recipe.calibrate)(source)
    except plmcc.PlmccError as problem:
        return _unless_slow("late", problem.diagnostics[0].message)
    return reloaded(done, exact)


def _unless_slow(verdict: str, message: str) -> tuple[str, str]:
    return "slow" if TooLongError.__name__ in message else verdict, message


def reloaded(model: PreTrainedModel, exact: bool = True) -> tuple[str, str]:
    """Save a model, load it by two classes, and compare. `exact`: the original computes the same
    with its cache as without."""
    inputs = probe_inputs(model)
    expected = first_output(model, inputs)
    if not bool(torch.isfinite(expected).all()):
        return "wrong", "the outputs are not finite"
    if model.can_generate() and exact:
        try:
            check_cache(model, inputs)
        except plmcc.PlmccError as problem:
            return "wrong", problem.diagnostics[0].message
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kinds: dict[str, Any] = {"its class": type(model), "AutoModel": AutoModel}
        for name, kind in kinds.items():
            again = kind.from_pretrained(folder).eval()
            if type(again) is not type(model):
                continue
            difference = relative_difference(first_output(again, inputs), expected)
            if not difference <= 1e-4:
                return "wrong", f"{name}: the reloaded outputs differ by {difference:.3g}"
    return "right", ""


def run(chosen: list[str]) -> None:
    """Judge some types, and append a line for each pair."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for model_type in chosen:
        try:
            with limited(SECONDS):
                model = build(model_type)
        except TooLongError as problem:
            model = str(problem)
        if isinstance(model, str):
            write({"type": model_type, "pass": "", "verdict": "not built", "reason": model})
            continue
        for name, entry in PASSES.items():
            start = time.perf_counter()
            try:
                with limited(SECONDS):
                    verdict, reason = judged(copy.deepcopy(model), entry)
            except TooLongError as problem:
                verdict, reason = "slow", str(problem)
            except Exception as problem:  # what the zoo is for
                verdict, reason = "crash", f"{type(problem).__name__}: {first_line(problem)}"
            seconds = round(time.perf_counter() - start, 2)
            line = {"type": model_type, "class": type(model).__name__, "pass": name}
            write(line | {"verdict": verdict, "reason": reason[:300], "seconds": seconds})


def write(line: dict[str, Any]) -> None:
    """Append a line."""
    LINES.parent.mkdir(exist_ok=True)
    with LINES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines() -> list[dict[str, Any]]:
    """Return what is there already."""
    if not LINES.exists():
        return []
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the verdicts, of each pass and of all."""
    built = {line["type"] for line in found if line["pass"]}
    by_pass = {
        name: dict(Counter(line["verdict"] for line in found if line["pass"] == name))
        for name in PASSES
    }
    counts = Counter(line["verdict"] for line in found if line["pass"])
    return {"types": len(built), "pairs": sum(counts.values()), "verdicts": dict(counts)} | {
        "by_pass": by_pass
    }


def main() -> None:
    """Run what is missing, in processes of a few types, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="")
    parser.add_argument("--child", action="store_true")
    asked = parser.parse_args()
    chosen = asked.types.split(",") if asked.types else types()
    if asked.child:
        run(chosen)
        return
    done = {line["type"] for line in lines()}
    left = [name for name in chosen if name not in done]
    for start in range(0, len(left), 8):
        part = left[start : start + 8]
        command = [sys.executable, __file__, "--child", "--types", ",".join(part)]
        subprocess.run(command, check=False)
        finished = {line["type"] for line in lines()}
        for name in part:
            if name not in finished:
                write({"type": name, "pass": "", "verdict": "not built", "reason": "it crashed"})
        print(f"{start + len(part)} of {len(left)}", summary(lines())["verdicts"], flush=True)
        report()


def report() -> None:
    """Write the counts of what is there, and every line that is neither right nor a refusal."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    values = {
        "command": "python benchmarks/zoo.py",
        "commit": commit.stdout.strip(),
        "seed": 0,
        "machine": f"{platform.machine()}, 1 thread",
        "types_tried": len({line["type"] for line in lines()}),
        "types_known": len(types()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **summary(lines()),
        "lines": [line for line in lines() if line["verdict"] not in ("right", "refused")],
    }
    RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
