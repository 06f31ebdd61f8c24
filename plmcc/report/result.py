"""What `apply` did, as all parts of the compiler write it down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from plmcc.evaluation.latency import Latency
from plmcc.models.source import Source
from plmcc.report.charts import SiteChart
from plmcc.report.provenance import FilesRead
from plmcc.rewrite import Record
from plmcc.utils.types import Values

Log = Callable[[str], None]
"""Called with every line for the user."""


@dataclass
class Result:
    """What `apply` did: the compressed model, and everything that was measured. Sizes are bytes,
    times seconds."""

    model: PreTrainedModel
    source: Source
    """The model with the tokenizer that goes with it."""
    records: list[Record] = field(default_factory=list)
    sites: list[Values] = field(default_factory=list)
    misses: list[dict[str, str]] = field(default_factory=list)
    bytes_before: dict[str, int] = field(default_factory=dict)
    bytes_after: dict[str, int] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    charts: list[SiteChart] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    digests: list[dict[str, Any]] = field(default_factory=list)
    """Of each stage its name, its passes, and the digests of the model before and after it."""
    reload_difference: float = 0.0
    """Largest difference of the probe outputs after reloading, relative to their scale."""
    folder: Path | None = None
    read: FilesRead = field(default_factory=FilesRead)
    """The files that were read, where the result is written."""
