"""Recipes on small random copies, and the contract itself: its checks have to be able to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from plmcc import rewrite
from plmcc.artifact import format as artifact
from plmcc.ir.program import Program
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.planning.plan import load_outline
from plmcc.testing import model_checks as contract
from plmcc.testing.dry_run import DryRun, dry_run
from plmcc.testing.reduced_copy import reduced_copy
from support.plans import outline_of, recipe_of, run
from support.tiny_models import tiny
from support.tokenizers import words

CODES = "passes: [compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}]\n"
TRAIN = "train: {data: {train: nowhere.txt}, arguments: {max_steps: 500}"


def folder_of(name: str, folder: Path, **sizes: Any) -> Path:
    """A config of a tiny model, its sizes changed, with a tokenizer and without weights."""
    outline_of(name, folder)
    config = AutoConfig.from_pretrained(folder)
    for key, value in sizes.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def verdicts(trial: DryRun) -> dict[str, str]:
    return {check.name: check.verdict for check in trial.checks}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bert", CODES + TRAIN + "}\nevaluate: [{metric: perplexity, data: nowhere.txt}]\n"),
        (
            "llama",
            "passes: [movement_pruning: {granularity: structured, density: 0.5, warmup: 100}]\n"
            + TRAIN
            + ", distill: {logits: 1.0}}\nlower: {to: [compile]}\n",
        ),
        (
            "mbart",
            "passes: [compressed_attention: {warm_start_steps: 2}]\n"
            "train: {data: {train: a.txt, target: b.txt}, tokens_per_batch: 4096, "
            "distill: {teacher: elsewhere, logits: 1.0}}\n",
        ),
    ],
    ids=lambda value: value if len(str(value)) < 9 else "",
)
def test_a_recipe_runs_on_a_reduced_copy(name: str, text: str, tmp_path: Path) -> None:
    trial = dry_run(recipe_of(text), str(folder_of(name, tmp_path)))
    assert trial.ok, [check for check in trial.checks if check.verdict == "fail"]
    found = verdicts(trial)
    assert list(found)[:2] == ["plan", "stages"]
    assert found.keys() >= contract.CHECKS.keys()
    assert ("modules_compile" in found) == ("lower" in text)
    assert any("random text" in note for note in trial.notes)


def test_its_own_rows_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "nowhere.txt").write_text(
        "\n".join(" ".join(f"w{i + j}" for j in range(20)) for i in range(40))
    )
    folder = folder_of("bert", tmp_path / "bert")
    trial = dry_run(recipe_of(CODES + TRAIN + "}\n"), str(folder), tmp_path)
    assert trial.ok
    assert trial.notes == []


def test_a_pass_that_fails_is_a_row_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(CompositionalCodes, "replace", broken)
    trial = dry_run(recipe_of(CODES), str(folder_of("bert", tmp_path)))
    assert not trial.ok
    assert verdicts(trial) == {"plan": "pass", "stages": "fail"}
    assert "ZeroDivisionError: no rows" in trial.checks[-1].reason


def test_the_command_fails_with_the_recipe(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path / "bert")
    file = tmp_path / "recipe.yaml"
    file.write_text("plmcc: 1\n" + CODES + TRAIN + "}\n")
    done = run("test", file, folder, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    file.write_text("plmcc: 1\npasses: [compositional_codes: {targets: embedings}]\n")
    failed = run("test", file, folder)
    assert failed.returncode == 1
    assert "PLM201" in failed.stdout
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    "text",
    [
        "passes: [drop_layers: {keep: 1, select: even}]\n",  # an ordinary checkpoint
        "passes: [structured_pruning: {multiple_of: 4}]\ncalibrate: {data: synthetic}\n",
        "passes: [movement_pruning: {method: magnitude, granularity: neuron, density: 0.5}]\n"
        "lower: {quantize: int8}\n",  # modules of one pass in layers of another
    ],
    ids=["layers", "neurons", "inside"],
)
def test_recipes_for_language_models_pass(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"plmcc: 1\ntask: text-generation\n{text}")
    done = run("test", recipe, folder_of("llama", tmp_path / "model"))
    assert done.returncode == 0, done.stdout


# --- reduced copies


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (CODES, 2),
        ("passes: [drop_layers: {targets: encoder, keep: 3}]\n", 4),
        ("passes: [movement_pruning: {method: magnitude, expect: 5}]\n", 5),
        (
            CODES
            + "train: {data: {train: synthetic}, distill: {hidden_states: 1.0, layers: {0: 2}}}\n",
            3,
        ),
    ],
    ids=["two", "keep", "expect", "map"],
)
def test_a_reduced_copy_is_as_deep_as_the_rules_need(text: str, depth: int, tmp_path: Path) -> None:
    recipe = recipe_of(text)
    source = load_outline(recipe, str(folder_of("bert", tmp_path, num_hidden_layers=5)))
    reduced, plan = reduced_copy(recipe, source)
    assert plan.problems == []
    assert len(Program(reduced.model).layer_paths()) == depth
    assert not any(p.is_meta for p in reduced.model.parameters())
    assert reduced.model.config.hidden_size == 32


def test_the_reduced_copy_of_a_large_model_is_small(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    recipe = recipe_of("passes: [compositional_codes]\n")
    reduced, plan = reduced_copy(recipe, load_outline(recipe, str(tmp_path)))
    assert plan.problems == []
    assert sum(p.numel() for p in reduced.model.parameters()) < 5e6
    config = reduced.model.config
    assert (config.num_hidden_layers, config.vocab_size) == (2, 32000)
    assert config.num_attention_heads // config.num_key_value_heads > 1


# --- the contract can fail


@pytest.fixture
def subject(tmp_path: Path) -> contract.Subject:
    model = tiny("gpt2")
    matched = rewrite.match(model, [CompositionalCodes(codebooks=4, codewords=8, rounds=0)])
    records = rewrite.harden_all(model, rewrite.replace_all(model, matched))
    artifact.adopt(model, records)
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 25).view(2, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return contract.Subject(model, tiny("gpt2"), tuple(records), tmp_path, inputs, inputs)


def change_a_weight(subject: contract.Subject) -> None:
    subject.model.get_submodule("transformer.wte").get_parameter("codebooks").data.mul_(1.5)


def freeze_the_table(subject: contract.Subject) -> None:
    subject.model.get_submodule("transformer.wte").requires_grad_(False)


def keep_a_copy(subject: contract.Subject) -> None:
    head = subject.model.get_submodule("lm_head")
    head.register_parameter("copy", torch.nn.Parameter(torch.ones(3)))


def confuse_the_cache(subject: contract.Subject) -> None:
    for module in subject.model.modules():
        if "layer_idx" in vars(module):
            module.layer_idx = 0  # type: ignore[assignment]  # both layers write to one place


def forget_the_layout(subject: contract.Subject) -> None:
    subject.records[0].layout["codewords"] = 16


DAMAGE = {
    "reloading_is_exact": change_a_weight,
    "tied_groups_learn_together": freeze_the_table,
    "tied_groups_are_one": keep_a_copy,
    "caches_agree": confuse_the_cache,
    "layouts_rebuild_modules": forget_the_layout,
}


@pytest.mark.parametrize(("check", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_a_check_fails(
    check: str, damage: Callable[[contract.Subject], None], subject: contract.Subject
) -> None:
    contract.CHECKS[check](subject)
    damage(subject)
    with pytest.raises((contract.Broken, RuntimeError)):
        contract.CHECKS[check](subject)
