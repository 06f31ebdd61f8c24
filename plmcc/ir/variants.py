"""The variants of a layer: which kinds of call take different paths, and one graph for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from plmcc.ir.tracer import Call, Trace, in_dtype, signature, trace
from plmcc.utils.text import first_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_BRANCHES = 4
_GraphKey = list[tuple[object, ...]]


@dataclass(frozen=True)
class Variant:
    """One exact graph of a layer.

    It holds for calls whose arguments `absent` are None (the layer's other `branches` are given),
    whose hidden states have one of `dtypes` (none means any), and whose switches have the values
    in `flags`.
    """

    graph_module: fx.GraphModule
    absent: frozenset[str] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    flags: frozenset[tuple[str, bool]] = frozenset()


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
    parameters = signature(module)
    optional = [p.name for p in parameters if p.default is None]
    switches = frozenset((p.name, p.default) for p in parameters if isinstance(p.default, bool))
    fullest, refusals = _fullest_call(tracing, optional, switches)
    branches = _branches(tracing, fullest, optional)
    variants: list[Variant] = []
    refused = list(refusals)
    for call in _calls(fullest, branches):
        variants += _variants(module, tracing, call, refused)
    return Variants(tuple(variants), tuple(branches), tuple(refused))


def _fullest_call(
    tracing: _Tracing, optional: Sequence[str], switches: frozenset[tuple[str, bool]]
) -> tuple[Call, tuple[str, ...]]:
    """Find the call with all optional arguments that can be traced, and why it is not another.

    Switches are symbolic unless the code decides by them (DeBERTa); GPT-2 refuses one argument.
    """
    full = Call(dtype=tracing.dtype)
    tried = {full: "", replace(full, flags=switches): ""}
    tried |= {replace(full, absent=frozenset({name})): f"with {name}: " for name in optional}
    first: Exception | None = None
    for call, without in tried.items():
        try:
            tracing(call)
        except Exception as reason:  # a tracer runs foreign code: it can raise anything
            first = first or reason
        else:
            assert first is not None or not without
            return call, (f"{without}{first_line(first)}",) if first and without else ()
    assert first is not None
    raise first


def _branches(tracing: _Tracing, fullest: Call, optional: Sequence[str]) -> list[str]:
    """Return the optional arguments on whose absence the code depends in any kind of call."""
    branches = sorted(fullest.absent)
    while len(branches) <= _MOST_BRANCHES:
        calls = [call for call in _calls(fullest, branches) if _traceable(tracing, call)]
        for call in calls:
            training = replace(call, training=True)
            if _key(tracing(call).graph) != _key(tracing(training).graph):
                raise TraceError("it takes another path in training than in evaluation")
        others = [name for name in optional if name not in branches]
        found = next((n for n in others for c in calls if _matters(tracing, c, n)), None)
        if found is None:
            return [name for name in optional if name in branches]
        branches.append(found)
    raise TraceError(f"it branches on too many arguments: {', '.join(branches)}")


def _calls(fullest: Call, branches: Sequence[str]) -> list[Call]:
    """Return every kind of call by its switches and absent arguments, the fullest first."""
    free = [name for name in branches if name not in fullest.absent]
    flags = sorted(fullest.flags)
    values = itertools.product(*([(name, value), (name, not value)] for name, value in flags))
    return [
        replace(fullest, absent=fullest.absent | absent, flags=frozenset(chosen))
        for chosen in values
        for absent in _subsets(free)
    ]


def _traceable(tracing: _Tracing, call: Call) -> bool:
    try:
        tracing(call)
    except Exception:  # `_variants` will say why
        return False
    return True


def _matters(tracing: _Tracing, call: Call, name: str) -> bool:
    """Say whether the code takes another path when the argument is None."""
    other = replace(call, absent=call.absent | {name})
    if not _traceable(tracing, other):
        return True
    return _key(tracing(call).graph, name) != _key(tracing(other).graph, name)


def _variants(
    module: nn.Module, tracing: _Tracing, call: Call, refused: list[str]
) -> Iterator[Variant]:
    """Yield the graphs for one set of absent arguments, one for each group of dtypes."""
    groups: list[tuple[Trace, set[torch.dtype]]] = []
    for dtype in (call.dtype, *(d for d in _DTYPES if d is not call.dtype)):
        try:
            done = tracing(replace(call, dtype=dtype))
        except Exception as reason:  # as in trace_layer
            without = f"without {', '.join(sorted(call.absent))} " if call.absent else ""
            switched = "".join(f"with {name}={value} " for name, value in sorted(call.flags))
            refused.append(f"{without}{switched}in {dtype}: {first_line(reason)}")
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
        yield Variant(graph_module, call.absent, kinds, call.flags)


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
