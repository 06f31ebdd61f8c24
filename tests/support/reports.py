"""What reports are made of in tests: settings of a run, and values of one with many sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plmcc import Data, Train

STEPS = 30


def trained(data: Path) -> Train:
    arguments: dict[str, Any] = {"max_steps": STEPS, "logging_steps": 3, "learning_rate": 1e-3}
    return Train(data=Data(train=str(data / "rows.tsv")), arguments=arguments)


def site(name: str, path: str, error: float | None = None, **layout: int) -> dict[str, Any]:
    """What a report says of a site that the pass of this name rewrote."""
    statistics = {} if error is None else {"relative_error": error}
    return {"pass": name, "paths": [path], "statistics": statistics, "layout": layout}


def many() -> dict[str, Any]:
    """Sizes and sites of a model with a table and 48 linear layers."""
    linears = {f"layer.{i}.{part}": 4_000_000 for i in range(12) for part in ("q", "k", "v", "o")}
    rest = {"norms": 5000, "other": 7000}
    small = dict.fromkeys(linears, 1_000_000)
    sites = [site("codes", "table", 0.2, num_embeddings=9, embedding_dim=3)]
    sites += [
        site("rounding", path, 0.1 + i / 100, in_features=3) for i, path in enumerate(linears)
    ]
    return {
        "bytes_before": {"table": 90_000_000, **rest, **linears},
        "bytes_after": {"table": 9_000_000, **rest, **small},
        "sites": sites,
    }
