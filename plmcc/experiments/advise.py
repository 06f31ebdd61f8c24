"""`plmcc advise`: where the bytes and the time of a model are, and what each recipe would leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from plmcc.artifact.size import component_bytes
from plmcc.experiments.candidates import Candidate, candidates, side_bytes
from plmcc.models.source import load_source
from plmcc.planning.cost import operations
from plmcc.utils.types import Values


@dataclass(frozen=True)
class Component:
    """A part of a model: its bytes, and its part of the operations of a forward pass."""

    name: str
    bytes: int
    share: float
    """Of all bytes."""
    operations: float | None
    """Its part of the multiply-adds over a sequence of 128 tokens; None where the model cannot be
    run without weights."""


@dataclass(frozen=True)
class Advice:
    """What there is, and what could be done."""

    model: str
    task: str
    size: int
    """Bytes of all that a server needs."""
    components: list[Component]
    candidates: list[Candidate]

    def to_json(self) -> Values:
        """Return plain values."""
        found = [
            {"name": one.name, "values": one.values, "reason": one.reason}
            | dict.fromkeys(("size", "parameters"))
            | (one.sizes if one.recipe is not None else {})
            for one in self.candidates
        ]
        parts = [asdict(one) for one in self.components]
        values = {"model": self.model, "task": self.task, "size": self.size}
        return values | {"components": parts, "candidates": found}


def advise(model: str, text: Sequence[str] = (), recipes: Sequence[Path] = ()) -> Advice:
    """Look at a model without its weights.

    Args:
        model: a directory or hub id.
        text: files of text, by which vocabularies can be pruned.
        recipes: recipes to plan; by default those of `plmcc shrink`.

    Raises:
        PlmccError: the model cannot be read.
    """
    source = load_source(model, meta=True)
    sizes = component_bytes(source.model)
    whole = sum(sizes.values())
    counted = operations(source.model, sizes)
    flops = max(1, sum(counted.values()))
    parts = [
        Component(name, size, size / max(1, whole), counted[name] / flops if counted else None)
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    beside = side_bytes(source)
    parts.append(Component("tokenizer and configuration", beside, 0.0, None))
    found = candidates(source, text, recipes)
    return Advice(model, source.task, whole + beside, parts, found)
