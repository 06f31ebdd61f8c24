"""Places in a model: those that a pass can rewrite (`Site`), and those that it refuses (`Miss`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A place in a model that a pass can rewrite: one module, or several tied by one weight.

    `paths[i]` is the module path and `roles[i]` what the module does there: "embedding" (looks up
    rows), "head" (multiplies by the transposed table), "layer" (a repeated block, rewritten through
    its graph) or "module" (anything else). The first path is the primary: the replacement goes
    there, and the other paths become views of it.

    A subclass holds what matching found out. A pass that needs more than the subclasses below
    derives one of its own; nothing else travels from `match` to `replace`.
    """

    kind: str
    paths: tuple[str, ...]
    roles: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)
    warning: str = field(default="", kw_only=True)
    """What the user should know although the pass rewrites it: one sentence."""

    @property
    def path(self) -> str:
        """The primary module path."""
        return self.paths[0]

    @property
    def module(self) -> nn.Module:
        """The module at the primary path."""
        return self.modules[0]


@dataclass(frozen=True)
class TableSite(Site):
    """An embedding table (V, D) with all modules that use it."""

    num_embeddings: int = field(kw_only=True)
    """V."""
    embedding_dim: int = field(kw_only=True)
    """D."""
    padding_idx: int | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    """The module returns `scale * row`."""
    head_bias: bool = field(default=False, kw_only=True)
    """Whether a tied head adds a bias."""
    is_input: bool = field(default=False, kw_only=True)
    """Whether it is the token table: its primary module reads the input ids."""
    counts: Tensor | None = field(default=None, kw_only=True, repr=False)
    """How often each token occurs in the training data (n,), n <= V; None without data."""


@dataclass(frozen=True)
class LinearSite(Site):
    """A linear map: `nn.Linear`, or GPT-2's `Conv1D`."""

    in_features: int = field(kw_only=True)
    out_features: int = field(kw_only=True)
    bias: bool = field(kw_only=True)
    transposed: bool = field(kw_only=True)
    """Whether the weight is (in, out), as in `Conv1D`."""


@dataclass(frozen=True)
class BlockSite(Site):
    """A sub-layer of a layer."""

    linears: dict[str, str] = field(kw_only=True)
    """Paths of its linear maps by role."""
    layer: str = field(kw_only=True)
    """Path of the layer."""
    norm: str | None = field(kw_only=True)
    """Path of the norm of its residual branch."""
    position: str = field(kw_only=True)
    """Where that norm is: "pre", "post", "none", or "inside" when the module itself adds its input
    and normalizes."""


@dataclass(frozen=True)
class AttentionSite(BlockSite):
    """An attention module. Roles: `q`, `k`, `v`, `o`; fused projections are `qkv`, or `kv`."""

    heads: int = field(kw_only=True)
    kv_heads: int = field(kw_only=True)
    head_dim: int = field(kw_only=True)
    is_cross: bool = field(kw_only=True)


@dataclass(frozen=True)
class FeedForwardSite(BlockSite):
    """A feed-forward network; its paths are its linear maps. Roles: `fc1`, `gate`, `fc2`."""

    activation: str = field(kw_only=True)
    """Name of the class or function."""


@dataclass(frozen=True)
class StackSite(Site):
    """A list of repeated layers; its role is "layer"."""

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        assert isinstance(self.module, nn.ModuleList)
        return self.module


@dataclass(frozen=True)
class Miss:
    """A place that a pass looked at and refused, with the sentence that the user reads."""

    path: str
    reason: str
