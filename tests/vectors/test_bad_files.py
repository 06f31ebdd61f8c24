"""Embedding tables that passes cannot take, by the command line: one paragraph that names the
place, for models and for files of word vectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmcc.cli import main
from plmcc.diagnostics import PlmccError
from plmcc.vectors.load import load
from support.tiny_models import tiny
from support.tokenizers import words

V, D = 99, 8
PLACE = {"model": "bert.embeddings.word_embeddings", "vectors.txt": "embeddings"}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a file of vectors."""
    tiny("bert").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    table = np.random.default_rng(0).standard_normal((V, D)).round(4)
    lines = [f"w{i} " + " ".join(map(str, row)) for i, row in enumerate(table.tolist())]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def applied(
    model: str, *passes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the exit code, and what was printed: an error, or all that was said."""
    text = "plmcc: 1\npasses:\n" + "".join(f"  - {entry}\n" for entry in passes)
    Path("recipe.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["plmcc", "apply", "recipe.yaml", model, "-o", "out"])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    if end.value.code:
        assert not Path("out").exists()
    return int(end.value.code or 0), captured.err if end.value.code else captured.out


def one_paragraph(text: str) -> str:
    """Return the error, after a look at its form; libraries may have printed before it."""
    start = text.rfind("\n", 0, text.index("error PLM")) + 1
    assert text.count("error PLM") == 1
    assert "\n\n" not in text[start:].strip()
    assert "Traceback" not in text
    return text[start:]


@pytest.mark.parametrize("model", PLACE)
@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            ["compositional_codes: {codewords: 128}"],
            "{location}: 128 codewords for a table",
        ),
        (["adaptive_codes: {lengths: [128], bits_per_word: 128}"], "{location}: a codebook of 128"),
        (["binary_embedding: {bits: 0}"], "`bits` is out of range"),
        (["binary_embedding: {bits: 4096}"], "{location}: 4096 bits a row"),
        (["distilled_factorization: {rank: 33}"], "{location}: rank 33 is above"),
        (
            ["compositional_codes: {codebooks: 2, codewords: 4}", "binary_embedding: {bits: 4}"],
            "`binary_embedding` and `compositional_codes` both rewrite {location}",
        ),
    ],
)
def test_options_that_do_not_fit(
    model: str,
    passes: list[str],
    message: str,
    given: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = applied(model, *passes, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert message.format(location=PLACE[model]) in one_paragraph(printed)
    assert "recipe.yaml:" in one_paragraph(printed)


PASSES = [
    "compositional_codes: {codebooks: 2, codewords: 4}",
    "binary_embedding: {bits: 4}",
    "distilled_factorization: {rank: 2}",
    "adaptive_codes: {lengths: [4], bits_per_word: 4}",
]


@pytest.mark.parametrize("entry", PASSES)
def test_a_model_with_nan(
    entry: str, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: Any = tiny("bert")
    broken.get_input_embeddings().weight.data[7, 3] = float("nan")
    broken.save_pretrained(given / "model")
    code, printed = applied("model", entry, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    error = one_paragraph(printed)
    assert "error PLM303: a tensor of the model has values that are not finite" in error
    assert f"{PLACE['model']}.weight: 1 of 3,168" in error


def test_vectors_with_nan(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (given / "vectors.txt").open("a") as stream:
        stream.write("\nx 1 2 3 nan 5 6 7 8")
    code, printed = applied("vectors.txt", PASSES[0], monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert one_paragraph(printed).startswith("vectors.txt:100: error PLM301: `x` has a value that")


def test_a_tokenizer_with_more_tokens_than_rows(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = words()
    larger.add_tokens(["more", "most"])
    larger.save_pretrained(given / "model")
    code, printed = applied("model", PASSES[0], monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    error = one_paragraph(printed)
    assert f"the table {PLACE['model']} has 99 rows" in error
    assert "the token `most` has the number 100" in error
    assert "resize_token_embeddings" in error


def test_a_table_with_rows_to_spare(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of T5, whose table is padded to a multiple of 128."""
    padded: Any = tiny("bert")
    padded.resize_token_embeddings(112)
    padded.save_pretrained(given / "model")
    code, printed = applied("model", PASSES[2], monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "written to out" in printed) == (0, True)


def test_more_words_than_rows(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("table.npy", np.ones((5, 4), np.float32))
    Path("table.words").write_text("a\nb\nc\n")
    code, printed = applied("table.npy", PASSES[0], monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    error = one_paragraph(printed)
    assert error.startswith("table.words: error PLM301: words and rows do not match")
    assert "3 words, 5 rows" in error


def test_a_rank_above_break_even_is_a_warning_with_the_number(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "distilled_factorization: {rank: 8, fit_steps: 2}"
    code, printed = applied("vectors.txt", entry, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    told = "rank 8 is above 7, the largest that makes the 99 x 8 table smaller"
    assert f"warning: embeddings: {told}" in printed
    assert json.loads(Path("out/report.json").read_text())["sites"][0]["warning"] == told
    assert len(load("out")) == V


def test_a_header_of_no_words_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "zero.vec"
    file.write_text("0 3\na 1 2 3\nb 3 2 1\n")
    with pytest.raises(PlmccError, match="the header announces 0 words, but there are 2"):
        load(file)
    assert len(load(file, broken="skip")) == 2


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    (tmp_path / "v.words").write_text("\ufeffa\nb\nc\n", encoding="utf-8")
    assert list(load(tmp_path / "v.npy").index_to_key) == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["a\t1\t2\t3\nnew york\t3\t2\t1\n", "a\t1 2 3\nnew york\t3 2 1\n"])
@pytest.mark.parametrize("header", ["", "2 3\n", "2\t3\n"])
def test_tabs_separate_too(text: str, header: str, tmp_path: Path) -> None:
    file = tmp_path / "tabs.txt"
    file.write_text(header + text)
    found = load(file)
    assert list(found.index_to_key) == ["a", "new york"]
    assert found["new york"].tolist() == [3, 2, 1]


def test_one_absurd_row_is_refused_or_left_out(given: Path) -> None:
    file = given / "vectors.txt"
    lines = file.read_text().splitlines()
    lines[4] = "w4 " + " ".join(["1e10"] * D)
    file.write_text("\n".join(lines))
    with pytest.raises(PlmccError, match=r"vectors.txt:5.*`w4` has a value of 1e\+10"):
        load(file)
    found = load(file, broken="skip")
    assert len(found) == V - 1
    assert "w4" not in found.index_to_key
    assert any("`w4` has a value of 1e+10" in note for note in found.notes)
