"""Layers as torch.fx graphs, and graphs put back into the live model.

A layer whose code branches on `x is None` or on the dtype has several *variants*: one exact graph
for each kind of call. Putting back replaces the class of the module, never the module: a dynamic
subclass of the layer's own class and name whose `forward` is the generated code. Parameters keep
their names, hooks and checkpointing stay.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from plmcc.diagnostics import PlmccError, error
from plmcc.ir.site import Miss
from plmcc.ir.tracer import signature
from plmcc.ir.variants import Variant, find_variants, graph_module_for, lookup, targets
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

_Forward = Callable[..., object]
_MARK = "_plmcc_layer"
_STAYS = "_plmcc_stays_layer"


@dataclass(frozen=True)
class Layer:
    """A repeated block of a model with its graphs.

    `branches` names the optional arguments on whose absence the code depends. The graph modules
    share their leaf modules with the live layer; `leaves` are the paths that they name. `refusals`
    says why calls that no variant covers cannot be made.

    The graph runs the code of modules in the layer that are not leaves, not the modules: a forward
    hook on one of these goes on firing if it was there, or transformers records its outputs, when
    the layer was traced; one that is registered later does not fire.
    """

    path: str
    module: nn.Module = field(repr=False)
    variants: tuple[Variant, ...]
    branches: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    leaves: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph of the fullest call: all optional arguments given, the model's dtype."""
        return self.variants[0].graph_module

    def copy(self) -> Layer:
        """Return the layer with graphs and leaf modules (not tensors) that can be changed."""
        variants = (replace(v, graph_module=_copied(v.graph_module)) for v in self.variants)
        return replace(self, variants=tuple(variants))

    def only(self, graph_module: fx.GraphModule) -> Layer:
        """Return the layer with one graph, for calls of its first variant; others are errors."""
        reason = "the graph that replaced this layer was traced for another kind of call"
        variant = replace(self.variants[0], graph_module=graph_module)
        return replace(self, variants=(variant,), refusals=(*self.refusals, reason))

    def put_back(self) -> Callable[[], None]:
        """Make the live layer run the graphs' code. Return a function that undoes it.

        Modules that the graphs name and the layer lacks are added at their paths; leaves that no
        graph uses any longer are removed. Undo restores the layer as it was.
        """
        module, before = self.module, type(self.module)
        undo_modules = _exchange(module, self.leaves, [v.graph_module for v in self.variants])
        module.__class__ = _rewritten_class(self)

        def undo() -> None:
            module.__class__ = before
            undo_modules()

        return undo


def trace_layer(module: nn.Module, path: str = "", taps: Iterable[str] = ()) -> Layer | Miss:
    """Trace a block, or say why that is impossible. A block that was put back keeps its graphs.

    `path` names the block in messages; `taps` are paths inside it whose forward hooks must go on
    running.
    """
    if isinstance(rewritten := type(module).__dict__.get(_MARK), Layer):
        return _attached(rewritten, module, path)
    if "forward" in module.__dict__:
        return Miss(path, "its `forward` is replaced on the instance (a hook of another library)")
    try:
        found = find_variants(module, taps)
    except Exception as reason:  # a tracer runs foreign code: it can raise anything
        return Miss(path, f"its code cannot be traced: {first_line(reason)}")
    leaves = _leaves(variant.graph_module for variant in found.graphs)
    return Layer(path, module, found.graphs, found.branches, found.refusals, leaves)


def is_rewritten(module: nn.Module) -> bool:
    """Say whether a module is a layer that was put back, or that a pass has rewritten."""
    return isinstance(type(module).__dict__.get(_MARK), Layer) or _STAYS in module.__dict__


def remain_layer(module: nn.Module) -> None:
    """Make a layer that a pass rewrites remain one, whatever the pass leaves in it."""
    module.__dict__[_STAYS] = True


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer as its library defined it, whether it was put back or not."""
    cls = type(module)
    while _MARK in vars(cls):
        cls = cls.__bases__[0]
    return cls


def _attached(rewritten: Layer, module: nn.Module, path: str) -> Layer:
    """Bind the graphs of a rewritten class to one instance of it (a deepcopy shares the class)."""
    variants = tuple(
        replace(v, graph_module=graph_module_for(module, copy.deepcopy(v.graph_module.graph)))
        for v in rewritten.variants
    )
    leaves = _leaves(variant.graph_module for variant in variants)
    return replace(rewritten, path=path, module=module, variants=variants, leaves=leaves)


def _leaves(graph_modules: Iterable[fx.GraphModule]) -> frozenset[str]:
    return frozenset(target for module in graph_modules for target in targets(module.graph))


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph and the leaves that it calls."""
    graph = copy.deepcopy(graph_module.graph)
    found: Values = {}
    for target, op in targets(graph).items():
        value = lookup(graph_module, target)
        found[target] = _shallow(value) if op == "call_module" else value
    result = fx.GraphModule(found, graph, type(graph_module).__name__)
    result.training = graph_module.training
    return result


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module and the modules in it, but neither tensors nor configurations."""
    result = copy.copy(module)
    result.__dict__["_parameters"] = dict(module._parameters)
    result.__dict__["_buffers"] = dict(module._buffers)
    children = {n: _shallow(c) if c is not None else None for n, c in module._modules.items()}
    result.__dict__["_modules"] = children
    return result


def _exchange(
    module: nn.Module, before: frozenset[str], graph_modules: Sequence[fx.GraphModule]
) -> Callable[[], None]:
    """Give the live module exactly the leaves that the graphs name. Return what undoes it."""
    known = [(child, dict(child._modules), dict(child._parameters)) for child in module.modules()]
    wanted: Values = {}
    for graph_module in graph_modules:
        for target in targets(graph_module.graph):
            value = lookup(graph_module, target)
            first = wanted.setdefault(target, value)
            assert _agree(first, value), f"two graphs of a layer disagree about `{target}`"
    for target in before:
        if not any(_overlap(target, other) for other in wanted):
            parent, _, name = target.rpartition(".")
            holder = module.get_submodule(parent)
            if name in holder._modules or name in holder._parameters:  # tracing adds dropouts
                delattr(holder, name)
    for target, value in wanted.items():
        _locate_in(module, target, value, module.training)

    def undo() -> None:
        for child, modules, parameters in known:
            _refill(child._modules, modules)
            _refill(child._parameters, parameters)

    return undo


def _refill(live: Values, old: Values) -> None:
    live.clear()
    live.update(old)


def _overlap(target: str, other: str) -> bool:
    one, two = f"{target}.", f"{other}."
    return one.startswith(two) or two.startswith(one)


def _agree(one: object, other: Any) -> bool:
    if one is other or not isinstance(one, nn.Module):
        return one is other
    mine, theirs = one.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
    return mine.keys() == theirs.keys() and all(
        mine[name] is theirs[name] or _same(mine[name], theirs[name]) for name in mine
    )


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if mine.is_meta or theirs.is_meta:  # no values yet: a model that is being loaded
        return mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return torch.equal(mine, theirs)


def _locate_in(module: nn.Module, target: str, value: object, training: bool) -> None:
    *parents, name = target.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    live = module._modules.get(name, module._parameters.get(name, module._buffers.get(name)))
    if live is None and isinstance(value, nn.Module):
        value.train(training)  # a new module starts in training mode, the model may not be in it
    if not _unchanged(live, value):
        setattr(module, name, value)


def _unchanged(live: object, value: object) -> bool:
    """Say whether a leaf of a graph is the live one, or a copy that nobody changed."""
    if live is value or not (isinstance(live, nn.Module) and isinstance(value, nn.Module)):
        return live is value
    mine, theirs = ({**m._parameters, **m._buffers} for m in (live, value))
    tensors = mine.keys() == theirs.keys() and all(mine[n] is theirs[n] for n in mine)
    if (
        type(live) is not type(value)
        or not tensors
        or live._modules.keys() != value._modules.keys()
    ):
        return False
    return all(_unchanged(child, value._modules[n]) for n, child in live._modules.items())


def _rewritten_class(layer: Layer) -> type[nn.Module]:
    """Return a subclass of the layer's class, with its name, whose `forward` runs the graphs."""
    original = original_class(layer.module)
    names = ("__module__", "__qualname__", "__doc__")
    body: Values = {name: getattr(original, name) for name in names}
    body |= {"forward": _forward(layer, original), _MARK: layer}
    return type(original.__name__, (original,), body)


def _forward(layer: Layer, original: type[nn.Module]) -> _Forward:
    functions = [type(variant.graph_module).forward for variant in layer.variants]
    by_dtype = any(variant.dtypes for variant in layer.variants)
    switches = dict(sorted(layer.variants[0].flags))
    if not layer.branches and not by_dtype and not switches:
        return functions[0]
    names = [parameter.name for parameter in signature(layer.module)]
    table: dict[tuple[object, ...], _Forward] = {}
    for variant, function in zip(layer.variants, functions, strict=True):
        absent = tuple(name in variant.absent for name in layer.branches)
        flags = tuple(value for _, value in sorted(variant.flags))
        for dtype in variant.dtypes or {None}:
            table[(dtype, *absent, *flags)] = function
    branches = layer.branches

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: object, **kwargs: Any) -> object:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        dtype = given[names[0]].dtype if by_dtype else None
        absent = [given.get(name) is None for name in branches]
        flags = [bool(given.get(name, value)) for name, value in switches.items()]
        function = table.get((dtype, *absent, *flags))
        if function is None:
            raise _no_variant(layer, given, dtype)
        return function(self, *args, **kwargs)

    return forward


def _no_variant(layer: Layer, given: Values, dtype: torch.dtype | None) -> PlmccError:
    kinds = [f"{n}{'=None' if given.get(n) is None else ''}" for n in layer.branches]
    names = sorted(layer.variants[0].flags)
    switched = [f"{name}={given.get(name, value)}" for name, value in names]
    return error(
        "PLM203",
        "the rewritten layer has no code for this kind of call",
        f"model: {layer.path}",
        got=", ".join([*kinds, *switched, *([str(dtype)] if dtype else [])]),
        hint="; ".join(layer.refusals),
    )
