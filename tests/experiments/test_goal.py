"""Targets of a search: what is read, and for every mistake its column and cure."""

from __future__ import annotations

import pytest

from plmcc.diagnostics import Location, PlmccError
from plmcc.experiments.goal import Limit, parse_goal


def test_targets_are_limits_with_units() -> None:
    goal = parse_goal(" size <= 25mb, drop<=-.5,quality>=8e1, latency<=0.8x,parameters<=10M")
    assert goal.limits == (
        Limit("size", 25e6, False, False),
        Limit("drop", -0.5, False, False),
        Limit("quality", 80, False, True),
        Limit("latency", 0.8, True, False),
        Limit("parameters", 10e6, False, False),
    )
    assert goal.judges
    assert not parse_goal("size<=2GiB,latency<=5ms").judges
    assert parse_goal("size<=2GiB").limits[0].value == 2 * 2**30
    assert parse_goal("latency<=5ms").limits[0].value == 0.005


def test_a_limit_says_by_how_much_it_is_exceeded() -> None:
    goal = parse_goal("size<=0.5x,quality>=80,latency<=0.5x")
    metrics = {"size": 60.0, "quality": 76.0, "latency": 3.0, "original_latency": 8.0}
    original = {"size": 100.0, "quality": 90.0}
    excess = goal.excess(metrics, original)
    assert excess == {"size": pytest.approx(0.2), "quality": pytest.approx(0.05), "latency": -0.25}
    assert goal.excess({"size": 50.0}, original) == {"size": 0.0}
    assert goal.excess({"quality": float("nan")}, original) == {"quality": float("inf")}


def test_a_drop_may_be_a_part_of_the_quality_and_speed_is_at_least() -> None:
    goal = parse_goal("drop<=5%,speed>=2x")
    assert goal.limits == (Limit("drop", 0.05, True, False), Limit("speed", 2, False, True))
    known = {"quality": 40.0, "drop": 0.0}
    assert goal.excess({"drop": 3.0, "speed": 1.5}, known) == {
        "drop": pytest.approx(0.5),
        "speed": pytest.approx(0.25),
    }
    assert goal.excess({"drop": 2.0, "speed": 2.0}, known) == {"drop": 0, "speed": 0}
    assert goal.judges
    with pytest.raises(PlmccError, match="needs `>=`"):
        parse_goal("speed<=2")


def test_quality_goes_the_way_of_the_metric() -> None:
    assert not parse_goal("quality<=20", lower_is_better=True).limits[0].at_least
    with pytest.raises(PlmccError, match="needs `>=`"):
        parse_goal("quality<=20")
    with pytest.raises(PlmccError, match="needs `<=`"):
        parse_goal("quality>=20", lower_is_better=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("§siz<=25MB", "did you mean `size`?"),
        ("size§<25MB", "size<="),
        ("size§≤25MB", "size<="),
        ("drop<=1, size§>=25MB", "size<="),
        ("size<=§MB", "the number is missing"),
        ("size<=§.MB", "the number is missing"),
        ("drop<=§1e400", "the number is missing"),
        ("size<=25§", "B, kB, MB"),
        ("size<=25§furlongs", "B, kB, MB"),
        ("drop<=1§x", "no unit"),
        ("size<=§-1MB", "more than 0"),
        ("size<=§2x", "at most 1x"),
        ("drop<=1, §drop<=2", "keep one"),
        ("drop<=1,§", "size<=25MB"),
        ("§", "size<=25MB"),
        ("§size<=25 M B", "size<=25MB"),
    ],
)
def test_mistakes_have_a_column(text: str, words: str) -> None:
    with pytest.raises(PlmccError) as caught:
        parse_goal(text.replace("§", ""))
    [found] = caught.value.diagnostics
    assert isinstance(found.location, Location)
    assert (found.code, found.location.column) == ("PLM502", text.index("§") + 1)
    assert words in found.render()
