"""Heads of tied embedding tables: time and memory of each pass beside the dense table.

    python benchmarks/tied_head.py --tokens 1024

The tied table of a T5-shaped model, 250,112 x 512 random values (mT5's size). For each pass the
head alone is run: `forward` turns hidden states of so many tokens into logits, `backward` goes from
random gradients of the logits back to hidden states and weights. The heads are those of deployed
tables; all but adaptive codes, which keep the original table until their lengths are learned, train
in the same form. Codes are random: they decide nothing about
speed. Times are medians of the process's own time, alternating with the dense head; `ratio` is to
the dense head's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plmcc.artifact.environment import hardware, versions
from plmcc.passes.adaptive_codes import AdaptiveCodes, AdaptiveEmbedding, SoftAdaptive
from plmcc.passes.binary_embedding import BinaryCodedEmbedding
from plmcc.passes.compositional_codes import CodedEmbedding
from plmcc.passes.distilled_factorization import FactorizedEmbedding
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
ROWS, DIMS = 250_112, 512
LENGTHS = [32, 64, 128, 256]


class Dense(nn.Module):
    def __init__(self, table_VD: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table_VD)

    def attend(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table.T


def filled(module: nn.Module) -> Any:
    """The module with random weights and codes."""
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.05, generator=random)
    for buffer in module.buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256, generator=random)
    return module


def coded(kind: Any, **options: Any) -> Callable[[], Any]:
    return lambda: filled(kind(num_embeddings=ROWS, embedding_dim=DIMS, **options))


def adaptive() -> AdaptiveEmbedding:
    made = coded(AdaptiveEmbedding, lengths=LENGTHS, counts=[ROWS // 4] * 4)()
    made.selector.fill_(0b00011011)  # each codebook as often as its count says
    return made  # type: ignore[no-any-return]


def in_training() -> SoftAdaptive:
    random = torch.Generator().manual_seed(0)
    layout: dict[str, Any] = {
        "num_embeddings": ROWS,
        "embedding_dim": DIMS,
        "padding_idx": None,
        "zero_padding": False,
        "scale": 1.0,
    }
    table_VD, *books = (
        torch.randn(rows, DIMS, generator=random) * 0.05 for rows in (ROWS, *LENGTHS)
    )
    biases = [torch.zeros(DIMS) for _ in LENGTHS]
    options = AdaptiveCodes(lengths=LENGTHS)
    made = SoftAdaptive(options, layout, table_VD, 0.15, books, biases)
    made.train()
    return made


HEADS: dict[str, Callable[[], Any]] = {
    "compositional_codes, 32 of 16": coded(CodedEmbedding, codebooks=32, codewords=16),
    "binary_embedding, 256 bits, no activation": coded(
        BinaryCodedEmbedding, bits=256, span=0.15, activation="none"
    ),
    "binary_embedding, 256 bits": coded(
        BinaryCodedEmbedding, bits=256, span=0.15, activation="tanh"
    ),
    "distilled_factorization, rank 48": coded(FactorizedEmbedding, rank=48, storage="dense"),
    "distilled_factorization, rank 64, uint8": coded(FactorizedEmbedding, rank=64, storage="uint8"),
    "adaptive_codes, 32 to 256 bits": adaptive,
    "adaptive_codes, while lengths are learned": in_training,
}


def step(module: Any, hidden_ND: Tensor, given_NV: Tensor) -> tuple[float, float]:
    """Seconds of forward and backward."""
    hidden_ND = hidden_ND.clone().requires_grad_()
    module.zero_grad()
    start = time.process_time()
    logits_NV = module.attend(hidden_ND)
    middle = time.process_time()
    logits_NV.backward(given_NV)
    return middle - start, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="heads whose name begins so")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tied_head.json")
    arguments = parser.parse_args()
    rows = []
    dense = filled(Dense(torch.empty(ROWS, DIMS)))
    for name, make in HEADS.items():
        if not name.startswith(arguments.only):
            continue
        module = make()
        for tokens in arguments.tokens:
            hidden_ND = torch.randn(tokens, DIMS)
            given_NV = torch.randn(tokens, ROWS) / ROWS
            times = [
                (*step(dense, hidden_ND, given_NV), *step(module, hidden_ND, given_NV))
                for _ in range(arguments.rounds)
            ]
            base_f, base_b, own_f, own_b = (statistics.median(v) for v in zip(*times, strict=True))
            stored = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            rows.append(
                {
                    "head": name,
                    "tokens": tokens,
                    "forward": round(own_f, 3),
                    "backward": round(own_b, 3),
                    "dense_forward": round(base_f, 3),
                    "dense_backward": round(base_b, 3),
                    "ratio": round((own_f + own_b) / (base_f + base_b), 3),
                    "forward_ratio": round(own_f / base_f, 3),
                    "weight_share": round(stored / (4 * ROWS * DIMS), 4),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    tokens = " ".join(map(str, arguments.tokens))
    result = {
        "command": f"python benchmarks/tied_head.py --tokens {tokens}",
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [0],
        "rows": rows,
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
