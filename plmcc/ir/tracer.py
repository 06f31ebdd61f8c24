"""The tracer of layers: one repeated block of a transformers model -> one short torch.fx graph.

Leaves are modules without children (linears, norms, activations), modules of torch.nn, and
attention modules. A graph has the layer's own signature. It is exact for one kind of *call*: which
optional arguments are None, which dtype the first argument has; `plmcc.ir.layers` finds out which
of these matter and keeps one graph for each.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.fx.proxy import TraceError
from transformers.modeling_layers import GradientCheckpointingLayer

from plmcc.ir.modules import is_attention, is_leaf
from plmcc.utils.types import Values

KWARGS = "**"
"""The keyword under which a leaf's node holds the layer's `**kwargs`."""


@dataclass(frozen=True)
class Call:
    """A kind of call of a layer: optional arguments that are None, switches, dtype, and mode.

    `flags` are boolean arguments with their values; any other argument is symbolic.
    """

    absent: frozenset[str] = frozenset()
    flags: frozenset[tuple[str, bool]] = frozenset()
    dtype: torch.dtype = torch.float32
    training: bool = False


@dataclass(frozen=True)
class Trace:
    """A graph, the dropout modules it calls and the layer lacks, and whether it read the dtype."""

    graph: fx.Graph
    dropouts: dict[str, nn.Module] = field(default_factory=dict)
    reads_dtype: bool = False


def signature(module: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of the module's `forward` without `self`."""
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


@has_side_effect
def fire_hooks(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Run the forward hooks of a module whose code is part of a layer graph.

    transformers records attention weights with hooks on modules that the graph looks into (T5).
    Raises RuntimeError if a hook wants to change the output: the graph has no place for that.
    """
    for hook in tuple(module._forward_hooks.values()):
        if hook(module, args, output) is not None:
            raise RuntimeError(f"a forward hook changes the output of {type(module).__name__}")


class LayerTracer(fx.Tracer):
    """Trace one layer for one kind of call."""

    def __init__(self, call: Call, taps: frozenset[str], opaque: frozenset[str]) -> None:
        super().__init__()
        self.call = call
        self.taps = taps
        self.opaque = opaque
        self.failed = ""
        self.dropouts: dict[str, nn.Module] = {}
        self.reads_dtype = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `is_leaf`; what turned out to be untraceable is a leaf too."""
        return module_qualified_name in self.opaque or is_leaf(m)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: Values) -> object:
        """Keep parameters as they are: code may read their dtype. Operations make them nodes."""
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows its dtype."""
        return _LayerProxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., object],
        is_module: bool,
        concrete_args: Values | tuple[object, ...] | None = None,
    ) -> tuple[Callable[..., object], list[object]]:
        """Make the placeholders: the layer's own signature, and None for absent arguments."""
        layer = self.root
        positional: list[object] = []
        named: Values = {}
        for parameter in signature(layer):
            proxy = self._placeholder(parameter)
            value: object = dict(self.call.flags).get(parameter.name, proxy)
            value = None if parameter.name in self.call.absent else value
            if parameter.kind is parameter.VAR_KEYWORD:
                named[KWARGS] = value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        if KWARGS in named:
            _check_passes_on(type(layer))
        forward = type(layer).forward

        def run() -> object:
            return forward(layer, *positional, **named)

        return run, []

    def _placeholder(self, parameter: inspect.Parameter) -> fx.Proxy:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY):
            raise TraceError(f"`forward` takes `{parameter}`, which a graph cannot express")
        name = str(parameter.replace(annotation=parameter.empty)).split("=")[0]
        default = () if parameter.default is parameter.empty else (parameter.default,)
        proxy: fx.Proxy = self.create_proxy("placeholder", name, default, {})
        return proxy

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: Any, kwargs: Values
    ) -> object:
        """Record a leaf, or look into any other module; those in `taps` get their hooks fired."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if KWARGS in kwargs:
            _check_passes_on(type(m))
        if "forward" in vars(m) or m._forward_pre_hooks or m._backward_hooks:
            raise TraceError(f"`{path}` has hooks that change how it runs")
        # Not `forward`: that would run the hooks now, on symbolic values.
        try:
            output = type(m).forward(m, *args, **kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        if path in self.taps or m._forward_hooks:
            module = self.create_proxy("get_attr", path, (), {})
            self.create_proxy("call_function", fire_hooks, (module, tuple(args), output), {})
        return output

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Values,
        *rest: Any,
        **options: Any,
    ) -> fx.Proxy:
        """Turn a functional dropout that follows the layer's mode into a module: it does so too."""
        if target is nn.functional.dropout:
            x, p, training, inplace = _dropout_arguments(*args, **kwargs)
            # A flag other than the mode is a decision of the author: it stays as it is.
            if training == self.call.training:
                name = f"dropout_p{p}".replace(".", "_") + ("_" if inplace else "")
                self.dropouts.setdefault(name, nn.Dropout(p, inplace))
                kind, target, args, kwargs = "call_module", name, (x,), {}
        proxy: fx.Proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse code that decides by a value that is known only when the layer runs."""
        raise TraceError(f"it decides by the value of `{obj.node}`")

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """Return the dtype of the layer's hidden states, for nodes computed from them."""
        main = next(iter(self.graph.nodes))
        if node is not main and main not in _ancestors(node):
            raise TraceError(f"`forward` looks at the dtype of `{node}`, not of `{main}`")
        self.reads_dtype = True
        return self.call.dtype


class _LayerProxy(fx.Proxy):
    tracer: LayerTracer

    @property
    def dtype(self) -> torch.dtype:
        return self.tracer.dtype_of(self.node)


def trace(module: nn.Module, call: Call, taps: frozenset[str] = frozenset()) -> Trace:
    """Trace a layer for one kind of call. `taps` are paths inside it whose forward hooks must run.

    A module inside the layer whose code cannot be traced (a mixture of experts looks at values)
    becomes a leaf, unless it holds attention. Whatever the layer's own code raises on symbolic
    values comes through unchanged.
    """
    opaque: frozenset[str] = frozenset()
    while True:
        tracer = LayerTracer(call, taps, opaque)
        try:
            with _as_traced(module, call.training):
                graph = tracer.trace(module)
            break
        except Exception:
            failed = tracer.failed
            if not failed or any(map(is_attention, module.get_submodule(failed).modules())):
                raise
            opaque |= {failed}
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    graph.on_generate_code(lambda current: _unpack_kwargs)
    return Trace(graph, tracer.dropouts, tracer.reads_dtype)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the module on the meta device, its floating point tensors in `dtype`."""
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


@contextmanager
def _as_traced(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of the whole layer and switch checkpointing off; put both back afterwards."""
    modes = {child: child.training for child in module.modules()}
    blocks = [child for child in modes if isinstance(child, GradientCheckpointingLayer)]
    checkpointing = [block.gradient_checkpointing for block in blocks]
    try:
        module.train(training)
        for block in blocks:
            block.gradient_checkpointing = False
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
        for block, flag in zip(blocks, checkpointing, strict=True):
            block.gradient_checkpointing = flag


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        new = [source for source in queue.pop().all_input_nodes if source not in found]
        found.update(new)
        queue += new
    return found


def _dropout_arguments(
    x: object, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[object, float, bool, bool]:
    return x, p, training, inplace


def _check_passes_on(cls: type[nn.Module]) -> None:
    """Refuse a `forward` that does anything but pass its `**kwargs` on: it would read nothing."""
    forward = inspect.unwrap(cls.forward)
    name = next(
        p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.VAR_KEYWORD
    )
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except OSError:
        raise TraceError(f"the source of {cls.__name__}.forward is not available") from None
    passed = {id(k.value) for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg is None}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name]
    if any(id(use) not in passed for use in uses):
        raise TraceError(f"{cls.__name__}.forward looks into `**{name}` instead of passing it on")


def _has_effect(node: fx.Node) -> bool:
    """An attention module writes to the cache, so a call stays even when nobody uses its result."""
    return node.op in ("placeholder", "output", "call_module") or node.target is fire_hooks


def _unpack_kwargs(body: list[str]) -> list[str]:
    return [re.sub(r"(?<=[(\s])\*\* = ", "**", line) for line in body]
