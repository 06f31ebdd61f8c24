"""What is left of the layers of a model, found layer by layer (a helper of the pass)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from plmcc.api import Call, Program, Site
from plmcc.kit import Progress, Replay
from plmcc.kit.configured import Sizes
from plmcc.kit.heads import resize
from plmcc.kit.parts import Attention, Network, Parts, matrix, plain
from plmcc.passes.structured_pruning.elimination import Reader, Refit

Importance = Literal["elimination", "activations", "taylor"]
Part = Attention | Network
Curve = list[tuple[int, float]]
"""How many groups go at a time, and what each of them costs."""
_ROLES = ("o", "fc2")
"""The linears that read heads and neurons; the others make them."""


@dataclass(frozen=True)
class PrunableSite(Site):
    """A layer, the groups that each of its parts keeps, and the entries of the configuration that
    say so."""

    parts: Parts = field(kw_only=True, repr=False)
    counts: tuple[int, ...] = field(kw_only=True)
    """Key-value groups of heads, or neurons, in the order of `Parts.every`."""
    sizes: Sizes = field(kw_only=True)
    cuts: Cuts = field(kw_only=True, repr=False)
    """Shared by all layers of a pass."""


@dataclass
class Cut:
    """A layer's linears by path as they will be, and the numbers of the heads that each attention
    module keeps."""

    linears: dict[str, nn.Module] = field(default_factory=dict)
    heads: list[list[int]] = field(default_factory=list)
    neurons: list[int] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of what each part adds to the hidden states, on calibration data."""

    def put(self, layer: nn.Module, parts: Parts) -> None:
        """Give a layer the smaller linears."""
        for path, linear in self.linears.items():
            layer.set_submodule(path, linear)
        for block, kept in zip(parts.attention, self.heads, strict=True):
            if len(kept) < block.heads:
                resize(layer.get_submodule(block.path), block, kept)


@dataclass
class Cuts:
    """The cuts of all layers: made together, when the first is asked for."""

    importance: Importance
    reconstruct: bool
    budget: Callable[[list[list[Curve]]], list[list[int]]] | None = None
    """For counts of each layer's own: what all layers keep, by what their groups cost."""
    _found: dict[str, Cut] = field(default_factory=dict)

    def of(self, site: PrunableSite, program: Program) -> Cut:
        """Return what is left of a layer. The model stays as it is."""
        if site.path not in self._found:
            sites = [one for one in program.data.sites if isinstance(one, PrunableSite)]
            self._find(program, sites if site in sites else [site])
        return self._found[site.path]

    def _find(self, program: Program, sites: Sequence[PrunableSite]) -> None:
        if self.budget is not None:
            sites = self._with_own_counts(program, sites)
        scores = taylor(program, sites) if self.importance == "taylor" else {}
        stacks = groupby(sites, key=lambda one: one.path.rpartition(".")[0])
        with ExitStack() as undo, Progress("structured_pruning") as progress:
            for _, group in stacks:
                layers = list(group)
                replay = Replay(program.data, [one.module for one in layers])
                for index, site in enumerate(layers):
                    cut = Cut()
                    for number, part in enumerate(site.parts.every()):
                        reader = self._seen(program, replay, index, site, part)
                        kept = self._kept(reader, site, number, scores)
                        _cut(site.module, part, reader.refitted(kept, self.reconstruct), cut)
                        undo.enter_context(_in_place(site.module, part, cut))
                    replay.advance(index)
                    self._found[site.path] = cut
                    progress.step("layers", len(self._found) / len(sites))

    def _with_own_counts(
        self, program: Program, sites: Sequence[PrunableSite]
    ) -> list[PrunableSite]:
        """Return the sites with the counts that cost least together, on the layers as they are."""
        curves: list[list[Curve]] = []
        for _, group in groupby(sites, key=lambda one: one.path.rpartition(".")[0]):
            layers = list(group)
            replay = Replay(program.data, [one.module for one in layers])
            for index, site in enumerate(layers):
                parts = site.parts.every()
                seen = [self._seen(program, replay, index, site, part) for part in parts]
                curves.append([one.eliminated(max(1, one.groups // 8))[1] for one in seen])
                replay.advance(index)
        assert self.budget is not None
        counts = self.budget(curves)
        return [replace(s, counts=tuple(own)) for s, own in zip(sites, counts, strict=True)]

    def _seen(
        self, program: Program, replay: Replay, index: int, site: PrunableSite, part: Part
    ) -> Reader:
        """Return what reads a part, with the second moment of its inputs in the layers as they are
        now."""
        linear = site.module.get_submodule(reader_of(part))
        reader = Reader.of(linear, part.head_dim if isinstance(part, Attention) else 1)
        if isinstance(part, Attention):
            reader.width *= part.heads // part.kv_heads

        held: list[Tensor] = []

        def note(module: nn.Module, call: Call) -> None:
            if module is linear:
                held.append(program.data.real_tokens(call.input))
            else:
                reader.see(held.pop(), program.data.real_tokens(call.result))

        replay.observe(index, [linear, site.module], note)
        return reader

    def _kept(
        self, reader: Reader, site: PrunableSite, number: int, scores: dict[nn.Module, Tensor]
    ) -> Tensor:
        keep = site.counts[number]
        if keep >= reader.groups:
            return torch.arange(reader.groups, device=reader.weight_ON.device)
        if self.importance == "elimination":
            return reader.eliminated(keep)[0]
        linear = site.module.get_submodule(reader_of(site.parts.every()[number]))
        score = scores.get(linear)
        score = reader.norms() if score is None else score
        return score.topk(keep).indices.sort().values


def reader_of(part: Part) -> str:
    """Return the path of the linear that reads heads or neurons."""
    return next(path for role, path in part.linears.items() if role in _ROLES)


def taylor(program: Program, sites: Sequence[PrunableSite]) -> dict[nn.Module, Tensor]:
    """Return E[(Σ g x)²] over calibration batches for each group of what readers read: how much the
    loss changes when it is left out, to first order (Molchanov et al., CVPR 2019, 1906.10771)."""
    widths: dict[nn.Module, int] = {}
    for site in sites:
        for part in site.parts.every():
            one = part.head_dim * part.heads // part.kv_heads if isinstance(part, Attention) else 1
            widths[site.module.get_submodule(reader_of(part))] = one
    scores: dict[nn.Module, Tensor] = {}

    def watch(linear: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BLN = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()

        def note(gradient_BLN: Tensor) -> None:
            change_BN = (gradient_BLN * x_BLN.detach()).float().flatten(1, -2).sum(1)
            found = change_BN.unflatten(1, (-1, widths[linear])).sum(2).square().sum(0)
            scores[linear] = scores.get(linear, torch.zeros_like(found)) + found

        x_BLN.register_hook(note)
        return (x_BLN, *given[1:])

    hooks = [linear.register_forward_pre_hook(watch) for linear in widths]
    try:
        program.data.run(gradients=True)
    finally:
        for hook in hooks:
            hook.remove()
    return scores


@torch.no_grad()
def _cut(layer: nn.Module, part: Part, refit: Refit, cut: Cut) -> None:
    """Add to a cut what a part of a layer becomes."""
    kept = refit.kept
    if isinstance(part, Attention):
        ratio = part.heads // part.kv_heads
        cut.heads.append([g * ratio + i for g in kept.tolist() for i in range(ratio)])
        if len(kept) == part.kv_heads:
            return
    else:
        cut.neurons.append(len(kept))
        if len(kept) == len(matrix(layer.get_submodule(part.linears["fc1"]))):
            return
    cut.errors["attention" if isinstance(part, Attention) else "feed_forward"] = refit.error
    for role, path in part.linears.items():
        old = layer.get_submodule(path)
        weight, bias = matrix(old).detach(), getattr(old, "bias", None)
        if role in _ROLES:
            new, added = refit.weight_OK.to(weight), refit.bias_O
            bias = None if added is None else added.to(weight)
        else:
            rows = _rows(part, role, kept, len(weight))
            new, bias = weight[rows], None if bias is None else bias.detach()[rows]
        made = plain(old, new.contiguous(), bias)
        made.requires_grad_(old.get_parameter("weight").requires_grad)
        cut.linears[path] = made


def _rows(part: Part, role: str, kept: Tensor, rows: int) -> Tensor:
    """Return the rows of a linear that make the groups that are kept."""
    times = 3 if role == "qkv" else 1
    groups = part.kv_heads if isinstance(part, Attention) else rows
    width = rows // times // groups
    steps = torch.arange(width, device=kept.device)
    one = (kept[:, None] * width + steps).flatten()
    return torch.cat([one + i * groups * width for i in range(times)])


@contextmanager
def _in_place(layer: nn.Module, part: Part, cut: Cut) -> Iterator[None]:
    """Let a layer run without what was cut of a part."""
    before = {path: layer.get_submodule(path) for path in part.linears.values()}
    undo: Callable[[], None] = lambda: None  # noqa: E731
    for path in before:
        layer.set_submodule(path, cut.linears.get(path, before[path]))
    if isinstance(part, Attention) and len(cut.heads[-1]) < part.heads:
        module = layer.get_submodule(part.path)
        state, kind = dict(vars(module)), type(module)
        modules = dict(module._modules)
        resize(module, part, cut.heads[-1])

        def undo() -> None:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            module._modules.clear()
            module._modules.update(modules)

    try:
        yield
    finally:
        undo()
        for path, linear in before.items():
            layer.set_submodule(path, linear)
