"""Other ways to prune the classifier of `pruning.py`, trained like it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import set_seed

import plmcc
from plmcc.models.source import Source, load_source
from plmcc.pipeline.datasets import training_data_of, with_teacher
from plmcc.training.loop import train

PICKLED = "model.pt"


def linears(model: Any) -> list[nn.Linear]:
    """The linears of the layers: what the pass prunes too."""
    return [m for m in model.base_model.encoder.modules() if isinstance(m, nn.Linear)]


def tuned(recipe: plmcc.Recipe, source: Source) -> None:
    """Train a model in place by the only stage of a recipe."""
    settings = recipe.steps()[0].train
    assert settings is not None
    set_seed(recipe.seed)
    encoded, _ = training_data_of(recipe.steps()[0], recipe, source, None)
    training_data = with_teacher(encoded, settings, None, source)
    train(source.model, settings, training_data, [])


def saved(source: Source, folder: Path) -> None:
    source.model.save_pretrained(folder)
    source.need_tokenizer("the benchmark").save_pretrained(folder)


def one_shot(recipe: plmcc.Recipe, dense: Path, folder: Path, density: float) -> float:
    """Zero the smallest weights of each matrix at once, train the others; return the density."""
    source = load_source(dense, "text-classification")
    found = linears(source.model)
    for linear in found:
        prune.l1_unstructured(linear, "weight", amount=1 - density)
    tuned(recipe, source)
    for linear in found:
        prune.remove(linear, "weight")
    saved(source, folder)
    kept = sum(int((linear.weight != 0).sum()) for linear in found)
    return round(kept / sum(linear.weight.numel() for linear in found), 4)


def torch_pruning(recipe: plmcc.Recipe, dense: Path, folder: Path, part: float) -> float:
    """Keep a part of the heads and neurons of each layer by Torch-Pruning's magnitude importance,
    and train them; return the part of the layers' weights that is left.

    The artifact is a pickled module: transformers has no configuration for it.
    """
    library = importlib.import_module("torch_pruning")
    source = load_source(dense, "text-classification")
    model: Any = source.model
    whole = sum(linear.weight.numel() for linear in linears(model))
    layers = model.base_model.encoder.layer
    heads = {
        projection: layer.attention.self.num_attention_heads
        for layer in layers
        for projection in (
            layer.attention.self.query,
            layer.attention.self.key,
            layer.attention.self.value,
        )
    }
    wanted = {*heads, *(layer.intermediate.dense for layer in layers)}
    # The width of the states is left alone: only heads and neurons go.
    kept = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Embedding))]
    pruner = library.pruner.BasePruner(
        model,
        {"input_ids": torch.ones(1, 8, dtype=torch.long)},
        importance=library.importance.GroupMagnitudeImportance(),
        pruning_ratio=1 - part,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=1 - part,
        ignored_layers=[m for m in kept if m not in wanted],
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    for layer in layers:
        attention = layer.attention.self
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
    tuned(recipe, source)
    for module in model.modules():  # transformers' hooks for hidden states cannot be pickled
        module._forward_hooks.clear()
    folder.mkdir(parents=True)
    torch.save(model, folder / PICKLED)
    source.need_tokenizer("the benchmark").save_pretrained(folder)
    return round(sum(linear.weight.numel() for linear in linears(model)) / whole, 4)
