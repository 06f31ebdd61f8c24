"""The page of a report: tables, and pictures of a real run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tiny import tiny
from transformers import (
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from words import words

import plmcc
from plmcc import Data, Recipe, Result, Train
from plmcc.api import Bars, Points
from plmcc.page import page
from plmcc.passes.drop_layers import DropLayers
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.pictures import Pictured, curves
from plmcc.plan import plan
from plmcc.size import component_bytes
from plmcc.source import load_source

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
SVG = "{http://www.w3.org/2000/svg}"
LAYERS, STEPS = 2, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    config: Any = tiny("bert").config
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    words().save_pretrained(folder / "bert")
    lines = [f"w{i} w{i + 1}\t{i % 2}" for i in range(64)]
    (folder / "rows.tsv").write_text("text\tlabel\n" + "\n".join(lines))
    return folder


def trained(data: Path) -> Train:
    arguments: dict[str, Any] = {"max_steps": STEPS, "logging_steps": 3, "learning_rate": 1e-3}
    return Train(data=Data(train=str(data / "rows.tsv")), arguments=arguments)


@pytest.fixture(scope="module")
def result(data: Path) -> Result:
    pruning = MovementPruning(granularity="structured", density=0.5)
    recipe = Recipe(name="pruned", passes=[pruning], train=trained(data))
    return plmcc.apply(recipe, data / "bert", data / "out")


@pytest.fixture(scope="module")
def text(result: Result) -> str:
    assert result.folder is not None
    return (result.folder / "report.html").read_text(encoding="utf-8")


def images(text: str) -> list[ElementTree.Element]:
    """The pictures of a page, parsed."""
    parts = text.split("<svg")[1:]
    return [
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>") for part in parts
    ]


def ids(text: str, kind: str) -> list[str]:
    """What is drawn of a kind, without the number of its picture."""
    named = [node.get("id", "") for image in images(text) for node in image.iter()]
    found = [name.split(":") for name in named if name.startswith(f"{kind}:")]
    return [":".join([first, *rest]) for first, _, *rest in found]


def test_there_is_a_bar_for_each_layer_and_for_each_matrix(result: Result, text: str) -> None:
    sites = [site["paths"][0] for site in result.sites]
    assert len(sites) == LAYERS
    bars = Counter(name.rpartition(":")[0] for name in ids(text, "bar"))
    for what in ("heads", "neurons"):
        for series in ("before", "kept"):
            assert bars.pop(f"bar:{what}-by-layer:{series}") == LAYERS
    assert {name.split(":")[1] for name in bars} == {"density-of-matrices"}
    assert len(bars) == 6  # query, key, value, output, and two of the feed-forward network
    assert set(bars.values()) == {LAYERS}
    assert {name.rpartition(":")[2] for name in ids(text, "bar")} == set(sites)


def test_bars_are_as_high_as_what_is_left(result: Result, text: str) -> None:
    def height(node: ElementTree.Element) -> float:
        path = node.find(f"{SVG}path")
        assert path is not None
        numbers = [float(n) for n in path.get("d", "").split() if n not in "MLz"]
        return max(numbers[1::2]) - min(numbers[1::2])

    found = {}
    for image in images(text):
        for node in image.iter():
            name = node.get("id", "").split(":")
            if name[0] == "bar" and name[2] == "neurons-by-layer":
                found[name[3], name[4]] = height(node)
    for site in result.sites:
        kept, before = (found[series, site["paths"][0]] for series in ("kept", "before"))
        figures = site["figures"]
        assert figures["neurons_kept"] < figures["neurons"]
        assert kept / before == pytest.approx(figures["neurons_kept"] / figures["neurons"], 0.01)


def test_scores_and_weights_are_points(result: Result, text: str) -> None:
    clouds = [o.picture for o in result.pictures if isinstance(o.picture, Points)]
    assert len(clouds) == 2 * LAYERS  # a matrix of attention and one of the network, of each layer
    drawn = 0
    for image in images(text):
        for group in image.iter(f"{SVG}g"):
            if group.get("id", "").startswith("points:"):
                drawn += len(list(group.iter(f"{SVG}use")))
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
    assert sorted(ids(text, "line")) == ["line:loss", "line:sparsity"]
    for image in images(text):
        for group in image.iter(f"{SVG}g"):
            if group.get("id", "").startswith("line:"):
                assert len(list(group.iter(f"{SVG}use"))) == len(entries)


def test_the_page_stands_alone(result: Result, text: str) -> None:
    names = [node.get("id") for image in images(text) for node in image.iter() if node.get("id")]
    assert len(names) == len(set(names))
    for image in images(text):
        for node in image.iter():
            for key, value in node.attrib.items():
                assert not key.endswith(("href", "src")) or value[1:] in names
    assert "<script" not in text
    assert "<link" not in text
    assert len(text) < 600_000
    report = json.loads((result.folder / "report.json").read_text())  # type: ignore[operator]
    for name, size in report["bytes_after"].items():
        assert f"<td>{name}</td>" in text
        assert f"<td>{size}</td>" in text
    assert f"{report['sites'][0]['figures']['neurons_kept']:.0f}" in text


def test_a_run_without_passes_has_its_curve(data: Path) -> None:
    done = plmcc.apply(Recipe(train=trained(data)), data / "bert", data / "plain")
    assert done.pictures == []
    assert ids((data / "plain/report.html").read_text(), "line") == ["line:loss"]


def test_a_run_without_training_has_the_bars_of_its_bytes_alone(data: Path) -> None:
    recipe = Recipe(passes=[DropLayers(targets="encoder", keep=1)])
    plmcc.apply(recipe, data / "bert", data / "shallow")
    text = (data / "shallow/report.html").read_text()
    assert "<h2>Bytes</h2>" in text
    assert len(images(text)) == 1
    done = json.loads((data / "shallow/report.json").read_text())
    names = {**done["bytes_before"], **done["bytes_after"]}
    for what in ("original", "compressed"):
        drawn = [name for image in images(text) for node in image.iter()
                 if (name := node.get("id", "")).startswith(f"bytes:{what}:")]  # fmt: skip
        assert len(drawn) == len(names)


def test_errors_latency_and_quality_are_drawn_where_there_are_any() -> None:
    site = {"pass": "codes", "paths": ["table"], "figures": {"relative_error": 0.5}}
    other = {"pass": "other", "paths": ["layer"], "figures": {}}
    row = {"mode": "eager", "batch": 1, "length": 32, "original": 1.0, "compressed": 2.0,
           "ratio": 2.0, "spread": 0.1}  # fmt: skip
    metrics = [{"metric": "spearman", "data": "a", "before": 82.0, "after": 81.0},
               {"metric": "bleu", "data": "b", "before": None, "after": 30.0}]  # fmt: skip
    sizes = {"bytes_before": {"table": 2000}, "bytes_after": {"table": 1000}}
    text = page(values(sites=[site, other], latency=[row], metrics=metrics, **sizes), [])
    assert ids(text, "error") == ["error:table"]
    assert ids(text, "latency") == ["latency:eager,-1-x-32"]
    assert ids(text, "quality") == ["quality:spearman"]


def values(**more: Any) -> dict[str, Any]:
    keys = ("bytes_before", "bytes_after", "training")
    empty: dict[str, Any] = {key: {} for key in keys}
    empty |= {key: [] for key in ("metrics", "latency", "sites", "misses")}
    return {"recipe": "r", "model": "m"} | empty | more


def test_without_matplotlib_the_tables_stay_and_one_line_says_how(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert result.folder is not None
    report = json.loads((result.folder / "report.json").read_text())
    text = page(report, result.pictures)
    assert "<svg" not in text
    assert "pip install &#x27;plmcc[report]&#x27;" in text
    assert "<h2>Bytes</h2>" in text
    assert "<td>loss, stage main</td>" in text
    assert "matplotlib" not in page(values(), [])


def test_any_pass_may_hand_over_pictures() -> None:
    given = [
        Pictured("one", f"layer.{i}", Bars("rank", {"$a_1$ < b": float(i + 1)}, y="rank"))
        for i in range(3)
    ]
    clouds = [Pictured("one", f"layer.{i}", Points("fit", {"all": [(0, i)]})) for i in range(20)]
    text = page(values(), [*given, *clouds])
    assert len(ids(text, "bar")) == 3
    assert len(ids(text, "points")) == 6  # some, the first and the last among them
    assert "layer.0, stage one" in text
    assert "layer.19, stage one" in text
    assert text == page(values(), [*given, *clouds])


def test_names_are_escaped() -> None:
    text = page(values(model="<b>", bytes_before={"<i>": 1}), [])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text


def test_figures_that_stand_still_or_are_settings_have_no_curve() -> None:
    log = [{"loss": 1.0, "step": 1, "epoch": 0.1, "grad_norm": 1.0}, {"eval_loss": 2.0, "step": 1}]
    log += [{"loss": 0.5, "step": 2, "eval_runtime": 3.0}, {"train_runtime": 9.0, "step": 2}]
    assert curves(log) == {"loss": [(1, 1.0), (2, 0.5)]}


@pytest.mark.parametrize("method", ["l0", "movement"])
def test_figures_leave_training_as_it_was(method: Any, data: Path) -> None:
    """Figures are read from the masks in use: the generator and the weights stay."""
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


def test_a_float16_model_is_counted_as_it_was_given(data: Path) -> None:
    """It is trained, and saved, in float32: a result may well be larger."""
    config: Any = tiny("bert").config
    half = BertForSequenceClassification(config).half()
    half.save_pretrained(data / "half")
    words().save_pretrained(data / "half")
    given = sum(component_bytes(half).values())
    train = Train(data=Data(train=str(data / "rows.tsv")), arguments={"max_steps": 1})
    recipe = Recipe(passes=[DropLayers(targets="encoder", keep=1)], train=train)
    result = plmcc.apply(recipe, data / "half")
    assert result.model.dtype is torch.float32
    assert sum(result.bytes_before.values()) == given
    made = plan(recipe, str(data / "half"))
    assert made.before.bytes == given
    assert made.stages[0].after is not None
    assert made.stages[0].after.bytes == sum(result.bytes_after.values()) > given


def test_a_tied_table_is_counted_where_it_is_looked_up() -> None:
    """XLM-R has its head before its table."""
    config = XLMRobertaConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1,
                              num_attention_heads=2, intermediate_size=8)  # fmt: skip
    sizes = component_bytes(XLMRobertaForMaskedLM(config))
    assert sizes["roberta.embeddings.word_embeddings"] == 99 * 8 * 4
