"""Diagnostics: how an error looks, and what a program gets."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import plmcc
from plmcc.diagnostics import (
    CODES,
    Diagnostic,
    Location,
    PlmccError,
    did_you_mean,
    error,
    listing,
    nearest,
)


def test_a_diagnostic_as_a_compiler_prints_it() -> None:
    location = Location("recipe.yaml", 3, 5, 8, "    codeboks: 8")
    found = Diagnostic(
        "PLM101", "unknown key `codeboks`", location, "8", "a, b", "did you mean `a`?"
    )
    assert found.render() == (
        "recipe.yaml:3:5: error PLM101: unknown key `codeboks`\n"
        "  3 |     codeboks: 8\n"
        "    |     ^^^^^^^^\n"
        "  got: 8\n"
        "  allowed: a, b\n"
        "  hint: did you mean `a`?"
    )


def test_a_place_in_words() -> None:
    found = error("PLM301", "a row without text", "data.csv:17", hint="remove it")
    assert found.render() == "data.csv:17: error PLM301: a row without text\n  hint: remove it"
    assert error("PLM301", "lost").render() == "error PLM301: lost"


@pytest.mark.parametrize(
    ("excerpt", "column", "width", "shown", "caret"),
    [
        ("\tab: c", 5, 1, " ab: c", "    ^"),
        ("日本: x", 5, 1, "日本: x", "      ^"),
        ("日本: x", 1, 2, "日本: x", "^^^^"),
        ("e\u0301: x", 5, 1, "e\u0301: x", "   ^"),
        ("ab", 3, 1, "ab", "  ^"),
    ],
)
def test_the_caret_stands_below_the_token(
    excerpt: str, column: int, width: int, shown: str, caret: str
) -> None:
    lines = Diagnostic("PLM010", "x", Location("f", 7, column, width, excerpt)).render().split("\n")
    assert lines[1:] == [f"  7 | {shown}", f"    | {caret}"]


def test_a_long_line_is_cut_around_the_token() -> None:
    location = Location("f", 1, 501, 3, "x" * 500 + "abc" + "y" * 500)
    _, line, caret = Diagnostic("PLM010", "x", location).render().split("\n")
    assert len(line) < 120
    assert line[caret.index("^") :].startswith("abc")
    assert caret.count("^") == 3


def test_control_characters_do_not_reach_the_terminal() -> None:
    text = error("PLM001", "no \x1b[31mfile", "a\nb", got="\x07").render()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a\\x0ab" in text


def test_json() -> None:
    found = Diagnostic("PLM101", "m", Location("f", 2, 3, 1, "abc"), "g", "a", "c").to_json()
    assert found == {
        "code": "PLM101",
        "message": "m",
        "location": "f:2:3",
        "got": "g",
        "allowed": "a",
        "hint": "c",
        "file": "f",
        "line": 2,
        "column": 3,
        "excerpt": "abc",
    }
    assert "line" not in error("PLM301", "m", "data.csv:1").to_json()[0]


def test_an_error_carries_many_and_survives_a_process_boundary() -> None:
    found = PlmccError(Diagnostic("PLM101", "a"), Diagnostic("PLM102", "b"))
    assert isinstance(found, ValueError)
    assert str(found).count("error PLM") == 2
    again = pickle.loads(pickle.dumps(found))
    assert again.diagnostics == found.diagnostics


@pytest.mark.parametrize(
    ("name", "expected"),
    [("codeboks", "codebooks"), ("Code-Words", "codewords"), ("zzz", None), (7, None), ("", None)],
)
def test_nearest(name: object, expected: str | None) -> None:
    assert nearest(name, ["codebooks", "codewords"]) == expected


def test_words_for_names() -> None:
    assert did_you_mean("a_c", ["a_b_c"]) == "did you mean `a_b_c`?"
    assert did_you_mean("x", ["abc"], "see the list") == "see the list"
    assert listing(["a", "b", "c"], 2) == "a, b, ... (1 more)"


def test_a_code_needs_a_meaning() -> None:
    with pytest.raises(AssertionError, match="PLM999"):
        Diagnostic("PLM999", "x")


def test_every_code_in_the_sources_has_a_meaning_and_its_block() -> None:
    sources = list(Path(plmcc.__file__).parent.rglob("*.py"))
    used = {code for file in sources for code in re.findall(r"PLM\d+", file.read_text("utf-8"))}
    assert len(sources) > 100
    assert used <= set(CODES)
    assert all(re.fullmatch(r"PLM[0-5]\d\d", code) for code in CODES)
    assert len(set(CODES.values())) == len(CODES)
