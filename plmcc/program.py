"""The IR: a live transformers model, the sites in it, and its layers as graphs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plmcc.api import Miss, Site
from plmcc.blocks import attention_sites, feed_forward_sites, linear_shape
from plmcc.diagnostics import Place, error
from plmcc.kinds import is_attention, is_linear
from plmcc.layers import Layer, is_rewritten, trace_layer
from plmcc.probes import probe_inputs
from plmcc.targets import Matches, Scope, select
from plmcc.tracer import signature

_PROBED_ROWS = 7
_PROBES, _PROBED_TOKENS = 10, 32


class Program:
    """A model as passes see it. Everything is read from the live model when it is called.

    ```python
    program = Program(model)
    for site in program.resolve("input_embeddings", "embedding", expect=1).sites: ...
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[dict[str, torch.Tensor]] = (),
        counts: torch.Tensor | None = None,
    ) -> None:
        """`batches` are inputs of the model that passes may fit to; probe inputs if there are
        none. `counts` (n,) says how often tokens occur in the data that the stage trains on; ids
        from n on do not."""
        self.model = model
        self.batches, self.counts = batches, counts

    def tables(self) -> list[Site | Miss]:
        """Return the embedding tables; modules that share one parameter are one site.

        The first path of the model's token table is the module that reads the input ids. Facts:
        `num_embeddings`, `embedding_dim`, `padding_idx`, `scale` (output = scale * row),
        `head_bias` (whether a head adds one), `is_input` (whether it is the token table). A module
        that is not a scaled look-up of its rows (offset or computed positions) is a `Miss`.
        """
        return [self._table(paths) for paths in self._groups(nn.Embedding)]

    def linears(self) -> list[Site | Miss]:
        """Return the linear maps (`nn.Linear`, GPT-2's `Conv1D`) except heads tied to a table.

        Facts: `in_features`, `out_features`, `bias`, `transposed` (whether the weight is
        `[in, out]`).
        """
        groups = self._groups(nn.Linear) + self._groups(Conv1D)
        tied = set(chain.from_iterable(self._groups(nn.Embedding)))
        return [self._linear(paths) for paths in groups if tied.isdisjoint(paths)]

    def attention(self) -> list[Site | Miss]:
        """Return the attention blocks, self and cross; see `plmcc.blocks.attention_sites`.

        Attention modules outside of traced layers are misses.
        """
        found = list(self._blocks(attention_sites))
        seen = [site.path for site in found]
        return found + [
            Miss(path, "it stands outside of the repeated layers")
            for path, module in self.model.named_modules()
            if is_attention(module) and not any(_contains(s, path) for s in seen)
        ]

    def feed_forward(self) -> list[Site | Miss]:
        """Return the feed-forward blocks; see `plmcc.blocks.feed_forward_sites`."""
        return list(self._blocks(feed_forward_sites))

    def layers(self) -> list[Layer | Miss]:
        """Return the repeated blocks as graphs, in the order of the model.

        A block is an element of a list of modules, one of which holds an attention module and has
        weights outside of it; of blocks in blocks, the innermost.
        """
        recorded = self._recorded()
        return [self._trace(path, recorded) for path in self.layer_paths()]

    def layer(self, path: str) -> Layer | Miss:
        """Return one layer by its path; a `Miss` if its code cannot be traced."""
        assert path in self.layer_paths(), f"{path} is not a layer"
        return self._trace(path, self._recorded())

    def layer_paths(self) -> list[str]:
        """Return the paths of the repeated blocks in the order of the model."""
        lists = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and any(_is_block(child) for child in module)
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

    def replace_layer(self, path: str, graph_module: fx.GraphModule) -> Callable[[], None]:
        """Make a layer run a rewritten graph. Return a function that undoes it.

        The graph replaces the layer's first variant (the fullest call). Calls of other kinds, for
        which the layer had other variants, become errors: they would run without the rewriting.
        """
        layer = self.layer(path)
        assert isinstance(layer, Layer), layer
        return layer.only(graph_module).put_back()

    def record(self, path: str) -> list[dict[str, Any]]:
        """Run the model on the batches; return the arguments that a layer is called with.

        The cache is left out, and every argument has its name.
        """
        calls: list[dict[str, Any]] = []
        layer = self.model.get_submodule(path)
        names = [parameter.name for parameter in signature(layer)]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append({**dict(zip(names, args, strict=False)), **kwargs})

        hook = layer.register_forward_pre_hook(note, with_kwargs=True)
        batches = self.batches or self._made_up()
        mode = self.model.training
        forward = inspect.signature(self.model.forward).parameters
        options = {"use_cache": False} if "use_cache" in forward else {}
        try:
            self.model.eval()
            with torch.no_grad():
                for batch in batches:
                    given = {name: value.to(self.model.device) for name, value in batch.items()}
                    self.model(**given, **options)
        finally:
            hook.remove()
            self.model.train(mode)
        assert calls, f"the model never ran {path}"
        return calls

    def _made_up(self) -> list[dict[str, torch.Tensor]]:
        config = self.model.config
        names = ("max_position_embeddings", "max_target_positions", "n_positions")
        limits = [getattr(config, name) for name in names if getattr(config, name, None)]
        length = min([_PROBED_TOKENS, *limits])
        return [probe_inputs(self.model, 16, length, seed) for seed in range(_PROBES)]

    def kinds(self) -> list[str]:
        """Return the kinds of sites that there are."""
        return list(self._readers())

    def candidates(self, kind: str) -> list[Site | Miss]:
        """Return all places of a kind (see `kinds`), those that cannot be rewritten as misses."""
        readers = self._readers()
        assert kind in readers, f"no kind {kind}: {', '.join(readers)}"
        return readers[kind]()

    def _readers(self) -> dict[str, Callable[[], list[Site | Miss]]]:
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
        place: Place | str = "targets",
    ) -> Matches:
        """Return the sites of a kind that the targets name.

        Args:
            targets: an alias, a glob over module paths, `re:<regex>` or `class:<Name>`, or a list.
            kind: "embedding", "linear", "attention", "feed_forward" or "layer".
            expect: how many sites there must be.
            place: where the targets were written, for errors.

        Raises:
            PlmccError: a target that matches nothing or only misses, an invalid regex, or another
                number of sites than expected.
        """
        scope = Scope(self.model, kind, self.candidates(kind), place)
        matches = select(scope, [targets] if isinstance(targets, str) else targets)
        if expect is not None and len(matches.sites) != expect:
            raise error(
                "PLM202",
                f"the targets match {len(matches.sites)} sites, expected {expect}",
                place,
                given=", ".join(site.path for site in matches.sites),
                cure="; ".join(f"{miss.path}: {miss.reason}" for miss in matches.misses),
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

    def _table(self, paths: list[str]) -> Site | Miss:
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
        facts = {
            "num_embeddings": table.weight.shape[0],
            "embedding_dim": table.weight.shape[1],
            "padding_idx": table.padding_idx,
            "scale": scales[0],
            "head_bias": any(head.bias is not None for head in heads),
            "is_input": self.model.get_input_embeddings() in modules,
        }
        order = sorted(
            paths, key=lambda path: isinstance(self.model.get_submodule(path), nn.Linear)
        )
        modules = tuple(self.model.get_submodule(path) for path in order)
        roles = tuple("head" if isinstance(m, nn.Linear) else "embedding" for m in modules)
        return Site("embedding", tuple(order), roles, modules, facts)

    def _linear(self, paths: list[str]) -> Site | Miss:
        modules = tuple(self.model.get_submodule(path) for path in paths)
        first = modules[0]
        known = (nn.Linear.forward, Conv1D.forward)
        if any(type(module).forward not in known for module in modules):
            return Miss(paths[0], f"{type(first).__name__} computes more than a linear map")
        in_features, out_features = linear_shape(first)
        facts = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": first.bias is not None,
            "transposed": isinstance(first, Conv1D),
        }
        return Site("linear", tuple(paths), ("module",) * len(paths), modules, facts)

    def _blocks(self, read: Callable[[Layer], Iterator[Site | Miss]]) -> Iterator[Site | Miss]:
        for layer in self.layers():
            if isinstance(layer, Miss):
                yield layer
            else:
                yield from read(layer)

    def _trace(self, path: str, recorded: set[str]) -> Layer | Miss:
        inside = [other.removeprefix(f"{path}.") for other in recorded if _contains(path, other)]
        return trace_layer(self.model.get_submodule(path), path, inside)

    def _recorded(self) -> set[str]:
        """Return the paths of modules whose outputs transformers records with forward hooks."""
        found: set[str] = set()
        for prefix, model in self.model.named_modules():
            specs = model._can_record_outputs if isinstance(model, PreTrainedModel) else None
            classes, names = _record_targets(list((specs or {}).values()))
            for path, module in model.named_modules(prefix=prefix) if specs else ():
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
