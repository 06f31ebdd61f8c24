"""LoRA: only adapters and what passes put in are trained; the result has the original's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import plmcc
from plmcc import rewrite
from plmcc.data.collate import collator
from plmcc.diagnostics import PlmccError
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.passes.movement_pruning import MovementPruning
from plmcc.planning.memory import Extra, training_memory
from plmcc.recipe import Data, Train, parse_recipe
from plmcc.recipe.sections import Adapters, Lora
from plmcc.training.adapters import adapted, count
from plmcc.training.loop import TrainingData, train
from support.tiny_models import tiny
from support.tokenizers import words

CODES = {"targets": "input_embeddings", "codebooks": 2, "codewords": 4, "rounds": 2}


def settings(steps: int = 10, **options: Any) -> Train:
    arguments: Any = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    trainable = Adapters(lora=Lora(**{"r": 2} | options))
    arguments |= {"logging_steps": 1, "lr_scheduler_type": "constant"}
    return Train(data=Data(train="synthetic"), trainable=trainable, arguments=arguments)


def rows(task: str) -> TrainingData:
    texts = [" ".join(f"w{(i * j) % 90}" for j in range(1, 12)) for i in range(32)]
    columns = words()(texts)
    return TrainingData(task, Dataset.from_dict(dict(columns)), collator(task, words()))


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_change_by_low_rank_and_all_else_stays(name: str) -> None:
    model: Any = tiny(name)
    before = state(model)
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {path: type(part) for path, part in model.named_modules()}
    log = train(model, settings(), rows("text-generation"), [])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {path: type(part) for path, part in model.named_modules()} == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
    assert not any("peft" in key for part in model.modules() for key in vars(part))
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    wanted = adapted(model, Lora())
    assert changed == {f"{path}.weight" for path in wanted}
    for weight in changed:
        moved = model.state_dict()[weight] - before[weight]
        singular = torch.linalg.svdvals(moved.double())
        assert singular[2] < 1e-5 * singular[0]


def test_what_passes_put_in_is_trained_beside_them() -> None:
    model: Any = tiny("bert")
    done = rewrite.replace_all(model, rewrite.match(model, [CompositionalCodes(**CODES)]))
    before = state(model)
    train(model, settings(), rows("fill-mask"), done)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert "bert.embeddings.word_embeddings.hard.codebooks" in changed
    assert "bert.embeddings.position_embeddings.weight" not in changed
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed


def test_what_a_pass_masks_gets_none() -> None:
    model: Any = tiny("bert")
    chosen = MovementPruning(method="movement", density=0.5, targets="*.0")
    rewrite.replace_all(model, rewrite.match(model, [chosen]))
    found = adapted(model, Lora())
    assert not any(path.startswith("bert.encoder.layer.0.") for path in found)
    assert "bert.encoder.layer.1.attention.self.query" in found


def test_a_failed_training_leaves_the_weights() -> None:
    model: Any = tiny("llama")
    before = state(model)

    def broken(_: list[Any]) -> dict[str, Tensor]:
        raise ValueError("no batch")

    data = TrainingData("text-generation", rows("text-generation").train, broken)
    with pytest.raises(PlmccError):
        train(model, settings(), data, [])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_targets_that_hold_no_linear_layer_are_refused() -> None:
    model: Any = tiny("llama")
    with pytest.raises(PlmccError) as caught:
        train(model, settings(targets="*.norm"), rows("text-generation"), [])
    assert caught.value.diagnostics[0].location == "train.trainable"


def test_targets_are_checked_before_anything_is_rewritten(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("w1 w2 w3\n" * 9)
    text = (
        "plmcc: 1\ntask: text-generation\npasses: [drop_layers: {keep: 1, select: even}]\n"
        f"train:\n  data: {{train: {tmp_path / 'a.txt'}}}\n"
        "  trainable: {lora: {targets: '*.qproj'}}\n"
    )
    said: list[str] = []
    with pytest.raises(PlmccError, match="matches nothing of the kind linear"):
        plmcc.apply(parse_recipe(text, load_torch=True), tmp_path / "model", log=said.append)
    assert not any("rewriting" in line for line in said)


def test_the_recipe_and_the_plan_know_adapters(tmp_path: Path) -> None:
    text = (
        "plmcc: 1\ntask: text-generation\n"
        "train:\n  data: {train: a.txt}\n  trainable: {lora: {r: 4, targets: '*.q_proj'}}\n"
    )
    recipe = parse_recipe(text)
    assert recipe.train is not None
    assert recipe.train.lora() == Lora(r=4, targets="*.q_proj")
    assert parse_recipe(recipe.to_yaml()) == recipe
    model: Any = tiny("llama")
    model = model.to("meta")
    stage = recipe.steps()[0]
    found = training_memory(model, stage, recipe.train, Extra(), 0)
    assert count(model, Lora(r=4, targets="*.q_proj")) == 2 * 4 * (32 + 32)
    assert found.gradients == 4 * 2 * 4 * (32 + 32)
    with pytest.raises(PlmccError, match="rank"):
        parse_recipe(text.replace("r: 4", "rank: 4"))
    with pytest.raises(PlmccError, match="or a mapping"):
        parse_recipe(text.replace("{lora: {r: 4, targets: '*.q_proj'}}", "lora"))
