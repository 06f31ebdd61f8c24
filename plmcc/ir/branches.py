"""Residual branches of a layer graph, found by dataflow.

They have the form `x + f(x)`, where f attends or is linear-activation-linear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from plmcc.ir.modules import is_attention, is_linear, is_norm
from plmcc.ir.tracer import fire_hooks

Kind = Literal["attention", "cross_attention", "feed_forward", "other"]
Position = Literal["pre", "post", "none"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul)
_SOURCES = ("key_value_states", "encoder_hidden_states")
"""How attention modules call the states they look at when these are not their own."""


@dataclass(frozen=True)
class Branch:
    """One residual branch `output = input + f(input)`.

    `nodes` compute f, in order. A norm before f is the first of them (`position` "pre"); a norm
    after the addition ("post") is the only user of `output` and not in `nodes`. `taps` are nodes
    that fire hooks with this output (T5 records attention so): whoever removes the branch removes
    them.
    """

    kind: Kind
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    output: fx.Node
    norm: fx.Node | None
    position: Position
    taps: tuple[fx.Node, ...] = ()

    def calls(self, graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Yield the nodes of f that call modules, with the modules."""
        for node in self.nodes:
            if (module := module_of(graph_module, node)) is not None:
                yield node, module


@dataclass(frozen=True)
class FeedForward:
    """The nodes of `down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))`."""

    up: fx.Node
    down: fx.Node
    activation: fx.Node
    gate: fx.Node | None = None


def residual_branches(graph_module: fx.GraphModule) -> list[Branch]:
    """Return the residual branches of a layer graph in order.

    An addition is residual when one operand is computed from the other. Branches that hold neither
    attention nor a feed-forward network have the kind "other".
    """
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    found = (_branch(graph_module, node, order) for node in graph_module.graph.nodes)
    return [branch for branch in found if branch is not None]


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_cross(node: fx.Node) -> bool:
    """Say whether an attention node looks at states other than its own input."""
    return any(isinstance(node.kwargs.get(name), fx.Node) for name in _SOURCES)


def feed_forward_of(graph_module: fx.GraphModule, branch: Branch) -> FeedForward | None:
    """Return the parts of a feed-forward branch; None if it is not one."""
    linears = [n for n in branch.nodes if is_linear(module_of(graph_module, n))]
    if len(linears) not in (2, 3):
        return None
    down, sources = linears[-1], linears[:-1]
    activations = [n for n in branch.nodes if _is_activation(graph_module, n)]
    if len(activations) != 1 or any(not _reaches(s, down, branch.nodes) for s in sources):
        return None
    activated = [s for s in sources if _reaches(s, activations[0], branch.nodes)]
    others = [s for s in sources if s not in activated]
    if len(activated) != 1:
        return None
    if not others:
        # A fused gate and up projection goes around the activation as well.
        chain = _is_chain(_between(activated[0], down), activations[0])
        return FeedForward(activated[0], down, activations[0]) if chain else None
    gated = any(n.target in _MULTIPLICATIONS for n in branch.nodes)
    return FeedForward(others[0], down, activations[0], activated[0]) if gated else None


def _branch(
    graph_module: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int]
) -> Branch | None:
    operands = [value for value in node.args if isinstance(value, fx.Node)]
    if node.op != "call_function" or node.target not in _ADDITIONS or len(operands) != 2:
        return None
    for source, result in (operands, operands[::-1]):
        inside = _between(source, result)
        if not inside:
            continue
        nodes = tuple(sorted(inside, key=order.__getitem__))
        norm, position = _norm(graph_module, source, node, nodes)
        draft = Branch("other", nodes, source, node, norm, position, _taps(node))
        return replace(draft, kind=_kind(graph_module, draft))
    return None


def _taps(output: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes that fire the hooks of a module whose output is the branch's."""
    hooks = (user for user in output.users if user.target is fire_hooks)
    return tuple(tap for tap in hooks if output in _nodes_in(tap.args[2]))


def _nodes_in(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found


def _kind(graph_module: fx.GraphModule, branch: Branch) -> Kind:
    attention = [n for n, module in branch.calls(graph_module) if is_attention(module)]
    if not attention:
        return "feed_forward" if feed_forward_of(graph_module, branch) is not None else "other"
    # In a parallel block the same addition takes a second way, which does not attend.
    if len(attention) > 1 or not _is_chain(branch.nodes, attention[0]):
        return "other"
    return "cross_attention" if is_cross(attention[0]) else "attention"


def _norm(
    graph_module: fx.GraphModule, source: fx.Node, output: fx.Node, nodes: tuple[fx.Node, ...]
) -> tuple[fx.Node | None, Position]:
    entries = [n for n in nodes if source in n.all_input_nodes]
    if len(entries) == 1 and is_norm(module_of(graph_module, entries[0])):
        return entries[0], "pre"
    users = [user for user in output.users if user.target is not fire_hooks]
    if len(users) == 1 and is_norm(module_of(graph_module, users[0])):
        return users[0], "post"
    return None, "none"


def _between(source: fx.Node, result: fx.Node) -> set[fx.Node]:
    """Return the nodes on all ways from `source` to `result`, `result` included; maybe none."""
    found: set[fx.Node] = set()
    known: dict[fx.Node, bool] = {source: True}

    def leads(node: fx.Node) -> bool:
        if node not in known:
            # A list, not a generator: every input has to be visited.
            ways = [leads(source) for source in node.all_input_nodes]
            known[node] = any(ways)
            if known[node]:
                found.add(node)
        return known[node]

    leads(result)
    return found


def _is_chain(nodes: Iterable[fx.Node], middle: fx.Node) -> bool:
    """Say whether every node lies before or after the one in the middle."""
    return all(n is middle or _between(n, middle) or _between(middle, n) for n in nodes)


def _reaches(source: fx.Node, result: fx.Node, within: tuple[fx.Node, ...]) -> bool:
    return source is not result and bool(_between(source, result) & set(within))


def _is_activation(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """A module without parameters that is not a dropout, or an activation function."""
    module = module_of(graph_module, node)
    if module is not None:
        return not (list(module.parameters()) or isinstance(module, nn.Dropout | nn.Identity))
    return node.op == "call_function" and _is_functional(node.target)


def _is_functional(target: object) -> bool:
    name = getattr(target, "__name__", "")
    known = getattr(nn.functional, name, None) is target
    return (known and name != "dropout") or target in (torch.relu, torch.tanh, torch.sigmoid)
