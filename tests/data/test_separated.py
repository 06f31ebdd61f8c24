"""Files of separated values are read as they were meant, or refused with the line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from plmcc.data.classification import class_labels
from plmcc.data.rows import load_rows
from plmcc.diagnostics import PlmccError

ROWS = [("w1 w2", "0"), ("w3, w4", "1")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("zipped", [False, True])
def test_delimiters_and_encodings(
    encoding: str, delimiter: str, zipped: bool, tmp_path: Path
) -> None:
    text = 'text{0}label\nw1 wü{0}0\n"w3{0} w4"{0}1\n'.replace("{0}", delimiter)
    if delimiter == "\t":
        text = "text\tlabel\nw1 wü\t0\nw3, w4\t1\n"
    file = tmp_path / ("rows.csv.gz" if zipped else "rows.csv")
    data = text.encode(encoding)
    file.write_bytes(gzip.compress(data) if zipped else data)
    found = load_rows(str(file))
    second = "w3, w4" if delimiter == "\t" else f"w3{delimiter} w4"
    assert found.texts() == ["w1 wü", second]
    assert class_labels(found, 2) == [0, 1]


WRONG = {
    "a comma without quotes": (
        "rows.csv",
        b"text,label\nw1 w2,0\nw3, w4,1\n",
        r"rows.csv:3: error PLM301: this row has 3 fields, the header has 2(.|\n)*quotes",
    ),
    "a field too few": ("rows.csv", b"text,label\nw1\n", r"rows.csv:2: .* 1 field,"),
    "semicolons": (
        "rows.csv",
        b"text;label\nw1;w2;0\n",
        r"rows.csv:2: .* 3 fields, the header has 2(.|\n)*a semicolon",
    ),
    "a tab too many": ("rows.tsv", b"text\tlabel\nw\tw\t0\n", r"rows.tsv:2: .* 3 fields"),
    "Latin-1": (
        "rows.csv",
        "text,label\nw1,0\nw\u00fc,1\n".encode("latin-1"),
        r"rows.csv:3: error PLM301: this line is not text in UTF-8(.|\n)*iconv",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    name, data, said = WRONG[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlmccError, match=said):
        load_rows(str(tmp_path / name))


def test_a_line_is_not_named_where_rows_are_no_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    for text in ("text,label\nw1,good\n\nw2,Good\n", 'text,label\n"w1\nw3",good\nw2,Good\n'):
        file.write_text(text)
        with pytest.raises(PlmccError, match="like that of row 2"):
            class_labels(load_rows(str(file)), 2, {"bad": 0, "good": 1})


def test_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nw1,good\n,bad\n,bad\nw2,good\nw3,Good\n")
    rows = load_rows(str(file))
    assert rows.skipped == 2
    with pytest.raises(PlmccError, match="like that of line 6") as caught:
        class_labels(rows, 2, {"bad": 0, "good": 1})
    [found] = caught.value.diagnostics
    assert (found.got, found.allowed) == ("'Good'", "whole numbers 0 to 1, or bad, good")
    assert found.hint == "did you mean `good`?"
