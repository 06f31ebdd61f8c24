"""Plans: what they say of sizes has to be what `apply` then makes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from plmcc import rewrite
from plmcc.api import Pass, Site, Soft
from plmcc.artifact import size
from plmcc.artifact.size import parameter_count
from plmcc.catalog import registry as catalog
from plmcc.diagnostics import PlmccError
from plmcc.ir.calibration import CalibrationData
from plmcc.ir.program import Program
from plmcc.models.source import load_source
from plmcc.planning.cost import activation_bytes, cost
from plmcc.planning.plan import plan
from plmcc.recipe.load import Data, Recipe, Train
from support.pass_options import options_of
from support.plans import outline_of, recipe_of, run, run_here
from support.tiny_models import GENERATIVE, NAMES, cache_of, tiny
from support.tokenizers import words

PASSES = [name for name in catalog.names() if catalog.load(name).prepare is Pass.prepare]
CODES = "passes: [compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}]\n"


# That t5_gated has a head of its own is in its weights, not in its config.
@pytest.mark.parametrize("model", [name for name in NAMES if name != "t5_gated"])
@pytest.mark.parametrize("name", PASSES)
def test_sizes_are_those_of_the_result(name: str, model: str, tmp_path: Path) -> None:
    chosen = catalog.load(name)(**options_of(name))
    original = tiny(model)
    recipe = Recipe(passes=[chosen], train=Train(data=Data(train="synthetic")))
    if model == "whisper":  # it does not read text, and cannot be trained
        if chosen.needs_training() or chosen.needs_data():
            pytest.skip("whisper cannot be trained")
        recipe = Recipe(passes=[chosen])
    made = plan(recipe, load_source(outline_of(model, tmp_path), meta=True))
    if made.problems:
        with pytest.raises(PlmccError) as caught:
            rewrite.match(original, [chosen])
        [expected], [found] = caught.value.diagnostics, made.problems
        assert (found.code, found.got) == (expected.code, expected.got)
        return
    matched = rewrite.match(original, [chosen], data=CalibrationData.random(original))
    [rule] = made.stages[0].rules
    assert [site.path for site in rule.sites] == [site.path for _, site in matched.sites]
    assert list(rule.misses) == [miss for _, miss in matched.misses]
    before = size.component_bytes(original)
    assert made.before.bytes == sum(before.values())
    rewrite.harden_all(original, rewrite.replace_all(original, matched))
    now, after = sum(size.component_bytes(original).values()), made.stages[0].after
    assert after is not None
    if any(site.about for site in rule.sites):
        assert now <= after.bytes
        assert all(re.match("at most|about", s.about) for s in rule.sites if s.about)
    else:
        assert now == after.bytes
        assert parameter_count(original) == after.parameters
    assert after.components.keys() <= made.before.components.keys() | {"other"}
    assert after.unknown == ""


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_a_run(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, length = tiny(name), 12
    counted = cost(tiny(name).to("meta"), length)  # type: ignore[arg-type]
    ids = torch.ones(1, length, dtype=torch.long)
    given: dict[str, torch.Tensor] = {"input_ids": ids}
    if name == "whisper":
        given = {"input_features": torch.zeros(1, 8, 48)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**given)
    assert counted.flops == counter.get_total_flops()
    if name not in GENERATIVE:
        assert counted.cache_bytes is None
        return
    cache = cache_of(output)
    sides = [cache]
    if model.config.is_encoder_decoder:
        sides = [cache.self_attention_cache, cache.cross_attention_cache]
    stored = sum(x.keys.nbytes + x.values.nbytes for side in sides for x in side.layers)
    assert counted.cache_bytes == stored // length


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_activations_are_what_autograd_keeps(name: str) -> None:
    model = tiny(name).train()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    ids = torch.randint(3, 90, (4, 16))
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(**given, labels=ids)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(storage.nbytes() for key, storage in kept.items() if key not in known)
    estimated, less = (
        activation_bytes(tiny(name).to("meta"), 4, 16, checkpointing)  # type: ignore[arg-type]
        for checkpointing in (False, True)
    )
    assert estimated == pytest.approx(measured, rel=0.15)
    assert less is not None
    assert less < measured


def test_stages_follow_one_another(tmp_path: Path) -> None:
    recipe = recipe_of(
        "stages:\n"
        "  - {name: shallow, passes: [drop_layers: {keep: 1, select: even}]}\n"
        "  - {name: merge, passes: [compressed_attention: {expect: 1}], train: {data: "
        "{train: synthetic}, distill: {logits: 1.0}, arguments: {optim: sgd}}}\n"
    )
    made = plan(recipe, str(outline_of("mbart", tmp_path)))
    assert made.problems == []
    first, second = (stage.after for stage in made.stages)
    assert first is not None
    assert second is not None
    assert made.before.bytes > first.bytes
    assert made.before.cache_bytes == 2 * (first.cache_bytes or 0)
    memory = made.stages[1].memory
    assert memory is not None
    assert memory.optimizer == 0
    assert memory.teacher == made.before.bytes
    assert memory.gradients == 4 * second.parameters
    verdicts = {target.name: (target.takes, target.reason) for target in made.targets}
    assert verdicts["ctranslate2"][0] == "no"
    assert "drop_layers" in verdicts["ctranslate2"][1]
    assert verdicts["transformers"][0] == "yes"


def test_trained_scores_are_in_the_memory(tmp_path: Path) -> None:
    def memory(options: str) -> Any:
        text = f"passes: [movement_pruning: {options}]\ntrain: {{data: {{train: synthetic}}}}\n"
        return plan(recipe_of(text), str(outline_of("bert", tmp_path))).stages[0].memory

    alone, with_scores = memory("{method: magnitude}"), memory("{method: movement}")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert with_scores.gradients - alone.gradients == 4 * weights
    assert with_scores.optimizer - alone.optimizer == 8 * weights


def test_half_precision_counts_as_such(tmp_path: Path) -> None:
    folder = outline_of("llama", tmp_path, torch.bfloat16)
    made = plan(recipe_of(CODES), str(folder))
    assert made.dtype == "bfloat16"
    [site] = made.stages[0].rules[0].sites
    assert site.bytes_after == 99 * 2 + 4 * 8 * 32 * 2


def test_an_artifact_is_planned_as_it_is(tmp_path: Path) -> None:
    from plmcc import Pipeline
    from plmcc.passes.compositional_codes import CompositionalCodes

    model = Pipeline([CompositionalCodes(codebooks=4, codewords=8, rounds=0)])(tiny("bert"))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    made = plan(recipe_of("passes: [movement_pruning: {method: magnitude}]\n"), str(tmp_path))
    assert made.problems == []
    assert made.before.bytes == sum(size.component_bytes(model).values())


class Rounded(Pass):
    """A pass that says nothing about plans, and looks at values when it replaces."""

    targets: str | list[str] = "input_embeddings"

    def match(self, program: Program) -> Any:
        yield from program.resolve(self.targets, "embedding", self.expect)

    def replace(self, site: Site, program: Program) -> Soft:
        raise ValueError(f"the largest value is {float(site.module.weight.max())}")  # type: ignore[operator]


def test_a_pass_that_looks_at_values_is_counted_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "name_of", lambda kind: "rounded")
    made = plan(Recipe(passes=[Rounded()]), str(outline_of("bert", tmp_path)))
    [site] = made.stages[0].rules[0].sites
    assert site.about.startswith("unknown")
    assert site.bytes == site.bytes_after


# --- problems


WRONG = {
    "nothing matches": ("passes: [compositional_codes: {targets: embedings}]\n", "PLM201"),
    "expect": ("passes: [movement_pruning: {expect: 5, method: magnitude}]\n", "PLM202"),
    "one place, two passes": (
        "passes: [compositional_codes: {codebooks: 2}, binary_embedding: {bits: 8}]\n",
        "PLM204",
    ),
    "nothing to train": ("passes: [movement_pruning]\n", "PLM303"),
    "not for this model": (
        "passes: [compressed_attention]\ncalibrate: {data: synthetic}\n",
        "PLM203",
    ),
    "lower": (CODES + "lower: {to: [compile, aoti]}\n", "PLM401"),
}


@pytest.mark.parametrize(("text", "code"), WRONG.values(), ids=WRONG)
def test_problems_have_a_place_and_an_exit_code(
    text: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = outline_of("gpt2" if "lower" in text else "bert", tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text("plmcc: 1\n" + text)
    done = run_here(capsys, "plan", file, folder)
    assert done.returncode == 1
    assert code in done.stderr
    assert f"{file}:" in done.stderr
    as_json = run_here(capsys, "plan", file, folder, "--format", "json")
    assert as_json.returncode == 1
    found = json.loads(as_json.stdout)
    assert not found["ok"]
    assert found["diagnostics"][0]["code"] == code


def test_all_rules_are_shown_at_once(tmp_path: Path) -> None:
    text = "passes:\n  - compositional_codes: {targets: a}\n  - movement_pruning: {targets: b}\n"
    made = plan(recipe_of(text), str(outline_of("bert", tmp_path)))
    assert sum(d.code == "PLM201" for d in made.problems) == 2


def test_the_text_names_sites_figures_and_targets(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("plmcc: 1\n" + CODES)
    done = run("plan", file, outline_of("bert", tmp_path))
    assert done.returncode == 0, done.stderr
    for words_ in ("becomes CodedEmbedding", "operations a token", "ctranslate2", "parameters"):
        assert words_ in done.stdout
    assert "compositional_codes: Without training afterwards" in done.stdout


def test_a_new_model_and_a_cut_vocabulary_are_planned(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(20)))
    recipe = recipe_of(
        "model: {config: {model_type: marian, d_model: 16, encoder_layers: 1, decoder_layers: 1,"
        " encoder_ffn_dim: 32, decoder_ffn_dim: 32},"
        f" tokenizer: {{train: {text}, vocab_size: 60}}}}\n"
        "task: translation\npasses: [compressed_attention]\n"
        "train: {data: {train: x, target: y}}\n"
    )
    made = plan(recipe)
    assert made.problems == []
    assert made.model == "a new marian"
    folder = outline_of("bert", tmp_path / "bert")
    words().save_pretrained(folder)
    cut = plan(recipe_of(f"passes: [prune_vocabulary: {{text: {text}}}]\n"), str(folder))
    assert cut.problems == []
    after = cut.stages[0].after
    assert after is not None
    assert cut.before.parameters > after.parameters
    assert "tokens_before 99" in cut.stages[0].rules[0].note


_LIMITED = """
import resource, sys, time
import torch, transformers  # their import is not ours, and the slower the older the disk
from plmcc.cli.app import main
start = time.process_time()
sys.argv = ["plmcc", "plan", sys.argv[1], sys.argv[2], "--format", "json"]
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{code} {peak} {time.process_time() - start}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "text",
    [
        "passes: [compositional_codes]\ntrain: {data: {train: synthetic}}\n",
        "passes: [movement_pruning: {granularity: structured, density: 0.5, method: magnitude}]\n",
    ],
    ids=["codes", "pruning"],
)
def test_a_model_of_70_billion_weights_is_planned_on_a_laptop(text: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "llama")
    (tmp_path / "recipe.yaml").write_text("plmcc: 1\n" + text)
    paths = [str(tmp_path / name) for name in ("recipe.yaml", "llama")]
    command = [sys.executable, "-c", _LIMITED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    code, peak, seconds = done.stderr.splitlines()[-1].split()
    assert code == "0", done.stderr
    made = json.loads(done.stdout)
    assert made["before"]["parameters"] == 70_553_706_496
    assert made["before"]["cache_bytes"] == 80 * 2 * 8 * 128 * 2
    # Two operations for each weight but those of the table, and attention's own.
    assert made["before"]["flops_per_token"] == pytest.approx(2 * 69.5e9, rel=0.02)
    assert int(peak) < 2e9
    assert float(seconds) < 20  # of a processor; the clock of a busy machine says nothing


def test_an_encoder_decoder_without_a_start_token_is_refused_where_data_is_used(
    tmp_path: Path,
) -> None:
    model = tiny("t5")
    del model.config.decoder_start_token_id  # as a config made by hand
    model.save_pretrained(tmp_path / "t5")
    text = "passes: [compressed_attention]\ncalibrate: {data: synthetic}\n"
    made = plan(recipe_of(text), str(tmp_path / "t5"))
    (problem,) = made.problems
    assert "no start token" in problem.message
    assert plan(
        recipe_of("passes: [low_rank: {rank: 4, weighting: none}]\n"), str(tmp_path / "t5")
    ).ok


def test_layers_that_cannot_follow_the_teacher_are_refused_by_the_plan(tmp_path: Path) -> None:
    folder = outline_of("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    text = (
        "passes: [drop_layers: {{targets: layers, select: even, keep: {}}}]\n"
        "train:\n  data: {{train: synthetic}}\n  distill: {{hidden_states: 1.0}}\n"
    )
    assert plan(recipe_of(text.format(2)), str(folder)).ok
    (problem,) = plan(recipe_of(text.format(3)), str(folder)).problems
    assert "3 student layers cannot be mapped evenly to 4 teacher layers" in problem.message
