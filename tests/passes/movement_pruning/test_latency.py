"""Movement pruning by measured times: the table, and targets met by it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import spearmanr
from transformers import PreTrainedModel

import plmcc
from plmcc import PlmccError
from plmcc.api import Site
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.probes import probe_inputs
from plmcc.ir.program import Program
from plmcc.kit.parts import by_path, read
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.passes.movement_pruning import latency as _latency
from plmcc.passes.movement_pruning import targets as _aimed
from plmcc.passes.movement_pruning.latency import Curve, Times, _cut, measure
from plmcc.rewrite import harden_all, match, replace_all
from support.pruning import prunable
from support.tiny_models import tiny

HEADS, WIDTH, NEURONS = 8, 16, 512
SETTING = {"batch": 16, "length": 32}


def bert(layers: int = 3) -> PreTrainedModel:
    """A BERT in which matrix products take longer than calling them."""
    torch.manual_seed(0)
    make: Any = transformers.BertConfig
    config = make(
        vocab_size=99,
        hidden_size=HEADS * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=48,
    )
    model: PreTrainedModel = transformers.BertForSequenceClassification(config)
    model.train(False)
    return model


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_latency, "_SECONDS", 0.6)


def shares(layer: Any) -> list[float]:
    """Return the parts of heads and neurons that a layer has."""
    attention, network = layer.attention.output.dense, layer.output.dense
    return [attention.weight.shape[1] / (HEADS * WIDTH), network.weight.shape[1] / NEURONS]


# --- the table


def test_times_rise_with_heads_and_neurons_and_add_up_to_the_model() -> None:
    model: Any = bert()
    program = Program(model)
    linears, paths = by_path(program), [site.path for site in sites(program)]
    found: Any = [(path, read(program, path, linears)) for path in paths]
    times, rest = measure(program, found, 16, 48, "cpu")
    assert times[0].curves is times[2].curves  # the same shapes are timed once
    for curve, whole in zip(times[0].curves, (HEADS, NEURONS), strict=True):
        assert (curve.counts[0], curve.counts[-1]) == (0, whole)
        assert spearmanr(curve.counts, curve.measured).statistic > 0.85
        assert list(curve.seconds) == sorted(curve.seconds)
        assert curve.seconds[-1] > 2 * curve.at(0.3)
    inputs, taken = probe_inputs(model, 16, 48), []
    inputs["attention_mask"].fill_(1)
    for _ in range(20):
        start = time.perf_counter()
        with torch.inference_mode():
            model(**inputs)
        taken.append(time.perf_counter() - start)
    total = rest + sum(one.of([1.0, 1.0]) for one in times)
    assert 0.5 < total / min(taken) < 2


def sites(program: Program) -> list[Site]:
    return program.resolve("layers", "layer").sites


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5_gated", "bart", "albert"])
def test_layers_of_many_kinds_are_cut_to_size(name: str) -> None:
    program = Program(tiny(name))
    linears = by_path(program)
    for site in sites(program):
        parts: Any = read(program, site.path, linears)
        call = Program(program.model, CalibrationData.random(program.model)).data.record(site.path)[
            0
        ]
        for part, block in enumerate(parts.every()):
            ratio = getattr(block, "heads", 1) // getattr(block, "kv_heads", 1)
            counts = [0] * len(parts.every())
            counts[part] = ratio
            layer = _cut(site.module, parts, counts)
            last: Any = layer.get_submodule(block.linears["o" if "o" in block.linears else "fc2"])
            rows = last.weight.shape[0 if "Conv1D" in type(last).__name__ else 1]
            assert rows == ratio * getattr(block, "head_dim", 1)
            with torch.no_grad():
                layer(**call.arguments)


# --- the target


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        ("magnitude", "local"),
        ("movement", "local"),
        ("magnitude", "global"),
        ("movement", "global"),
        ("soft_movement", "local"),
        ("l0", "local"),
    ],
)
@pytest.mark.parametrize(
    ("granularity", "speed"),
    [("structured", 2.0), ("neuron", 1.4), ({"hybrid": [16, 16]}, 1.6)],
)
def test_a_target_of_time_is_met_by_the_table(
    granularity: Any, speed: float, method: str, scope: str
) -> None:
    model: Any = bert()
    target = {"latency": speed, **SETTING}
    options: Any = {"method": method, "granularity": granularity, "scope": scope}
    done = replace_all(model, match(model, [MovementPruning(target=target, **options)]))
    aim = prunable(done[0].site).state.aim
    assert aim is not None
    generator = torch.Generator().manual_seed(0)
    for score_group in prunable(done[0].site).state.score_groups:
        if score_group.scores is not None:
            score_group.scores.data = torch.randn(score_group.shape, generator=generator)
    harden_all(model, done)
    times = [found for one in done if (found := prunable(one.site).times)]
    assert len(times) == len(done)
    layers = model.bert.encoder.layer
    pairs = list(zip(times, layers, strict=True))
    seconds = [one.of(shares(layer)) for one, layer in pairs]
    dense = aim.apart + sum(one.of([1.0] * len(one.curves)) for one in times)
    assert dense / (aim.apart + sum(seconds)) == pytest.approx(speed, rel=0.03)
    metrics = [one.soft.statistics()["predicted_seconds"] for one in done]
    assert metrics == pytest.approx(seconds)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_target_of_time_beyond_reach_is_refused_with_what_can_be_reached(
    scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(*_: Any) -> tuple[list[Times], float]:
        heads, neurons = (Curve.of((0, whole), (0.0, 8.0)) for whole in (HEADS, NEURONS))
        return [Times(1.0, (heads, neurons))] * 3, 2.0

    def asked(speed: float) -> None:
        target: Any = {"latency": speed, **SETTING}
        match(bert(), [MovementPruning(granularity="structured", target=target, scope=scope)])

    monkeypatch.setattr(_aimed, "measure", table)
    least = 5 + 3 * (8 / HEADS + 8 / NEURONS if scope == "local" else 0)
    with pytest.raises(PlmccError, match=f"1000 times as fast .* reach {53 / least:.3g} times"):
        asked(1000)
    with pytest.raises(PlmccError, match="within 3 %"):
        asked(1.1 * 53 / least)
    asked(0.95 * 53 / least)


def test_heads_are_too_coarse_for_some_targets() -> None:
    target: Any = {"latency": 50.0, **SETTING}
    chosen = MovementPruning(method="magnitude", granularity="head", target=target)
    with pytest.raises(PlmccError, match="times at most"):
        plmcc.Pipeline([chosen])(bert(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "weight"}, "zeros save no time"),
        ({"granularity": {"block": [8, 8]}}, "zeros save no time"),
        ({"granularity": "structured", "storage": "csr"}, "storage: dense"),
        ({"granularity": "structured", "compact": False}, "compact: true"),
        ({"granularity": "structured", "target": {"latency": 2.0, "flops": 0.5}}, "give one of"),
        ({"granularity": "structured", "target": {"flops": 0.5, "batch": 8}}, "`batch` has no"),
        ({"granularity": "structured", "target": {"latency": 0.5}}, "greater than 1"),
    ],
)
def test_options_that_time_has_no_use_for_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MovementPruning(**{"target": {"latency": 2.0}} | options)


def test_texts_longer_than_the_model_reads_are_refused() -> None:
    target: Any = {"latency": 2.0}
    chosen = MovementPruning(granularity="structured", target=target)
    with pytest.raises(PlmccError, match="at most 48"):
        match(bert(), [chosen])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    target: Any = {"latency": 2.0, "device": "cuda", **SETTING}
    chosen = MovementPruning(granularity="structured", target=target)
    with pytest.raises(PlmccError, match="no CUDA device"):
        match(bert(), [chosen])
