"""Decoder layers as the compressed-attention pass sees them: their three residual branches, read by
dataflow, and the graph in which one branch stands in their place."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from plmcc.api import AttentionSite, Miss, Program, Values
from plmcc.kit.graphs import (
    KWARGS,
    Branch,
    FeedForward,
    Layer,
    attention_sites,
    cache_argument,
    feed_forward_of,
    fire_hooks,
    is_attention,
    module_of,
    residual_branches,
)

MODULE = "compressed_attn"
NORM = "compressed_attn_layer_norm"
_DROPOUT = "compressed_attn_dropout"
_SOURCES = ("key_value_states", "encoder_hidden_states")
_MASKS = ("attention_mask", "mask")
_CACHE = "past_key_values"
"""What the merged sub-layer calls the cache, whatever the attention modules call it."""
_KNOWN = {"hidden_states", _CACHE, "position_bias", *_SOURCES, *_MASKS, KWARGS}


@dataclass(frozen=True)
class Parts:
    """The sub-layers of a decoder layer: modules of the live layer, and what decides shapes.

    `q`, `k`, `v`, `o` are the projections of self-attention, `cross_*` those of cross-attention,
    `up`, `gate` (or None) and `down` the feed-forward network, `norms` the three norms in order.
    """

    self_attention: nn.Module
    cross_attention: nn.Module
    projections: dict[str, nn.Linear]
    up: nn.Linear
    gate: nn.Linear | None
    down: nn.Linear
    activation: nn.Module
    norms: tuple[nn.Module, nn.Module, nn.Module]
    position: str
    num_heads: int
    head_dim: int
    scaling: float
    layer_idx: int | None
    dropout: float
    attention_dropout: float
    activation_dropout: float


def is_compressed(layer: nn.Module) -> bool:
    """Say whether a layer has been through the pass."""
    return MODULE in layer._modules


def read(layer: Layer) -> Parts | Miss:
    """Return the parts of a decoder layer, or why its sub-layers cannot be merged."""
    if is_compressed(layer.module):
        return Miss(layer.path, "it is already compressed")
    branches = residual_branches(layer.graph_module)
    reason = _refusal(layer.graph_module, branches)
    if reason:
        return Miss(layer.path, reason)
    found = list(attention_sites(layer))
    misses = [site for site in found if isinstance(site, Miss)]
    if misses or len(found) != 2:
        return Miss(
            layer.path, misses[0].reason if misses else "it does not have two attention blocks"
        )
    own, cross = (site for site in found if isinstance(site, AttentionSite))
    sizes = [(site.heads, site.kv_heads, site.head_dim) for site in (own, cross)]
    if sizes[0] != sizes[1] or own.heads != own.kv_heads:
        return Miss(layer.path, "self- and cross-attention differ in their heads, or share keys")
    if not {"q", "k", "v", "o"} <= own.linears.keys() & cross.linears.keys():
        return Miss(layer.path, "its query, key and value projections are fused")
    return _parts(layer, branches, own, cross)


def _parts(
    layer: Layer, branches: list[Branch], own: AttentionSite, cross: AttentionSite
) -> Parts | Miss:
    graph_module = layer.graph_module
    network = feed_forward_of(graph_module, branches[2])
    assert network is not None
    activation = module_of(graph_module, network.activation)
    sides = (("", own), ("cross_", cross))
    linears = {f"{s}{n}": _module(layer, site.linears[n]) for s, site in sides for n in "qkvo"}
    up, down = (_module(layer, f"{layer.path}.{n.target}") for n in (network.up, network.down))
    gate = _module(layer, f"{layer.path}.{network.gate.target}") if network.gate else None
    every = [*linears.values(), up, down, *([gate] if gate else [])]
    if activation is None or any(type(linear) is not nn.Linear for linear in every):
        return Miss(layer.path, "its projections or its activation are not plain modules")
    width = up.out_features
    if {down.in_features, gate.out_features if gate else width} != {width}:
        return Miss(layer.path, "its feed-forward network is not d -> f -> d")
    if width % own.heads:
        return Miss(layer.path, f"its inner width {width} is not a multiple of {own.heads} heads")
    nodes = (_attention(graph_module, branch) for branch in branches[:2])
    attention, cross_attention = (layer.module.get_submodule(str(n.target)) for n in nodes)
    norms = [layer.module.get_submodule(str(b.norm.target)) for b in branches if b.norm]
    before, after = _dropouts(graph_module, branches[2], network)
    return Parts(
        self_attention=attention,
        cross_attention=cross_attention,
        projections=linears,
        up=up,
        gate=gate,
        down=down,
        activation=activation,
        norms=(norms[0], norms[1], norms[2]),
        position=branches[0].position,
        num_heads=own.heads,
        head_dim=own.head_dim,
        scaling=float(getattr(attention, "scaling", own.head_dim**-0.5)),
        layer_idx=getattr(attention, "layer_idx", None),
        dropout=after,
        attention_dropout=float(_rate(getattr(attention, "dropout", 0.0))),
        activation_dropout=before,
    )


def _refusal(graph_module: fx.GraphModule, branches: list[Branch]) -> str:
    kinds = [branch.kind for branch in branches]
    if "cross_attention" not in kinds:
        return "it has no cross-attention: only the decoder of an encoder-decoder can be merged"
    if kinds != ["attention", "cross_attention", "feed_forward"]:
        return f"its residual branches are {', '.join(kinds)}, not attention, cross-attention, FFN"
    positions = {branch.position for branch in branches}
    if positions not in ({"pre"}, {"post"}):
        return "the layer mixes pre-norm and post-norm sub-layers"
    for node in (_attention(graph_module, branch) for branch in branches[:2]):
        unknown = [n for n in _arguments(graph_module, node) if n not in _KNOWN]
        if unknown:
            return f"its attention takes `{unknown[0]}`, which a merged one would not know"
    taps = {tap for branch in branches for tap in branch.taps}
    inside = {node for branch in branches for node in branch.nodes}
    for node in graph_module.graph.nodes:
        if node.target is fire_hooks and node not in taps:
            seen: list[fx.Node] = []
            fx.map_arg(node.args[2], seen.append)
            if not inside.issuperset(seen):
                return "its sub-layers pass on more than hidden states, as in UMT5"
    return ""


def _module(layer: Layer, path: str) -> Any:
    return layer.module.get_submodule(path.removeprefix(f"{layer.path}."))


def _attention(graph_module: fx.GraphModule, branch: Branch) -> fx.Node:
    return next(node for node, module in branch.calls(graph_module) if is_attention(module))


def _arguments(graph_module: fx.GraphModule, node: fx.Node) -> Values:
    """Return the arguments of a call of attention by their names, the cache by ours."""
    cls = type(graph_module.get_submodule(str(node.target)))
    names = list(inspect.signature(cls.forward).parameters)[1:]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    ours = {cache_argument(cls): _CACHE}
    return {ours.get(name, name): value for name, value in given.items() if value is not None}


def _dropouts(
    graph_module: fx.GraphModule, branch: Branch, network: FeedForward
) -> tuple[float, float]:
    """Return the dropout rates inside of a feed-forward network and after it."""
    order = list(branch.nodes)
    down = order.index(network.down)
    calls = [(order.index(n), m) for n, m in branch.calls(graph_module)]
    rates = [(at, m.p) for at, m in calls if isinstance(m, nn.Dropout)]
    before = [p for at, p in rates if at < down]
    after = [p for at, p in rates if at > down]
    return (before or [0.0])[0], (after or [0.0])[0]


def _rate(value: object) -> float:
    return value.p if isinstance(value, nn.Dropout) else float(value)  # type: ignore[arg-type]


def install(program: Program, path: str, module: nn.Module) -> None:
    """Put a compressed-attention module into a layer: an original one, or one that has another.

    Calls without encoder states, for which there is nothing to merge, become errors.
    """
    layer = program.layer(path)
    assert isinstance(layer, Layer), layer
    swap = is_compressed(layer.module)
    norm = None if swap else _kept_norm(layer)
    recorders: dict[str, nn.Module] = {}
    variants = []
    for variant in layer.copy().variants:
        graph_module = variant.graph_module
        if swap:
            graph_module.set_submodule(MODULE, module)
        elif _refusal(graph_module, residual_branches(graph_module)):
            continue
        else:
            _splice(graph_module, module, norm, recorders, layer.module)
        variants.append(replace(variant, graph_module=graph_module))
    reason = "a merged layer needs the hidden states of the encoder"
    replace(layer, variants=tuple(variants), refusals=(*layer.refusals, reason)).put_back()


def _kept_norm(layer: Layer) -> nn.Module:
    parts = read(layer)
    assert isinstance(parts, Parts), parts
    return parts.norms[0] if parts.position == "pre" else parts.norms[2]


def _splice(
    graph_module: fx.GraphModule,
    module: nn.Module,
    norm: nn.Module | None,
    recorders: dict[str, nn.Module],
    live: nn.Module,
) -> None:
    """Replace the three residual branches of a graph by one."""
    branches = residual_branches(graph_module)
    attention = [_attention(graph_module, branch) for branch in branches[:2]]
    network = feed_forward_of(graph_module, branches[2])
    assert norm is not None
    assert network is not None
    rate = _dropouts(graph_module, branches[2], network)[1]
    graph, pre = graph_module.graph, branches[0].position == "pre"
    new = {MODULE: module, NORM: norm, _DROPOUT: nn.Dropout(rate).train(live.training)}
    for name, child in new.items():
        graph_module.add_submodule(name, child)
    own, cross = (_arguments(graph_module, node) for node in attention)
    end = branches[2].output if pre else branches[2].norm
    assert end is not None
    old = set(graph.nodes)
    at = _Writer(graph, end)
    source = branches[0].input
    states = at.call(NORM, source) if pre else source
    merged = at.call(MODULE, states, **_merged_arguments(own, cross))
    total = at.function(operator.add, source, at.call(_DROPOUT, at.item(merged, 0)))
    result = total if pre else at.call(NORM, total)
    end.replace_all_uses_with(result, delete_user_cb=lambda user: user in old)
    bias = (at.item(merged, 3), cross.get("position_bias"))
    kept: set[fx.Node] = set()
    for index, (node, branch) in enumerate(zip(attention, branches[:2], strict=True)):
        outputs = (
            None,
            *((bias[index],) if "position_bias" in own or _has_bias(graph_module, node) else ()),
            at.item(merged, 1 + index),
        )
        _redirect(node, outputs, old)
        path = str(branch.taps[0].args[0].target) if branch.taps else str(node.target)  # type: ignore[union-attr]
        if path not in recorders:
            recorders[path] = _recorder(live.get_submodule(path))
        kept.add(at.record(graph_module, path, recorders[path], outputs))
    _clean(graph, kept, {tap for branch in branches for tap in branch.taps})
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _merged_arguments(own: Values, cross: Values) -> Values:
    def first(given: Values, names: tuple[str, ...]) -> object:
        return next((given[name] for name in names if name in given), None)

    return {
        "encoder_hidden_states": first(cross, _SOURCES),
        "attention_mask": first(own, _MASKS),
        "encoder_attention_mask": first(cross, _MASKS),
        _CACHE: own.get(_CACHE),
        "position_bias": own.get("position_bias"),
    }


def _has_bias(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    module = graph_module.get_submodule(str(node.target))
    return "position_bias" in inspect.signature(type(module).forward).parameters


def _redirect(node: fx.Node, outputs: tuple[object, ...], old: set[fx.Node]) -> None:
    """Give whoever reads an item of an attention module's output (a position bias) the new one."""
    for item in [user for user in node.users if user.target is operator.getitem]:
        index = item.args[1]
        value = outputs[index] if isinstance(index, int) and index else None
        for user in [u for u in item.users if u in old]:
            user.args = fx.map_arg(user.args, lambda n, i=item, v=value: v if n is i else n)  # type: ignore[misc]


def _clean(graph: fx.Graph, kept: set[fx.Node], taps: set[fx.Node]) -> None:
    """Erase what nobody reads any longer; attention modules write to the cache, so by name."""
    for node in reversed(list(graph.nodes)):
        fires = node.target is fire_hooks and node not in taps
        if not (node.users or node.op in ("placeholder", "output") or node in kept or fires):
            graph.erase_node(node)


class _Writer:
    """Appends nodes one after another behind a node."""

    def __init__(self, graph: fx.Graph, after: fx.Node) -> None:
        self.graph, self.last = graph, after

    def _add(self, make: Any, *args: object) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = make(*args)
        return self.last

    def call(self, path: str, *args: object, **kwargs: object) -> fx.Node:
        return self._add(self.graph.call_module, path, args, kwargs)

    def function(self, target: object, *args: object) -> fx.Node:
        return self._add(self.graph.call_function, target, args)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.function(operator.getitem, node, index)

    def record(
        self,
        graph_module: fx.GraphModule,
        path: str,
        recorder: nn.Module,
        outputs: tuple[object, ...],
    ) -> fx.Node:
        graph_module.set_submodule(path, recorder)
        return self.call(path, *outputs)


def _recorder(original: nn.Module) -> nn.Module:
    """Return an empty module of the original's class and with its hooks, that returns its
    arguments: transformers records attention weights from modules of that class."""
    cls = type(original)
    body = {"forward": _returned, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    kind: Any = type(cls.__name__, (cls,), body)
    recorder: nn.Module = kind.__new__(kind)
    nn.Module.__init__(recorder)
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(recorder, name, getattr(original, name))
    return recorder.train(original.training)


def _returned(self: nn.Module, *values: object) -> tuple[object, ...]:
    return values
