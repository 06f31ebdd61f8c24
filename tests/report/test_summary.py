"""The table at the end of `plmcc apply`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import BertConfig, BertModel

from plmcc import Result
from plmcc.evaluation.latency import Latency
from plmcc.models.source import Source
from plmcc.report.documents import print_summary
from plmcc.report.words import number, signed
from support.reports import many

METRICS = [
    {"metric": "spearman", "data": f"a/{'long-' * 12}name.tsv", "before": 82.0, "after": 81.0},
    {"metric": "bleu", "data": "b.txt", "before": None, "after": 30.0},
]


def printed(width: int, folder: Path | None = None, **more: Any) -> str:
    config = BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    model = BertModel(config)
    written = io.StringIO()
    result = Result(model, Source.of(model), folder=folder, **many(), **more)
    print_summary(result, Console(file=written, width=width))
    return written.getvalue()


def test_a_recipe_that_quantizes_many_layers_has_one_row_for_them() -> None:
    lines = printed(100).splitlines()
    (row,) = [line for line in lines if "layers" in line]
    words = " ".join(row.split())
    assert words == "48 linear layers (rounding) 192 MB 48.0 MB 4.0 times smaller"
    assert sum("table (codes)" in line for line in lines) == 1
    assert sum("everything else" in line for line in lines) == 1


def test_nothing_is_cut_off_and_every_setting_is_quoted() -> None:
    rows = [Latency("eager", n, 32, 0.010, 0.005, 0.5, 0.02) for n in (1, 32)]
    rows.append(Latency("compiled", 32, 32, 0.010, 0.02, 2.0, 0.02))
    for width in (60, 80, 140):
        text = printed(width, metrics=METRICS, latency=rows)
        assert "…" not in text
        joined = "".join(text.split())
        for words in ("81.00", "-1.00", "bleuonb.txt", "30.00", "x0.50±0.02", "x2.00±0.02"):
            assert words in joined
        assert joined.count("x0.50±0.02") == 2
        assert "2.00timesasfastatbatch1,2.00timesasfastatbatch32" in joined
        assert "2.00timesasslowatbatch32" in joined


def test_the_end_is_what_to_try_next() -> None:
    text = printed(40, Path("out/a folder with a long name that is not cut"))
    lines = text.splitlines()
    assert '.from_pretrained("out/a folder with a long name that is not cut")' in text
    assert "written to out/a folder with a long name that is not cut; a fresh process" in text
    assert lines[-1].strip() == "plmcc verify 'out/a folder with a long name that is not cut'"
    assert printed(80).splitlines()[-1].endswith("; speed not measured.")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (82.031, "82.03"),
        (0.000151, "0.000151"),
        (1.7230713e10, "1.72e+10"),
    ],
)
def test_small_and_huge_metrics_keep_their_digits(value: float | None, text: str) -> None:
    assert number(value) == text
    if value is not None:
        assert signed(-value) == ("-" if value else "+") + text
