"""Transformations of optimum.fx as exact passes on layer graphs, checked on probe inputs.

They work on plain torch.fx graphs, one layer variant at a time. Attention modules are leaves of
these graphs, so what happens inside them is out of reach: MergeLinears joins the gate and up
projections of a gated feed-forward network, but not q, k and v.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optimum.fx.optimization as library
import torch
from optimum.fx.optimization import Transformation
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from plmcc.api import Call, Location, Program, Values, did_you_mean, error, listing
from plmcc.kit import first_line, observing, probe_inputs, relative_difference
from plmcc.kit.graphs import Layer, lookup, targets

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_WRAPPER = "layer"
_Arguments = Values


def apply_transformation(
    program: Program,
    transformation: Transformation,
    paths: Sequence[str] | None = None,
) -> list[str]:
    """Apply an optimum.fx transformation to layers; return the paths of those that it changed.

    Args:
        program: the model; on an error it is left as it was.
        transformation: any `optimum.fx.optimization.Transformation`, also a composition.
        paths: paths of layers; all layers if None.

    Raises:
        PlmccError: an unknown path, an output that differs, or a transformation that fails or
            changes no layer.
    """
    chosen = program.layer_paths() if paths is None else list(paths)
    for path in chosen:
        _check_path(program, path)
    layers = [one for path in chosen if isinstance(one := program.layer(path), Layer)]
    calls = _recorded_calls(program.model, layers, probe_inputs(program.model))
    undo: list[Any] = []
    changed: list[str] = []
    try:
        for layer in layers:
            rewritten = _transformed(layer, transformation)
            if rewritten is None:
                continue
            expected = [_outputs(layer.module, call) for call in calls[layer.path]]
            undo.append(rewritten.put_back())
            for call, before in zip(calls[layer.path], expected, strict=True):
                _compare(layer, transformation, call, before)
            changed.append(layer.path)
        if not changed:
            raise _no_change(program, transformation, chosen)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return changed


def transformation_named(name: str, location: Location | str = "transformation") -> Transformation:
    """Return optimum's transformation of that name.

    Raises:
        PlmccError: there is none; the message lists all.
    """
    members = {n: v for n, v in vars(library).items() if inspect.isclass(v)}
    known = {n: v for n, v in members.items() if not inspect.isabstract(v)}
    if name not in known:
        names = sorted(known)
        hint = did_you_mean(name, names)
        raise error(
            "PLM105",
            "unknown transformation",
            location,
            got=name,
            allowed=listing(names),
            hint=hint,
        )
    transformation: Transformation = known[name]()
    return transformation


def would(layer: Layer, transformation: Transformation) -> bool:
    """Say whether a transformation changes a layer, without changing it.

    Raises:
        PlmccError: the transformation fails on the layer's graphs.
    """
    return _transformed(layer, transformation) is not None


def rewrite_layer(layer: Layer, transformation: Transformation) -> None:
    """Transform a layer in place without running it, as loading does on the meta device.

    Raises:
        PlmccError: the transformation fails on the layer's graphs.
    """
    rewritten = _transformed(layer, transformation)
    if rewritten is not None:
        rewritten.put_back()


def _transformed(layer: Layer, transformation: Transformation) -> Layer | None:
    """Return the layer with all its variants transformed, or None if nothing changed."""
    rewritten = layer.copy()
    codes = [variant.graph_module.code for variant in rewritten.variants]
    try:
        variants = tuple(
            replace(v, graph_module=_run(v.graph_module, transformation))
            for v in rewritten.variants
        )
    except Exception as reason:  # a transformation is foreign code
        raise _failure(layer, transformation, first_line(reason)) from reason
    same = all(v.graph_module.code == code for v, code in zip(variants, codes, strict=True))
    return None if same else replace(rewritten, variants=variants)


def _run(graph_module: fx.GraphModule, transformation: Transformation) -> fx.GraphModule:
    """Transform one graph. MergeLinears fails on linears at the root, so they go one level down."""
    result = transformation(_moved(graph_module, "", f"{_WRAPPER}."))
    result.recompile()
    for module in result.modules():
        if isinstance(module, nn.Linear):
            # FuseBiasInLinear adds a column and leaves the declared shape as it was.
            module.out_features, module.in_features = module.weight.shape
    return _moved(result, f"{_WRAPPER}.", "")


def _moved(graph_module: fx.GraphModule, old: str, new: str) -> fx.GraphModule:
    """Return the graph with another prefix before all paths."""
    graph = graph_module.graph
    found: Values = {}
    for target in targets(graph):
        found[new + target.removeprefix(old)] = lookup(graph_module, target)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = new + str(node.target).removeprefix(old)
    result = fx.GraphModule(found, graph, type(graph_module).__name__)
    result.training = graph_module.training
    return result


def _recorded_calls(
    model: PreTrainedModel, layers: Sequence[Layer], inputs: dict[str, Tensor]
) -> dict[str, list[_Arguments]]:
    """Run the model once and return the arguments of each layer, one set for each variant."""
    first: dict[str, _Arguments] = {}
    paths = {layer.module: layer.path for layer in layers}

    def note(module: nn.Module, call: Call) -> None:
        first.setdefault(paths[module], call.arguments)

    options = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    with _evaluating(model), observing(paths, note):
        model(**inputs, **options)
    return {layer.path: _calls(layer, first.get(layer.path, {})) for layer in layers}


def _calls(layer: Layer, call: _Arguments) -> list[_Arguments]:
    assert call, f"the model never ran {layer.path}"
    kinds = dict.fromkeys((variant.absent, variant.flags) for variant in layer.variants)
    return [call | dict.fromkeys(absent) | dict(flags) for absent, flags in kinds]


def _outputs(module: nn.Module, call: _Arguments) -> list[Tensor]:
    with _evaluating(module):
        leaves = tree_leaves(module(**call))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compare(
    layer: Layer,
    transformation: Transformation,
    call: _Arguments,
    expected: list[Tensor],
) -> None:
    try:
        outputs = _outputs(layer.module, call)
    except Exception as reason:  # the transformed code may fail in any way
        raise _failure(layer, transformation, first_line(reason)) from reason
    shapes = [[tuple(t.shape) for t in side] for side in (expected, outputs)]
    if shapes[0] != shapes[1]:
        raise _failure(layer, transformation, f"output shapes {shapes[1]} instead of {shapes[0]}")
    for before, after in zip(expected, outputs, strict=True):
        difference, allowed = relative_difference(after, before), _TOLERANCES[before.dtype]
        if not difference <= allowed:
            words = f"outputs differ by {difference:.3g} of their scale"
            raise _failure(layer, transformation, words, f"{allowed:g} of the scale")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _check_path(program: Program, path: str) -> None:
    known = program.layer_paths()
    if path not in known:
        hint = did_you_mean(path, known)
        raise error(
            "PLM201", "the layer does not exist", got=path, allowed=listing(known), hint=hint
        )


def _failure(
    layer: Layer, transformation: Transformation, words: str, allowed: str = ""
) -> Exception:
    message = f"{_name(transformation)} changes what the layer computes"
    return error("PLM203", message, f"model: {layer.path}", got=words, allowed=allowed)


def _no_change(
    program: Program, transformation: Transformation, chosen: Sequence[str]
) -> Exception:
    return error(
        "PLM201",
        f"{_name(transformation)} changed none of {len(chosen)} layers",
        f"model: {type(program.model).__name__}",
        got=listing(list(chosen)),
        hint="it applies nowhere in these graphs; attention modules are not traced",
    )


def _name(transformation: Transformation) -> str:
    return type(transformation).__name__
