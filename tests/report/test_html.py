"""The page of a report: its card, charts and tables, of a real run and of values."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import plmcc
from plmcc import Data, Recipe, Result, Train
from plmcc.api import Bars, Points
from plmcc.artifact.size import component_bytes
from plmcc.models.source import load_source
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.planning.plan import plan
from plmcc.recipe.load import parse_recipe
from plmcc.report.charts import Dot, SiteChart, curves, front
from plmcc.report.html import page
from plmcc.report.summary import REST, Summary, components
from plmcc.report.words import megabytes, times
from support.reports import STEPS, many, site, trained
from support.tiny_models import tiny
from support.tokenizers import words

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
LAYERS = 2


FILL = re.compile(r'<div class="fill s(\d)" id="([^"]*)" style="width:([\d.]+)%">')


def images(text: str) -> list[ElementTree.Element]:
    """The SVG charts of a page, parsed."""
    parts = text.split("<svg")[1:]
    return [
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>") for part in parts
    ]


def groups(text: str, kind: str) -> dict[str, ElementTree.Element]:
    """The groups of a kind in SVG charts, by their ids."""
    found = {node.get("id", ""): node for image in images(text) for node in image.iter("g")}
    return {name: node for name, node in found.items() if name.startswith(f"{kind}:")}


def fills(text: str, kind: str) -> dict[str, float]:
    """The widths of bars in percent, by their ids."""
    found = {unescape(name): float(width) for _, name, width in FILL.findall(text)}
    return {name: width for name, width in found.items() if name.startswith(f"{kind}:")}


def bars_of(text: str, title: str) -> dict[tuple[str, str], float]:
    """The widths of a pass's bars by series and site."""
    parts = {tuple(name.split(":")): width for name, width in fills(text, "bar").items()}
    return {(series, site): w for (_, _, what, series, site), w in parts.items() if what == title}


def test_a_pass_has_a_bar_for_each_layer_and_each_matrix(result: Result, text: str) -> None:
    sites = {site["paths"][0] for site in result.sites}
    assert len(sites) == LAYERS
    for what in ("heads", "neurons"):
        drawn = bars_of(text, f"{what}-by-layer")
        assert drawn.keys() == {(series, site) for series in ("before", "kept") for site in sites}
    matrices = bars_of(text, "density-of-matrices")
    assert len(matrices) == 6 * LAYERS  # query, key, value, output, and two of the network
    assert {site for _, site in matrices} == sites


def test_bars_are_as_long_as_what_is_left(result: Result, text: str) -> None:
    found = bars_of(text, "neurons-by-layer")
    for one in result.sites:
        kept, before = (found[series, one["paths"][0]] for series in ("kept", "before"))
        counts = one["statistics"]
        assert counts["neurons_kept"] < counts["neurons"]
        assert kept / before == pytest.approx(counts["neurons_kept"] / counts["neurons"], 0.01)


def test_scores_and_weights_are_points(result: Result, text: str) -> None:
    clouds = [o.chart for o in result.charts if isinstance(o.chart, Points)]
    assert len(clouds) == 2 * LAYERS  # a matrix of attention and one of the network, of each layer
    paths = [node[0].get("d", "") for node in groups(text, "points").values()]
    drawn = sum(path.count("M") for path in paths)
    assert drawn == sum(len(pairs) for cloud in clouds for pairs in cloud.series.values())
    assert drawn == len(clouds) * 500
    for cloud in clouds:
        kept, pruned = ([score for _, score in cloud.series[n]] for n in ("kept", "pruned"))
        assert min(kept) >= max(pruned)


def test_loss_and_sparsity_are_drawn_over_the_steps(result: Result, text: str) -> None:
    log = result.training["main"]
    entries = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(3, STEPS + 1, 3))
    assert entries[0]["sparsity"] == 0  # warm-up
    assert entries[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    drawn = groups(text, "line")
    assert [name.rpartition(":")[2] for name in drawn] == ["loss", "sparsity"]
    for line in drawn.values():
        assert len(line[0].get("points", "").split()) == len(entries)


def test_the_page_stands_alone(result: Result, text: str) -> None:
    names = re.findall(r' id="([^"]*)"', text)
    assert len(names) == len(set(names)) > 20
    for part in ("<script", "<link", "href=", "src=", "url(", "@import"):
        assert part not in text
    assert len(text) < 600_000
    report = json.loads((result.folder / "report.json").read_text())  # type: ignore[operator]
    words = plain(text)
    for name, size in report["bytes_after"].items():
        assert f">{name}</td>" in words
        assert f"<td>{size:,}</td>" in words
    assert f"{report['sites'][0]['statistics']['neurons_kept']:.0f}" in words


def plain(text: str) -> str:
    return text.replace("<wbr>", "").replace("\N{NO-BREAK SPACE}", " ")


def test_a_run_without_passes_has_its_curve(data: Path) -> None:
    done = plmcc.apply(Recipe(train=trained(data)), data / "bert", data / "plain")
    assert done.charts == []
    assert list(groups((data / "plain/report.html").read_text(), "line")) == ["line:1:loss"]


def test_a_run_without_training_has_the_bars_of_its_sizes_alone(data: Path) -> None:
    recipe = Recipe(passes=[DropLayers(targets="encoder", keep=1)])
    plmcc.apply(recipe, data / "bert", data / "shallow")
    text = (data / "shallow/report.html").read_text()
    assert "<h2>Size</h2>" in text
    assert images(text) == []
    done = json.loads((data / "shallow/report.json").read_text())
    most = max(max(done["bytes_before"].values()), max(done["bytes_after"].values()))
    drawn = fills(text, "bytes")
    assert {name.rpartition(":")[2] for name in drawn} >= {"bert.encoder.layer", "everything-else"}
    for what, sizes in (("original", "bytes_before"), ("compressed", "bytes_after")):
        expected = 100 * done[sizes]["bert.encoder.layer"] / most
        assert drawn[f"bytes:{what}:bert.encoder.layer"] == pytest.approx(expected, abs=0.01)


def test_what_was_measured_is_drawn_by_dataset() -> None:
    text = page(values(latency=[LATENCY], metrics=METRICS, **SIZES), [])
    drawn = fills(text, "quality")
    assert drawn["quality:original:1:spearman"] == 100
    assert drawn["quality:compressed:1:spearman"] == pytest.approx(100 * 81 / 82, abs=0.01)
    assert "quality:original:3:bleu" not in drawn  # new weights have no metric before
    for label in ("a.tsv <small>spearman", "b.tsv <small>spearman", "c.txt <small>bleu"):
        assert label in text
    assert fills(text, "latency") == {
        "latency:original:1:eager:1-x-32": 50,
        "latency:compressed:1:eager:1-x-32": 100,
    }


METRICS = [
    {"metric": "spearman", "data": "data/a.tsv", "before": 82.0, "after": 81.0},
    {"metric": "spearman", "data": "data/b.tsv", "before": 80.0, "after": 79.8},
    {"metric": "bleu", "data": "c.txt", "before": None, "after": 30.0},
]
LATENCY = {
    "mode": "eager",
    "batch": 1,
    "length": 32,
    "original": 1.0,
    "compressed": 2.0,
    "ratio": 2.0,
    "spread": 0.1,
}
SIZES: dict[str, Any] = {"bytes_before": {"table": 2000}, "bytes_after": {"table": 1000}}


def values(**more: Any) -> dict[str, Any]:
    keys = ("bytes_before", "bytes_after", "training")
    empty: dict[str, Any] = {key: {} for key in keys}
    empty |= {key: [] for key in ("metrics", "latency", "sites", "misses", "exports", "notes")}
    empty |= {"hardware": {"machine": "m", "threads": 2, "gpu": "none", "system": "s"}}
    return {"recipe": "r", "model": "m", "loads_with": ["transformers"]} | empty | more


def test_modules_of_one_kind_are_one_bar_and_one_row() -> None:
    text = page(values(**many()), [])
    names = ("table", "48-linear-layers", "everything-else")
    drawn = {f"bytes:{what}:{name}" for what in ("original", "compressed") for name in names}
    assert fills(text, "bytes").keys() == drawn
    assert fills(text, "error").keys() == {"error:1:48-linear-layers", "error:2:table"}
    assert "mean of 48, at most 0.57" in text
    shown = text.partition("<details>")[0]
    assert shown.count("layer.3.q") == 0
    assert "<td>48 linear layers (rounding)</td><td>192 MB</td><td>48.0 MB</td>" in plain(shown)


def test_few_modules_have_their_own_rows() -> None:
    before, after = ({"a": 4, "b": 3, "c": size, "d": 1} for size in (2, 1))
    parts = list(components(before, after, []))
    assert [(part.name, part.before, part.after) for part in parts] == [
        ("c", 2, 1),
        (REST, 8, 8),
    ]
    given = {"a": 4, "a.b": 3, "c.b": 3}
    parts = list(components(given, given, [site("p", "a"), site("q", "a.b"), site("q", "c.b")]))
    assert [part.label for part in parts] == ["a (p, q)", "a.b (q)", "c.b (q)"]


def test_the_verdict_claims_what_the_spread_allows() -> None:
    slow = LATENCY | {"batch": 32, "ratio": 0.5, "spread": 0.1}
    unclear = LATENCY | {"batch": 8, "ratio": 0.98, "spread": 0.1}
    given = values(latency=[LATENCY, slow, unclear], metrics=METRICS, **SIZES)
    assert Summary.of(given).verdict() == (
        "2.0 times smaller; at worst spearman on a.tsv 81.00 (-1.00); 2.00 times as fast at batch"
        " 32; 2.00 times as slow at batch 1; no speed-up at batch 8."
    )
    worse = {"metric": "perplexity", "data": "d", "before": 10.0, "after": 13.0}
    given = values(metrics=[*METRICS, worse])
    assert "at worst perplexity on d 13.00 (+3.00); speed not" in Summary.of(given).verdict()
    given = values(latency=[unclear], metrics=METRICS[2:])
    assert Summary.of(given).verdict() == "Same size; bleu on c.txt 30.00; no speed-up."


def test_the_card_is_at_the_top() -> None:
    given = values(latency=[LATENCY], metrics=METRICS, exports=["onnx"], **SIZES)
    card = plain(page(given, [])).partition("</section>")[0]
    for said in ("2.00 kB → 1.00 kB", "2.0 times smaller", "82.00 → 81.00", "30.00", "onnx"):
        assert f">{said}<" in card
    assert "spearman on a.tsv, change -1.00" in card
    assert "batch 1 x 32 tokens, eager: time x 2.00 ± 0.10" in card


def test_details_are_folded() -> None:
    charts = [SiteChart("one", "layer.0", Bars("rank", {"a": 1.0}))]
    text = page(values(misses=[{"path": "x", "reason": "y"}], **many()), charts)
    shown, _, details = text.partition("<details>")
    for name in ("layer.0", "rank", "because"):
        assert name not in shown
        assert name in details
    assert details.count("<details>") == details.count("</details>") - 1


def test_any_pass_may_hand_over_charts() -> None:
    given = [
        SiteChart("one", f"layer.{i}", Bars("rank", {"$a_1$ < b": float(i + 1)}, y="rank"))
        for i in range(3)
    ]
    clouds = [SiteChart("one", f"layer.{i}", Points("fit", {"all": [(0, i)]})) for i in range(20)]
    text = page(values(), [*given, *clouds])
    assert len(fills(text, "bar")) == 3
    assert len(groups(text, "points")) == 6  # some, the first and the last among them
    assert "fit: layer.0, stage one" in text
    assert "fit: layer.19, stage one" in text
    assert text == page(values(), [*given, *clouds])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e300])
def test_values_that_are_no_numbers_leave_a_page(value: float) -> None:
    cloud = Points("fit", {"all": [(0.0, value), (value, 1.0)], "none": []})
    given = [SiteChart("one", "a", cloud), SiteChart("one", "a", Bars("rank", {"a": value}))]
    log = [{"loss": value, "step": step} for step in (1, 2)]
    text = page(values(training={"main": log}), given)
    assert len(images(text)) == 2
    assert "nan" not in "".join(re.findall(r' (?:d|points|style|x|y)="[^"]*"', text))


def test_names_are_escaped() -> None:
    bars = SiteChart('s"<i>', "p<i>", Bars('t"<i>', {'n"<i>': 1.0}, y="<i>"))
    metric = {"metric": "<i>", "data": "d<i>", "before": 1.0, "after": 1.0}
    sizes = {"bytes_before": {'"<i>': 1}, "bytes_after": {'"<i>': 1}}
    text = page(values(model="<b>", metrics=[metric], **sizes), [bars])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    assert '""' not in text.partition("</style>")[2]


def test_the_model_is_named_without_the_folders_of_this_machine(tmp_path: Path) -> None:
    text = page(values(model=str(tmp_path / "small")), [])
    assert "<h1>r: small</h1>" in text
    assert str(tmp_path) not in text
    assert "<h1>r: owner/name</h1>" in page(values(model="owner/name"), [])


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (90_868_000, "90.9 MB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.00 GB"),
        (15_700_000, "15.7 MB"),
    ],
)
def test_sizes_are_decimal(count: int, words: str) -> None:
    assert megabytes(count) == words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (91, 15.7, "5.8 times smaller"),
        (100, 80, "1.25 times smaller"),
        (80, 100, "1.25 times larger"),
        (1000, 999, "almost the same size"),
        (1, 1, "same size"),
        (0, 1, "new"),
        (1, 0, "removed"),
        (200_000, 100, "2,000 times smaller"),
    ],
)
def test_changes_of_size_in_words(before: int, after: int, words: str) -> None:
    assert times(before, after) == words


def test_what_stands_still_or_is_a_setting_has_no_curve() -> None:
    log = [{"loss": 1.0, "step": 1, "epoch": 0.1, "grad_norm": 1.0}, {"eval_loss": 2.0, "step": 1}]
    log += [{"loss": 0.5, "step": 2, "eval_runtime": 3.0}, {"train_runtime": 9.0, "step": 2}]
    assert curves(log) == {"loss": [(1, 1.0), (2, 0.5)]}


def test_names_on_a_front_do_not_overlap() -> None:
    dots = [Dot(f"way {i}", "recipe", 1000 + i, 80.0 + i / 1000, i < 2) for i in range(40)]
    dots += [Dot("far", "baseline", 90_000_000, 20.0, False)]
    text = front("t", dots, "bytes", "spearman")
    assert text.count('id="dot:') == len(dots)
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]*)</text>', text)
    assert {"way 0", "far"} <= {name for *_, name in names}
    assert len(names) < len(dots)


@pytest.mark.parametrize("method", ["l0", "movement"])
def test_statistics_leave_training_as_it_was(method: Any, data: Path) -> None:
    """Statistics are read from the masks in use: the generator and the weights stay."""
    options: dict[str, Any] = {"density": 0.5} if method == "movement" else {}
    pruning = MovementPruning(method=method, granularity="neuron", **options)
    weights = []
    for steps in (1, 50):
        train = trained(data)
        arguments = train.arguments | {"logging_steps": steps, "max_steps": 10}
        train = train.model_copy(update={"arguments": arguments})
        source = load_source(data / "bert")
        weights.append(plmcc.Pipeline([pruning], train)(source).get_parameter("classifier.weight"))
    assert torch.equal(*weights)


_DTYPES: dict[str, tuple[torch.dtype, Any, torch.dtype]] = {
    "float16": (torch.float16, None, torch.float16),
    "bfloat16": (torch.bfloat16, None, torch.bfloat16),
    "widened": (torch.float16, "float32", torch.float32),
    "narrowed": (torch.float32, "bfloat16", torch.bfloat16),
}


@pytest.mark.parametrize("name", list(_DTYPES))
def test_a_model_is_saved_in_its_dtype_or_in_that_asked_for(name: str, data: Path) -> None:
    """It is trained in float32: a step of 1e-5 would be lost in 16 bits."""
    had, asked, wanted = _DTYPES[name]
    config: Any = tiny("bert").config
    given: Any = BertForSequenceClassification(config)
    given.to(had)
    folder = data / name
    given.save_pretrained(folder)
    words().save_pretrained(folder)
    size = sum(component_bytes(given).values())
    train = Train(data=Data(train=str(data / "rows.tsv")), arguments={"max_steps": 1})
    drop = DropLayers(targets="encoder", keep=1)
    recipe = Recipe(passes=[drop], train=train, dtype=asked)
    result = plmcc.apply(recipe, folder, folder.with_name(f"{name}-out"))
    assert result.model.dtype is wanted
    assert plmcc.load(folder.with_name(f"{name}-out")).dtype is wanted
    trained = any("trained in float32" in note for note in result.source.notes)
    assert trained == (wanted is not torch.float32)
    assert any(f"saved in {str(wanted)[6:]}" in note for note in result.source.notes)
    assert sum(result.bytes_before.values()) == size
    made = plan(recipe, str(folder))
    assert made.before.bytes == size
    assert made.dtype == str(wanted)[6:]
    assert made.stages[0].after is not None
    assert made.stages[0].after.bytes == sum(result.bytes_after.values())
    assert (made.stages[0].after.bytes < size) == (name != "widened")


@pytest.mark.parametrize(
    "passes", ["low_rank: {rank: 2, weighting: none}", "binary_embedding: {bits: 8}"]
)
def test_what_passes_make_is_stored_in_the_dtype_asked_for(passes: str, tmp_path: Path) -> None:
    recipe = parse_recipe(f"plmcc: 1\ndtype: float16\npasses:\n  - {passes}\n", load_torch=True)
    tiny("t5").save_pretrained(tmp_path / "model")
    plmcc.apply(recipe, tmp_path / "model", tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    floats = {n: v.dtype for n, v in stored.items() if v.is_floating_point()}
    assert set(floats.values()) == {torch.float16, torch.float32}
    kept = {n for n, v in floats.items() if v is torch.float32}
    assert all(".wo." in n for n in kept), "T5 computes its last product in float32"
    made = plan(recipe, str(tmp_path / "model"))
    assert made.stages[0].after is not None
    assert made.stages[0].after.bytes == sum(v.nbytes for v in stored.values())


def test_a_tied_table_is_counted_where_it_is_looked_up() -> None:
    """XLM-R has its head before its table."""
    config = XLMRobertaConfig(
        vocab_size=99,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    sizes = component_bytes(XLMRobertaForMaskedLM(config))
    assert sizes["roberta.embeddings.word_embeddings"] == 99 * 8 * 4
