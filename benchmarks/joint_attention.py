"""Kernels for the joint softmax of compressed attention over source and target keys.

    python benchmarks/joint_attention.py

Heads of width 64 for keys and 256 for values (d = 256, f = 1024), one query a row as in decoding,
or 32 as in training. Every kernel runs eager and through torch.compile, in turn with the others;
a row's time is the median, in microseconds.

    two products    scores of both sides, one softmax, a product with each side's values
                    (`passes/compressed_attention.py`)
    concatenated    keys and values of both sides copied together, one scaled_dot_product_attention
    one buffer      the same without the copy: as if the cache held both sides one after the other
    merged          a softmax for each side, merged by their log-sum-exp
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plmcc.artifact.environment import hardware, versions
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
HEADS, KEY, VALUE = 4, 64, 256
Sides = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # queries, keys and values of both sides


def two_products(q: Tensor, ks: Tensor, vs: Tensor, kt: Tensor, vt: Tensor) -> Tensor:
    scores = torch.cat((q @ ks.transpose(-1, -2), q @ kt.transpose(-1, -2)), -1)
    source, target = scores.softmax(-1).split((ks.shape[2], kt.shape[2]), -1)
    mixed: Tensor = source @ vs + target @ vt
    return mixed


def concatenated(q: Tensor, ks: Tensor, vs: Tensor, kt: Tensor, vt: Tensor) -> Tensor:
    keys, values = torch.cat((ks, kt), 2), torch.cat((vs, vt), 2)
    return scaled_dot_product_attention(q, keys, values, scale=1.0)


def one_buffer(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, keys, values, scale=1.0)


def merged(q: Tensor, ks: Tensor, vs: Tensor, kt: Tensor, vt: Tensor) -> Tensor:
    s, t = q @ ks.transpose(-1, -2), q @ kt.transpose(-1, -2)
    log_s, log_t = s.logsumexp(-1, keepdim=True), t.logsumexp(-1, keepdim=True)
    share = torch.sigmoid(log_s - log_t)
    return share * ((s - log_s).exp() @ vs) + (1 - share) * ((t - log_t).exp() @ vt)


def inputs(rows: int, queries: int, source: int, target: int, device: str) -> Sides:
    def drawn(length: int, width: int) -> Tensor:
        return torch.randn(rows, HEADS, length, width, device=device)

    q, keys, values = drawn(queries, KEY) / 8, KEY, VALUE
    return q, drawn(source, keys), drawn(source, values), drawn(target, keys), drawn(target, values)


def kernels(sides: Sides) -> dict[str, Callable[[], Tensor]]:
    q, ks, vs, kt, vt = sides
    both = torch.cat((ks, kt), 2), torch.cat((vs, vt), 2)
    made: dict[str, Callable[[], Tensor]] = {}
    for prefix, wrap in (("", lambda f: f), ("compiled ", torch.compile)):
        made |= {
            f"{prefix}two products": _bound(wrap(two_products), sides),
            f"{prefix}concatenated": _bound(wrap(concatenated), sides),
            f"{prefix}one buffer": _bound(wrap(one_buffer), (q, *both)),
            f"{prefix}merged": _bound(wrap(merged), sides),
        }
    return made


def _bound(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: function(*given)


@torch.inference_mode()
def measured(sides: Sides, rounds: int) -> dict[str, float]:
    runs = kernels(sides)
    expected = two_products(*sides)
    for name, run in runs.items():
        torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4, msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(found), 1) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for count, queries, source, target in (
        (1, 1, 16, 16),
        (4, 1, 16, 16),
        (64, 1, 16, 16),
        (256, 1, 16, 16),
        (4, 1, 128, 128),
        (64, 1, 128, 128),
        (4, 1, 512, 512),
        (64, 32, 32, 32),
    ):
        torch.compiler.reset()
        shape = {"rows": count, "queries": queries, "source": source, "target": target}
        times = measured(inputs(count, queries, source, target, device), arguments.rounds)
        rows += [
            {**shape, "device": device, "kernel": k, "microseconds": v} for k, v in times.items()
        ]
        print(shape, times, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": f"python benchmarks/joint_attention.py --threads {arguments.threads}",
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [0],
        "rows": rows,
    }
    write_json(ROOT / "benchmarks/results/joint_attention.json", result)


if __name__ == "__main__":
    main()
