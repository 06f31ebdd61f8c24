"""The model is checked after each pass, and can be written as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plmcc
from plmcc.api import Hard, Site, Soft
from plmcc.catalog import registry as catalog
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of
from plmcc.passes.low_rank import LowRank
from plmcc.passes.quantized_linears import QuantizedLinears
from plmcc.pipeline.compiler import apply
from plmcc.recipe import Recipe
from support.tiny_models import tiny


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    plmcc.register(Faulty)
    yield
    catalog._REGISTERED.clear()
    for cached in (catalog.entries, catalog.options, catalog.load):
        cached.cache_clear()


class Copied(HardLinear):
    """The weight as it is."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.values = nn.Parameter(torch.zeros(out_features, in_features))

    def product(self, x: Tensor) -> Tensor:
        return x @ self.values.T

    def dense(self) -> Tensor:
        return self.values


class Faulty(plmcc.api.Pass):
    """Copies weights, and does something wrong."""

    targets: str | list[str] = "linears"
    wrong: str = ""

    def match(self, program: plmcc.api.Program):  # type: ignore[no-untyped-def]
        yield from matched_linears(program, self.targets, self.expect)

    def replace(self, site: Site, program: plmcc.api.Program) -> Soft:
        assert isinstance(site, plmcc.api.LinearSite)
        made = Copied(site.in_features, site.out_features, site.bias)
        made.values.data.copy_(weight_of(site))
        made.take_bias(site)
        FAULTS[self.wrong](made, program)
        if self.wrong == "no soft":
            return made  # type: ignore[return-value]
        return Wrong(made, self.wrong)


class Wrong(Trainable[Copied]):
    """May harden into something else."""

    def __init__(self, hard: Copied, wrong: str) -> None:
        super().__init__(hard)
        self.wrong = wrong

    def harden(self) -> Hard:
        if self.wrong == "no hard":
            return self.hard.merged()  # type: ignore[return-value]
        return self.hard.double() if self.wrong == "double in the end" else self.hard


def _untie(made: Copied, program: plmcc.api.Program) -> None:
    head = program.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


FAULTS: dict[str, Callable[[Copied, plmcc.api.Program], object]] = {
    "": lambda made, _: None,
    "no hard": lambda made, _: None,
    "no soft": lambda made, _: None,
    "double in the end": lambda made, _: None,
    "infinite": lambda made, _: made.values.data[0].fill_(float("inf")),
    "double": lambda made, _: made.double(),
    "untied": _untie,
}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("infinite", r"attention\.self\.query\.hard\.values.*values that are not finite"),
        ("double", r"failed in `forward`: RuntimeError: expected scalar type Float"),
        (
            "double in the end",
            r"query\.bias.*has the dtype torch\.float64, and the site had torch\.float32",
        ),
        ("untied", r"cls\.predictions\.decoder\.weight.*no longer tied"),
        ("no hard", r"`harden` of `faulty` returns a Linear, which is no `Hard`"),
        ("no soft", r"`replace` of `faulty` returns a Copied, which is no `Soft`.*kit\.Trainable"),
    ],
)
def test_the_pass_that_broke_something_is_named(wrong: str, said: str) -> None:
    good = LowRank(targets="*.value", weighting="none")
    faulty = Faulty(targets="*.query", wrong=wrong)
    model = tiny("bert")
    with pytest.raises(plmcc.PlmccError) as caught:
        plmcc.Pipeline([good, faulty])(model)
    text = str(caught.value).replace("\n", " ")
    assert "PLM112" in text
    assert "`faulty`" in text
    assert re.search(said, text), text


def test_a_good_pass_is_not_complained_of() -> None:
    plmcc.Pipeline([Faulty(targets="*.query")])(tiny("bert"))


def test_the_model_is_written_after_a_pass(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    recipe = Recipe(
        passes=[LowRank(targets="*.query", weighting="none"), QuantizedLinears(targets="*.key")]
    )
    lines: list[str] = []
    out = tmp_path / "out"
    given = {"dump_after": ["low_rank"], "log": lines.append}
    apply(recipe, tmp_path / "model", out, **given)  # type: ignore[arg-type]
    files = sorted(file.name for file in (tmp_path / "out.dumps").iterdir())
    assert files == ["main.low_rank.deployed.txt", "main.low_rank.trainable.txt"]
    assert f"  wrote {tmp_path / 'out.dumps' / files[1]}" in lines
    text = (tmp_path / "out.dumps" / files[0]).read_text()
    assert "bert.encoder.layer.0.attention.self.query: Linear -> LowRankLinear" in text
    assert "    layout: {'in_features': 32, 'out_features': 32, 'rank': 9, 'bias': True}" in text
    assert "query.left: float32 32 x 9, 1,152 bytes" in text
    assert "tied to bert.embeddings.word_embeddings.weight" in text
    assert "self.key.hard.levels" in text  # all passes are in place when one is hardened
    assert "self.key.weight" in (tmp_path / "out.dumps" / files[1]).read_text()


@pytest.mark.parametrize(
    ("name", "said"), [("low_ran", "did you mean `low_rank`?"), ("nothing", "a pass of the recipe")]
)
def test_an_unknown_pass_is_named_before_anything_is_done(
    name: str, said: str, tmp_path: Path
) -> None:
    recipe = Recipe(passes=[LowRank(weighting="none")])
    with pytest.raises(plmcc.PlmccError, match=rf"no pass `{name}`[\s\S]*{said}"):
        apply(recipe, tmp_path / "no model", tmp_path / "out", dump_after=[name])
    assert not list(tmp_path.iterdir())
