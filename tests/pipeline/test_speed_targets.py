"""A pass that is asked for speed: what was asked, and what the finished model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plmcc
from plmcc.evaluation.latency import Latency
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.pipeline import judge
from support.tiny_models import tiny
from support.tokenizers import words


@pytest.mark.parametrize(("ratio", "missed"), [(0.5, False), (0.52, False), (0.625, True)])
def test_a_miss_of_more_than_five_percent_is_said(
    ratio: float, missed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DropLayers, "speed_target", lambda _: (2.0, 3, 11))
    asked: list[Any] = []

    def measure(
        original: Any, model: Any, batches: tuple[int, ...] = (1,), length: int = 32, **_: object
    ) -> list[Latency]:
        asked.append((batches, length))
        return [Latency("eager", batch, length, 1.0, ratio, ratio, 0.0) for batch in batches]

    monkeypatch.setattr(judge, "measure", measure)
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    said: list[str] = []
    recipe = plmcc.Recipe(passes=[DropLayers(targets="encoder", keep=1)])
    plmcc.apply(recipe, tmp_path / "model", tmp_path / "out", log=said.append)
    assert asked == [((3,), 11)]
    sentence = (
        "drop_layers was asked for 2 times the speed; the whole model, measured, has 1.60 "
        "(batch 3, 11 tokens, eager)"
    )
    assert (f"note: {sentence}" in said) == missed
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (sentence in report["notes"]) == missed


def test_pruning_asks_for_the_speed_of_its_target() -> None:
    target: Any = {"latency": 1.5, "batch": 4, "length": 64}
    pruned = MovementPruning(granularity="structured", target=target, compact=True, storage="dense")
    assert pruned.speed_target() == (1.5, 4, 64)
    assert MovementPruning(density=0.5).speed_target() is None
