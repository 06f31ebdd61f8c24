"""The variants of a layer: which kinds of call take different paths, and one graph for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from plmcc.tracer import Call, Trace, in_dtype, signature, trace

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_BRANCHES = 4
_GraphKey = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Variant:
    """One exact graph of a layer.

    It holds for calls whose arguments `absent` are None (the layer's other `branches` are given),
    and whose hidden states have one of `dtypes`; no dtypes means any.
    """

    graph_module: fx.GraphModule
    absent: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class Variants:
    """All graphs of a layer, the fullest call first.

    `branches` names the optional arguments on whose absence the code depends, `refusals` says why
    calls that no graph covers cannot be traced.
    """

    graphs: tuple[Variant, ...]
    branches: tuple[str, ...]
    refusals: tuple[str, ...]


class _Tracing:
    """Traces of one module, each made once."""

    def __init__(self, module: nn.Module, taps: frozenset[str]) -> None:
        self.taps = taps
        self.module = module
        tensors = [p for p in module.parameters() if p.is_floating_point()]
        counts = {t.dtype: sum(o.dtype is t.dtype for o in tensors) for t in tensors}
        self.dtype = max(counts, key=counts.__getitem__) if counts else torch.float32
        self._modules: dict[torch.dtype, nn.Module] = {self.dtype: module}
        self._done: dict[Call, Trace] = {}

    def __call__(self, call: Call) -> Trace:
        if call not in self._done:
            if call.dtype not in self._modules:
                self._modules[call.dtype] = in_dtype(self.module, call.dtype)
            self._done[call] = trace(self._modules[call.dtype], call, self.taps)
        return self._done[call]


def find_variants(module: nn.Module, taps: Iterable[str]) -> Variants:
    """Trace a layer for every kind of call that matters.

    Raises whatever its code raises on symbolic values, and TraceError with the reason when it
    depends on more than the absence of a few arguments and the dtype.
    """
    tracing = _Tracing(module, frozenset(taps))
    optional = [p.name for p in signature(module) if p.default is None]
    fullest, refusals = _fullest_call(tracing, optional)
    branches = [n for n in optional if n in fullest.absent or _matters(tracing, fullest, n)]
    if len(branches) > _MOST_BRANCHES:
        raise TraceError(f"it branches on too many arguments: {', '.join(branches)}")
    in_training = Call(fullest.absent, fullest.dtype, training=True)
    if _key(tracing(fullest).graph) != _key(tracing(in_training).graph):
        raise TraceError("it takes another path in training than in evaluation")
    free = [name for name in branches if name not in fullest.absent]
    variants: list[Variant] = []
    refused = list(refusals)
    for absent in _subsets(free):
        call = Call(fullest.absent | absent, fullest.dtype)
        variants += _variants(module, tracing, call, refused)
    return Variants(tuple(variants), tuple(branches), tuple(refused))


def _fullest_call(tracing: _Tracing, optional: Sequence[str]) -> tuple[Call, tuple[str, ...]]:
    """Find the call with all optional arguments, or all but one that the layer refuses (GPT-2)."""
    full = Call(dtype=tracing.dtype)
    try:
        tracing(full)
        return full, ()
    except Exception as reason:  # as in trace_layer
        for name in optional:
            call = Call(frozenset({name}), tracing.dtype)
            try:
                tracing(call)
            except Exception:
                continue
            return call, (f"with {name}: {sentence(reason)}",)
        raise


def _matters(tracing: _Tracing, fullest: Call, name: str) -> bool:
    """Say whether the code takes another path when the argument is None."""
    try:
        other = tracing(Call(fullest.absent | {name}, fullest.dtype))
    except Exception:  # it cannot be None, and the variant's own trace will say why
        return True
    return _key(tracing(fullest).graph, name) != _key(other.graph, name)


def _variants(
    module: nn.Module, tracing: _Tracing, call: Call, refused: list[str]
) -> Iterator[Variant]:
    """Yield the graphs for one set of absent arguments, one for each group of dtypes."""
    groups: list[tuple[Trace, set[torch.dtype]]] = []
    for dtype in (call.dtype, *(d for d in _DTYPES if d is not call.dtype)):
        try:
            done = tracing(Call(call.absent, dtype))
        except Exception as reason:  # as in trace_layer
            without = f"without {', '.join(sorted(call.absent))} " if call.absent else ""
            refused.append(f"{without}in {dtype}: {sentence(reason)}")
            continue
        same = next((found for t, found in groups if _key(t.graph) == _key(done.graph)), None)
        if same is None:
            groups.append((done, {dtype}))
        else:
            same.add(dtype)
        if not done.reads_dtype:
            break
    for done, dtypes in groups:
        graph_module = graph_module_for(module, done.graph, done.dropouts)
        kinds = frozenset(dtypes) if done.reads_dtype else frozenset[torch.dtype]()
        yield Variant(graph_module, call.absent, kinds)


def _key(graph: fx.Graph, absent: str = "") -> _GraphKey:
    """Return a graph as comparable values, the argument `absent` read as None."""
    numbers = {node: index for index, node in enumerate(graph.nodes)}

    def plain(node: fx.Node) -> Any:
        is_none = node.op == "placeholder" and node.name == absent
        return None if is_none else f"%{numbers[node]}"

    return [
        (n.op, n.target, repr(fx.map_arg(n.args, plain)), repr(fx.map_arg(n.kwargs, plain)))
        for n in graph.nodes
    ]


def graph_module_for(
    module: nn.Module, graph: fx.Graph, extra: dict[str, nn.Module] | None = None
) -> fx.GraphModule:
    """Return a GraphModule that shares the module's leaves and parameters."""
    new = extra or {}
    for added in new.values():
        added.train(module.training)
    found = {t: new[t] if t in new else lookup(module, t) for t in targets(graph)}
    graph_module = fx.GraphModule(found, graph, type(module).__name__)
    graph_module.training = module.training
    return graph_module


def targets(graph: fx.Graph) -> dict[str, str]:
    """Return the paths that a graph names, and as what."""
    return {str(n.target): n.op for n in graph.nodes if n.op in ("call_module", "get_attr")}


def lookup(module: nn.Module, target: str) -> Any:
    """Return the module or tensor at a path that a graph names."""
    return functools.reduce(getattr, target.split("."), module)


def _subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    for size in range(len(names) + 1):
        yield from (frozenset(chosen) for chosen in itertools.combinations(names, size))


def sentence(reason: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]
