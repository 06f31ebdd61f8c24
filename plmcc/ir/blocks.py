"""Attention and feed-forward blocks as sites, read from the graphs of traced layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from plmcc.ir.branches import (
    Branch,
    feed_forward_of,
    is_cross,
    module_of,
    residual_branches,
)
from plmcc.ir.layers import Layer
from plmcc.ir.modules import is_attention, is_linear, is_norm
from plmcc.ir.site import AttentionSite, FeedForwardSite, Miss
from plmcc.utils.types import Values

_PROJECTIONS = {
    "q": ("q", "query", "q_proj", "q_lin", "q_attn", "wq", "query_proj"),
    "k": ("k", "key", "k_proj", "k_lin", "wk", "key_proj"),
    "v": ("v", "value", "v_proj", "v_lin", "wv", "value_proj"),
    "o": ("o", "dense", "o_proj", "out_proj", "out_lin", "c_proj", "wo", "Wo"),
    "qkv": ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj"),
}
"""What attention modules call their projections."""
_COMPLETE = ({"q", "k", "v", "o"}, {"qkv", "o"}, {"q", "kv", "o"})
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


def attention_sites(layer: Layer) -> Iterator[AttentionSite | Miss]:
    """Yield the attention blocks of a layer, self-attention and cross-attention."""
    graph_module = layer.graph_module
    branches = residual_branches(graph_module)
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if module is not None and is_attention(module):
            around = next((b for b in branches if node in b.nodes), None)
            yield _attention(layer, node, module, around)


def feed_forward_sites(layer: Layer) -> Iterator[FeedForwardSite | Miss]:
    """Yield the feed-forward blocks of a layer: `fc1`, `gate` (in gated networks) and `fc2`."""
    branches = residual_branches(layer.graph_module)
    found = [branch for branch in branches if branch.kind == "feed_forward"]
    for branch in found:
        yield _feed_forward(layer, branch)
    if not found:
        yield Miss(layer.path, "no residual branch has the form linear-activation-linear")


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return the in and out features of an `nn.Linear` or `Conv1D`."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def _attention(
    layer: Layer, node: fx.Node, module: nn.Module, around: Branch | None
) -> AttentionSite | Miss:
    path = f"{layer.path}.{node.target}"
    roles = _projections(module, str(node.target))
    linears = [name for name, child in module.named_modules() if is_linear(child)]
    unknown = len(linears) > len(roles)
    if around is not None and "o" not in roles:
        roles |= _output_projection(layer.graph_module, node, around)
    if set(roles) not in _COMPLETE or unknown:
        return Miss(path, f"its projections are not recognized: {', '.join(linears) or 'none'}")
    inside = around is None and any(is_norm(child) for child in module.children())
    if around is not None and around.kind == "other":
        return Miss(path, "its residual branch contains more than attention")
    if around is None and not inside:
        return Miss(path, "its output is not added to its input (no residual branch)")
    width = next((w for n in _HEAD_DIM if (w := getattr(module, n, None)) is not None), None)
    if not isinstance(width, int):
        return Miss(path, "the width of its heads is unknown")
    projections = {role: layer.module.get_submodule(name) for role, name in roles.items()}
    return AttentionSite(
        "attention",
        (path,),
        ("module",),
        (module,),
        linears={role: f"{layer.path}.{name}" for role, name in roles.items()},
        is_cross=is_cross(node),
        **_heads(projections, width),
        **_surroundings(layer, around) | ({"position": "inside"} if inside else {}),
    )


def _projections(module: nn.Module, path: str) -> dict[str, str]:
    """Return role -> path of the linears inside an attention module."""
    names = [name for name, child in module.named_children() if is_linear(child)]
    found = {
        role: f"{path}.{n}" for role, known in _PROJECTIONS.items() for n in names if n in known
    }
    if "q" in found and "qkv" in found:
        found["kv"] = found.pop("qkv")
    return found


def _output_projection(
    graph_module: fx.GraphModule, node: fx.Node, around: Branch
) -> dict[str, str]:
    """Return the linear that stands between the attention module and the addition (BERT)."""
    after = around.nodes[around.nodes.index(node) :]
    found = [n for n in after if is_linear(module_of(graph_module, n))]
    return {"o": str(found[0].target)} if len(found) == 1 else {}


def _heads(linears: dict[str, nn.Module], width: int) -> Values:
    """Return the numbers of heads; the output projection reads as many columns as queries have."""
    heads = linear_shape(linears["o"])[0] // width
    if "k" in linears:
        kv_heads = linear_shape(linears["k"])[1] // width
    elif "kv" in linears:
        kv_heads = linear_shape(linears["kv"])[1] // (2 * width)
    else:
        kv_heads = (linear_shape(linears["qkv"])[1] // width - heads) // 2
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": width}


def _feed_forward(layer: Layer, branch: Branch) -> FeedForwardSite:
    found = feed_forward_of(layer.graph_module, branch)
    assert found is not None, "a branch of this kind has these parts"
    nodes = {"fc1": found.up, "gate": found.gate, "fc2": found.down}
    roles = {role: str(node.target) for role, node in nodes.items() if node is not None}
    modules = tuple(layer.module.get_submodule(name) for name in roles.values())
    paths = {role: f"{layer.path}.{name}" for role, name in roles.items()}
    activation = module_of(layer.graph_module, found.activation)
    name = type(activation).__name__ if activation is not None else found.activation.name
    return FeedForwardSite(
        "feed_forward",
        tuple(paths.values()),
        ("module",) * len(paths),
        modules,
        linears=paths,
        activation=name,
        **_surroundings(layer, branch),
    )


def _surroundings(layer: Layer, around: Branch | None) -> Values:
    norm = around.norm if around is not None else None
    return {
        "layer": layer.path,
        "norm": f"{layer.path}.{norm.target}" if norm is not None else None,
        "position": around.position if around is not None else "none",
    }
