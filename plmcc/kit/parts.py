"""What can be pruned in a layer: attention blocks and feed-forward networks, with their linears.

For passes that remove heads, neurons or weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from plmcc.api import Miss, Program, Site
from plmcc.kit.graphs import Layer, attention_sites, feed_forward_of, module_of, residual_branches

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """An attention block. `linears` are role -> path in the layer: q, k, v, o, or qkv and o.

    `splits` says that its queries, keys and values come from one matrix, one after another.
    """

    path: str
    linears: dict[str, str]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def splits(self) -> bool:
        """Whether query, key and value projection are one matrix."""
        return "qkv" in self.linears


@dataclass(frozen=True)
class Network:
    """A feed-forward network. `linears` are fc1, gate (if any) and fc2 -> path in the layer."""

    linears: dict[str, str]
    activation: Activation | None = field(repr=False)


@dataclass(frozen=True)
class Parts:
    """What can be pruned in a layer; `refused` says why other blocks cannot."""

    attention: tuple[Attention, ...]
    networks: tuple[Network, ...]
    refused: tuple[str, ...] = ()

    def every(self) -> list[Attention | Network]:
        """Return the attention blocks, then the feed-forward networks."""
        return [*self.attention, *self.networks]

    def paths(self) -> list[str]:
        """Return the paths in the layer of all linears."""
        return [path for part in self.every() for path in part.linears.values()]


def read(program: Program, path: str, linears: dict[str, Site | Miss]) -> Parts | Miss:
    """Return the parts of a layer, or why it has none.

    `linears` are the model's linear maps by each of their paths (`by_path`).
    """
    layer = program.layer(path)
    if isinstance(layer, Miss):
        return layer
    attention: list[Attention] = []
    networks: list[Network] = []
    refused: list[str] = []
    for found in [*_attention(layer), *_networks(layer)]:
        reason = found if isinstance(found, str) else _refusal(layer, found, linears)
        if reason:
            refused.append(reason)
        elif isinstance(found, Attention):
            attention.append(found)
        elif isinstance(found, Network):
            networks.append(found)
    if not attention and not networks:
        return Miss(path, "; ".join(refused) or "it has neither attention nor feed-forward network")
    return Parts(tuple(attention), tuple(networks), tuple(refused))


def by_path(program: Program) -> dict[str, Site | Miss]:
    """Return the linear maps of a model by path, those that share a weight under each of theirs."""
    found: dict[str, Site | Miss] = {}
    for linear in program.linears():
        paths = linear.paths if isinstance(linear, Site) else (linear.path,)
        found |= dict.fromkeys(paths, linear)
    return found


def _attention(layer: Layer) -> Iterator[Attention | str]:
    for site in attention_sites(layer):
        if isinstance(site, Miss):
            yield site.reason
            continue
        roles = site.linears
        if "kv" in roles:
            yield "its key and value projections are fused"
        elif "qkv" in roles and getattr(site.module, "split_size", None) is None:
            yield "its query, key and value projections are fused in an unknown way"
        else:
            inside = {role: _relative(layer, path) for role, path in roles.items()}
            sizes = (site.heads, site.kv_heads, site.head_dim)
            yield Attention(_relative(layer, site.path), inside, *sizes)


def _networks(layer: Layer) -> Iterator[Network]:
    for branch in residual_branches(layer.graph_module):
        found = feed_forward_of(layer.graph_module, branch)
        if branch.kind == "feed_forward" and found is not None:
            nodes = {"fc1": found.up, "gate": found.gate, "fc2": found.down}
            linears = {role: str(n.target) for role, n in nodes.items() if n is not None}
            yield Network(linears, _function(layer.graph_module, found.activation))


def _function(graph_module: fx.GraphModule, node: fx.Node) -> Activation | None:
    """Return the activation as a function of one tensor; None if it needs more."""
    module = module_of(graph_module, node)
    if module is not None:
        return copy.deepcopy(module).eval()
    alone = len(node.args) == 1 and not any(isinstance(v, fx.Node) for v in node.kwargs.values())
    function: object = node.target
    options = dict(node.kwargs)
    return (lambda x: function(x, **options)) if alone and callable(function) else None


def _relative(layer: Layer, path: str) -> str:
    return path.removeprefix(f"{layer.path}.")


def _refusal(layer: Layer, part: Attention | Network, linears: dict[str, Site | Miss]) -> str:
    """Say why the linears of a part cannot be masked; empty if they can."""
    for path in part.linears.values():
        found = linears.get(f"{layer.path}.{path}")
        if isinstance(found, Miss):
            return f"{path}: {found.reason}"
        if found is None:
            return f"{path} shares its weight with an embedding table"
        if len(found.paths) > 1:
            return f"{path} shares its weight with {', '.join(found.paths[1:])}"
        if not found.module.get_parameter("weight").is_floating_point():
            return f"{path} is quantized: its weights cannot be masked and trained"
    return ""


def matrix(linear: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return the weight (out, in) of a linear, or another tensor in its layout so turned."""
    value = linear.get_parameter("weight") if weight is None else weight
    return value.T if isinstance(linear, Conv1D) else value


def plain(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a linear of the kind of `like` with another weight (out, in) and bias."""
    out, inputs = weight.shape
    made: nn.Module
    with torch.device("meta"):
        if isinstance(like, Conv1D):
            made, weight = Conv1D(out, inputs), weight.T.contiguous()
        else:
            made = nn.Linear(inputs, out, bias=bias is not None)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made.train(like.training)
