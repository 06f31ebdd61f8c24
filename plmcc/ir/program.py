"""The IR: a live transformers model, the sites in it, and its layers as graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plmcc.diagnostics import Location, error
from plmcc.ir.blocks import attention_sites, feed_forward_sites, linear_shape
from plmcc.ir.calibration import Calibration, CalibrationData
from plmcc.ir.layers import Layer, is_rewritten, trace_layer
from plmcc.ir.modules import is_attention, is_linear
from plmcc.ir.sharing import sharing
from plmcc.ir.site import AttentionSite, FeedForwardSite, LinearSite, Miss, Site, TableSite
from plmcc.ir.targets import Matches, Scope, select

_S = TypeVar("_S", bound=Site)
_PROBED_ROWS = 7


class Program:
    """A model as passes see it. Everything is read from the live model when it is called.

    ```python
    program = Program(model)
    for site in program.resolve("input_embeddings", "embedding", expect=1).sites: ...
    ```
    """

    def __init__(self, model: PreTrainedModel, data: CalibrationData | None = None) -> None:
        """`data` are rows that passes may measure on; see `data`."""
        self.model = model
        self.data = Calibration(model, data or CalibrationData())
        """What the model does on the data of the stage, for passes that measure."""

    def tables(self) -> list[TableSite | Miss]:
        """Return the embedding tables; modules that share one parameter are one site.

        The first path of the model's token table is the module that reads the input ids. A module
        that is not a scaled look-up of its rows (offset or computed positions) is a `Miss`.
        """
        return [self._table(paths) for paths in self._groups(nn.Embedding)]

    def linears(self) -> list[LinearSite | Miss]:
        """Return the linear maps (`nn.Linear`, GPT-2's `Conv1D`) except heads tied to a table."""
        groups = self._groups(nn.Linear) + self._groups(Conv1D)
        tied = set(chain.from_iterable(self._groups(nn.Embedding)))
        return [self._linear(paths) for paths in groups if tied.isdisjoint(paths)]

    def attention(self) -> list[AttentionSite | Miss]:
        """Return the attention blocks, self and cross; see `plmcc.ir.blocks.attention_sites`.

        Attention modules outside of traced layers are misses.
        """
        found = list(self._blocks(attention_sites))
        seen = [site.path for site in found]
        return found + [
            Miss(path, "it is outside of the repeated layers")
            for path, module in self.model.named_modules()
            if is_attention(module) and not any(_contains(s, path) for s in seen)
        ]

    def feed_forward(self) -> list[FeedForwardSite | Miss]:
        """Return the feed-forward blocks; see `plmcc.ir.blocks.feed_forward_sites`."""
        return list(self._blocks(feed_forward_sites))

    def layers(self) -> list[Layer | Miss]:
        """Return the repeated blocks as graphs, in the order of the model.

        A block is an element of a list of modules, one of which holds an attention module and has
        weights outside of it; of blocks in blocks, the innermost.
        """
        return [self._trace(path) for path in self.layer_paths()]

    def layer(self, path: str) -> Layer | Miss:
        """Return one layer by its path; a `Miss` if its code cannot be traced."""
        assert self.is_layer(path), f"{path} is not a layer"
        return self._trace(path)

    def is_layer(self, path: str) -> bool:
        """Say whether a path is that of a repeated block, without a walk over the whole model."""
        parent, _, index = path.rpartition(".")
        try:
            stack = self.model.get_submodule(parent)
        except AttributeError:
            return False
        if not isinstance(stack, nn.ModuleList) or index not in stack._modules:
            return False
        inner = (m for m in stack._modules[index].modules() if isinstance(m, nn.ModuleList))
        return _is_stack(stack) and not any(map(_is_stack, inner))

    def layer_paths(self) -> list[str]:
        """Return the paths of the repeated blocks in the order of the model."""
        lists = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and _is_stack(module)
        ]
        return [
            f"{path}.{index}"
            for path, module in lists
            if not any(other.startswith(f"{path}.") for other, _ in lists)
            for index in range(len(module))
        ]

    def _layer_sites(self) -> list[Site | Miss]:
        paths = self.layer_paths()
        modules = [self.model.get_submodule(path) for path in paths]
        pairs = zip(paths, modules, strict=True)
        return [Site("layer", (path,), ("layer",), (module,)) for path, module in pairs]

    def merged(self, layers: Iterable[Site | Miss]) -> Iterator[Site | Miss]:
        """Yield layers, those that share their tensors as one site with the owner first.

        For passes that give all of them the same form; others do not get layers that share.
        """
        paths, owners = self.layer_paths(), dict[str, str]()
        for member, owner in self.sharing().items():
            ends = [next((p for p in paths if _contains(p, at)), "") for at in (member, owner)]
            if all(ends) and ends[0] != ends[1]:
                owners[ends[0]] = ends[1]
        done: set[str] = set()
        for found in layers:
            path = found.path if isinstance(found, Miss) else owners.get(found.path, found.path)
            if isinstance(found, Site) and path not in done:
                whole = (path, *(member for member, owner in owners.items() if owner == path))
                modules = tuple(map(self.model.get_submodule, whole))
                yield Site(found.kind, whole, ("layer",) * len(whole), modules)
            elif isinstance(found, Miss):
                yield found
            done.add(path)

    def sharing(self) -> dict[str, str]:
        """Return the path of the owner for that of each module that uses another's tensors."""
        return sharing(self.model)

    def kinds(self) -> list[str]:
        """Return the kinds of sites that there are."""
        return list(self._readers())

    def candidates(self, kind: str) -> Sequence[Site | Miss]:
        """Return all places of a kind (see `kinds`), those that cannot be rewritten as misses."""
        readers = self._readers()
        assert kind in readers, f"no kind {kind}: {', '.join(readers)}"
        return readers[kind]()

    def _readers(self) -> dict[str, Callable[[], Sequence[Site | Miss]]]:
        return {
            "embedding": self.tables,
            "linear": self.linears,
            "attention": self.attention,
            "feed_forward": self.feed_forward,
            "layer": self._layer_sites,
        }

    def resolve(
        self,
        targets: str | list[str],
        kind: str,
        expect: int | None = None,
        location: Location | str = "targets",
    ) -> Matches:
        """Return the sites of a kind that the targets name.

        Args:
            targets: an alias, a glob over module paths, `re:<regex>` or `class:<Name>`, or a list.
            kind: "embedding", "linear", "attention", "feed_forward" or "layer".
            expect: how many sites there must be.
            location: where the targets were written, for errors.

        Raises:
            PlmccError: a target that matches nothing or only misses, an invalid regex, or another
                number of sites than expected.
        """
        scope = Scope(self.model, kind, self.candidates(kind), location)
        matches = select(scope, [targets] if isinstance(targets, str) else targets)
        if expect is not None and len(matches.sites) != expect:
            raise error(
                "PLM202",
                f"the targets match {len(matches.sites)} sites, expected {expect}",
                location,
                got=", ".join(site.path for site in matches.sites),
                hint="; ".join(f"{miss.path}: {miss.reason}" for miss in matches.misses),
            )
        return matches

    def _groups(self, kind: type[nn.Module]) -> list[list[str]]:
        """Return the paths of modules of a kind, each with all others that share its weight."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        groups: dict[int, list[str]] = {}
        for path, module in modules.items():
            if isinstance(module, nn.Embedding) or is_linear(module):
                weight = module.get_parameter("weight")
                groups.setdefault(id(weight), []).append(path)
        chosen = [g for g in groups.values() if any(isinstance(modules[p], kind) for p in g)]
        first = self.model.get_input_embeddings()
        return [sorted(group, key=lambda path: modules[path] is not first) for group in chosen]

    def _table(self, paths: list[str]) -> TableSite | Miss:
        modules = tuple(self.model.get_submodule(path) for path in paths)
        tables = [module for module in modules if isinstance(module, nn.Embedding)]
        scales = [_lookup_scale(table) for table in tables]
        reason = next((scale for scale in scales if isinstance(scale, str)), None)
        if reason is not None or len(set(scales)) != 1:
            return Miss(paths[0], reason or f"its users scale it differently: {scales}")
        heads = [module for module in modules if isinstance(module, nn.Linear)]
        if len(heads) + len(tables) < len(modules):
            return Miss(paths[0], "it shares its weight with something that is not a head")
        table = tables[0]
        order = sorted(
            paths, key=lambda path: isinstance(self.model.get_submodule(path), nn.Linear)
        )
        ordered = tuple(self.model.get_submodule(path) for path in order)
        return TableSite(
            "embedding",
            tuple(order),
            tuple("head" if isinstance(m, nn.Linear) else "embedding" for m in ordered),
            ordered,
            num_embeddings=table.weight.shape[0],
            embedding_dim=table.weight.shape[1],
            padding_idx=table.padding_idx,
            scale=float(scales[0]),
            head_bias=any(head.bias is not None for head in heads),
            is_input=self.model.get_input_embeddings() in modules,
        )

    def _linear(self, paths: list[str]) -> LinearSite | Miss:
        modules = tuple(self.model.get_submodule(path) for path in paths)
        first = modules[0]
        known = (nn.Linear.forward, Conv1D.forward)
        if any(type(module).forward not in known for module in modules):
            return Miss(paths[0], f"{type(first).__name__} computes more than a linear map")
        in_features, out_features = linear_shape(first)
        return LinearSite(
            "linear",
            tuple(paths),
            ("module",) * len(paths),
            modules,
            in_features=in_features,
            out_features=out_features,
            bias=first.bias is not None,
            transposed=isinstance(first, Conv1D),
        )

    def _blocks(self, read: Callable[[Layer], Iterator[_S | Miss]]) -> Iterator[_S | Miss]:
        for layer in self.layers():
            if isinstance(layer, Miss):
                yield layer
            else:
                yield from read(layer)

    def _trace(self, path: str) -> Layer | Miss:
        recorded = [other.removeprefix(f"{path}.") for other in self._recorded(path)]
        return trace_layer(self.model.get_submodule(path), path, recorded)

    def _recorded(self, layer: str) -> set[str]:
        """Return the paths in a layer whose outputs transformers records with forward hooks."""
        found: set[str] = set()
        parts = layer.split(".")
        for depth in range(len(parts)):
            model = self.model.get_submodule(".".join(parts[:depth]))
            specs = model._can_record_outputs if isinstance(model, PreTrainedModel) else None
            classes, names = _record_targets(list((specs or {}).values()))
            inside = self.model.get_submodule(layer).named_modules(prefix=layer) if specs else ()
            for path, module in inside:
                if isinstance(module, classes) or (names and path.endswith(names)):
                    found.add(path)
        return found


def _record_targets(specs: list[object]) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Split transformers' record specifications into classes and ends of paths."""
    classes: list[type] = []
    names: list[str] = []
    for spec in chain.from_iterable(s if isinstance(s, list) else [s] for s in specs):
        if isinstance(spec, type):
            classes.append(spec)
        elif isinstance(spec, str):
            names.append(spec)
        else:
            classes += [spec.target_class] if spec.target_class else []
            names += [spec.class_name] if spec.class_name else []
    return tuple(classes), tuple(names)


def _lookup_scale(table: nn.Embedding) -> float | str:
    """Return the factor between a table's rows and what its module returns, or why there is none.

    The module is tried on random rows of its own: rows of a trained table can be zero. On the meta
    device a scale that is a buffer has no value, and is taken for 1.
    """
    weight = table.weight
    if type(table).forward is nn.Embedding.forward and table.max_norm is None:
        return 1.0
    count = min(_PROBED_ROWS, table.num_embeddings)
    generator = torch.Generator().manual_seed(0)
    # Powers of two, so that the product with a scale is exact in every dtype.
    powers = torch.randint(-2, 3, (2, count, table.embedding_dim), generator=generator)
    rows = (powers[0].float().exp2() * powers[1].sign().add(0.5).sign()).to(weight.dtype)
    rows = rows if weight.is_meta else rows.to(weight.device)
    known = {id(b): torch.ones(b.shape, dtype=b.dtype) for b in table.buffers() if b.is_meta}
    known[id(weight)] = nn.Parameter(rows.clone(), requires_grad=False)
    probe = copy.deepcopy(table, known)
    try:
        with torch.no_grad():
            output = probe.eval()(torch.arange(count, device=rows.device)[None])
    except Exception as reason:  # the module's own code
        return f"{type(table).__name__} does not look up rows by id: {reason}"
    if output.shape != (1, count, table.embedding_dim):
        return f"{type(table).__name__} does not return one row for each id"
    scales = (output[0] / rows).unique()
    if scales.numel() != 1:
        return f"{type(table).__name__} computes more than a scaled look-up of its rows"
    return float(scales)


def _is_stack(modules: nn.ModuleList) -> bool:
    return any(_is_block(child) for child in modules)


def _is_block(module: nn.Module) -> bool:
    """Say whether a module holds attention, and weights outside of its attention modules.

    A layer that was put back stays one, whatever a pass has left in it.
    """
    if is_rewritten(module):
        return True
    attention = [child for child in module.modules() if is_attention(child)]
    # Integers that a pass has put in the place of weights are buffers.
    inside = {id(t) for child in attention for t in (*child.parameters(), *child.buffers())}
    tensors = chain(module.parameters(), module.buffers())
    outside = (t for t in tensors if t.dim() > 1 and id(t) not in inside)
    return bool(attention) and next(outside, None) is not None


def _contains(path: str, other: str) -> bool:
    return other == path or other.startswith(f"{path}.")
