"""Structured pruning: attention heads and neurons go at once, chosen on calibration data.

Of the linear map that reads heads or neurons, some inputs are left out, and its other columns are
fitted anew to what it returned before, in closed form (Kurtic, Frantar and Alistarh, "ZipLM",
NeurIPS 2023, 2302.04089; Meng et al., "OSSCAR", 2403.12983). What costs least goes: by elimination
with that fit, by norm of weight times norm of activation (An et al., "FLAP", 2312.11983; "Wanda" by
Sun et al., 2306.11695), or by gradient times activation (Molchanov et al., CVPR 2019, 1906.10771).
Layers are cut in the order of the model, each on what the cut ones below it give. By default all
layers of a decoder-only model get the same sizes, and the result is an ordinary checkpoint (as in
Muralidharan et al., "Minitron", 2407.14679). Matches layers with attention or feed-forward network.
Stored: the smaller matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from plmcc.api import Hard, Miss, Pass, Planned, Program, Site, Soft, refuse_unused
from plmcc.kit.configured import Sizes, configure, sizes_for
from plmcc.kit.heads import resize
from plmcc.kit.parts import Attention, Parts, by_path, matrix, plain, read
from plmcc.passes.structured_pruning.cuts import Cut, Cuts, Part, PrunableSite
from plmcc.passes.structured_pruning.sizes import Counts, Layer, counts_for, counts_of_least_cost

_KEPT = 0.8
_TOLERANCE = 0.05
"""How far what is left may be from what was asked."""


class Target(BaseModel):
    """What the layers are to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the layers' parameters to keep."
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="Fraction of FLOPs per token to keep, attention included."
    )
    length: int = Field(128, ge=1, description="For `flops`: tokens in a sequence.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        if (self.parameters is None) == (self.flops is None):
            raise ValueError("give one of `parameters` and `flops`")
        refuse_unused(self, {"length": self.flops is not None}, "on this target")
        return self


class StructuredPruning(Pass):
    """Remove attention heads and neurons in one step, and refit what reads them."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Kurtic et al., NeurIPS 2023, arXiv:2302.04089; arXiv:2407.14679"
    hazards: ClassVar[tuple[str, ...]] = (
        "Without training afterwards, small language models lose much: distill the result.",
        "What is removed is what the calibration text does not need: use text like your own.",
    )

    targets: str | list[str] = "layers"
    """The layers to prune."""
    target: Target = Target(parameters=_KEPT)
    """What the layers keep together."""
    remove: list[Literal["neurons", "heads"]] = Field(["neurons"], min_length=1)
    """What goes: neurons of feed-forward networks, attention heads (with all that share their keys
    and values), or the same part of both."""
    importance: Literal["elimination", "activations", "taylor"] = "elimination"
    """What stays: by what leaving it out costs after refitting the rest (`elimination`), by its
    norm of weight times norm of activation (`activations`), or by gradient times activation
    (`taylor`), which runs the model backwards."""
    reconstruct: bool = True
    """Refit the matrices that read what is cut, by ridge regression on the calibration data."""
    scope: Literal["layer", "global"] = "layer"
    """`layer`: each layer loses the same part. `global`: layers lose more where it costs less, by
    the error after elimination, relative to their hidden states; then layers differ."""
    uniform: bool | None = None
    """All layers get the same sizes, which the configuration holds: the result is an ordinary
    checkpoint. By default for models with a decoder only."""
    multiple_of: int | None = Field(None, ge=1)
    """The number of neurons is a multiple of this: by default 64, less in narrow layers. Odd
    numbers cost GPUs more than they save."""
    text: str | list[str] = Field(default_factory=list)
    """A file of raw text, or several, to measure on; by default the data of `calibrate`, or of the
    next stage that trains."""

    @model_validator(mode="after")
    def _multiple_is_used(self) -> StructuredPruning:
        used = {"multiple_of": "neurons" in self.remove}
        refuse_unused(self, used, "unless `remove` has neurons")
        if self.scope == "global" and self.uniform:
            raise ValueError("`scope: global` gives layers different sizes: remove `uniform`")
        return self

    def calibrates_on(self) -> list[str]:
        """The files of `text`."""
        return [self.text] if isinstance(self.text, str) else self.text

    def needs_data(self) -> str:
        """What can go is measured."""
        return "what can be removed is measured on text"

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the layers with what they will keep."""
        linears = by_path(program)
        sites: list[Site] = []
        every: list[Layer] = []
        for site in program.resolve(self.targets, "layer", self.expect):
            parts = site if isinstance(site, Miss) else read(program, site.path, linears)
            if isinstance(site, Miss) or isinstance(parts, Miss):
                assert isinstance(parts, Miss)
                yield parts
            elif reason := self._lacking(parts):
                yield Miss(site.path, reason)
            else:
                sites.append(site)
                every.append(Layer(site.module, parts))
        if sites:
            yield from self._sized(program, sites, every)

    def _lacking(self, parts: Parts) -> str:
        """Say why nothing of what is to be removed can be; empty if it can."""
        if self._wanted(parts).every():
            return ""
        reasons = "; ".join(parts.refused)
        return reasons or f"it has none of what `remove` names: {', '.join(self.remove)}"

    def _wanted(self, parts: Parts) -> Parts:
        heads, neurons = ("heads" in self.remove, "neurons" in self.remove)
        networks = parts.networks if neurons else ()
        return Parts(parts.attention if heads else (), networks, parts.refused)

    def _sized(
        self, program: Program, sites: Sequence[Site], every: Sequence[Layer]
    ) -> Iterator[Site | Miss]:
        length = self._length()
        layers = [Layer(one.module, self._wanted(one.parts)) for one in every]
        own, total = (sum(x.whole(length) for x in some) for some in (layers, every))
        part = own / total  # FLOPs are counted of all parts, whatever is removed
        share = 1 - (1 - self._asked()) / part
        found = self._counted(program, sites, layers, share, part)
        if isinstance(found, str):
            yield from (Miss(site.path, found) for site in sites)
            return
        counts, sizes = found
        budget = partial(
            counts_of_least_cost,
            layers=layers,
            share=share,
            multiple_of=self.multiple_of,
            length=length,
        )
        whole = self.scope == "global"
        cuts = Cuts(self.importance, self.reconstruct, budget if whole else None)
        for site, layer, kept in zip(sites, layers, counts.kept, strict=True):
            place = (site.kind, site.paths, site.roles, site.modules)
            yield PrunableSite(
                *place, parts=layer.parts, counts=tuple(kept), sizes=sizes, cuts=cuts
            )

    def _asked(self) -> float:
        return self.target.parameters or self.target.flops or _KEPT

    def _length(self) -> int | None:
        return self.target.length if self.target.flops else None

    def _counted(
        self,
        program: Program,
        sites: Sequence[Site],
        layers: Sequence[Layer],
        share: float,
        part: float,
    ) -> tuple[Counts, Sizes] | str:
        """Return what layers keep, with the entries of the configuration that say it where all keep
        the same; or why the target cannot be met."""
        asked = self._asked()
        count = partial(counts_for, layers, share, self.remove, self.multiple_of, self._length())
        counts = count()
        sizes: Sizes | None = {}
        if not isinstance(counts, Counts):
            what, least = " and ".join(self.remove), 1 - (1 - counts) * part
            return f"{asked:g} of these layers is asked for; without {what} {least:.3g} is left"
        if all(layer.groups(p) == n for layer, n, p in _pairs(layers, counts)):
            return f"{asked:g} of these layers is all of them, in the multiples that are kept"
        if self._is_uniform(program):
            # Some configurations refuse numbers of heads that do not divide the hidden size.
            for tried in _near(layers, counts):
                counts = count(tried)
                assert isinstance(counts, Counts)
                sizes, reason = _uniform(program, sites, layers, counts)
                if not reason:
                    break
            else:
                return reason
        left = 1 - (1 - counts.left) * part
        if abs(left - asked) > _TOLERANCE:
            return (
                f"the nearest to {asked:g} that can be kept is {left:.2g}, in whole heads and "
                "multiples of neurons: ask for that, or change `remove`"
            )
        return counts, sizes or {}

    def _is_uniform(self, program: Program) -> bool:
        if self.uniform is not None or self.scope == "global":
            return bool(self.uniform)
        config = program.model.config
        return not config.is_encoder_decoder and program.model.can_generate()

    def plan(self, site: Site) -> Planned:
        """The sizes are known: which heads and neurons stay is of no matter to them."""
        assert isinstance(site, PrunableSite)
        about = "about: layers lose more where it costs less" if self.scope == "global" else ""
        made = SmallerLayer.of(site.module, site.parts, _first(site), site.sizes)
        return Planned(made, about)

    def replace(self, site: Site, program: Program) -> Soft:
        """Choose what stays of all layers, and fit it; `rewrite` puts it in place."""
        assert isinstance(site, PrunableSite)
        return PrunedLayer(site, site.cuts.of(site, program))


def _pairs(layers: Sequence[Layer], counts: Counts) -> Iterator[tuple[Layer, int, Part]]:
    for layer, kept in zip(layers, counts.kept, strict=True):
        for part, count in zip(layer.parts.every(), kept, strict=True):
            yield layer, count, part


def _near(layers: Sequence[Layer], counts: Counts) -> list[int | None]:
    """Return numbers of key-value groups to try, the nearest to that of the first layer first."""
    pairs = _pairs(layers, counts)
    blocks = [(layer.groups(p), n) for layer, n, p in pairs if isinstance(p, Attention)]
    if not blocks:
        return [None]
    has, wanted = blocks[0]
    return [*sorted(range(1, has), key=lambda n: abs(n - wanted))]


def _uniform(
    program: Program, sites: Sequence[Site], layers: Sequence[Layer], counts: Counts
) -> tuple[Sizes | None, str]:
    """Return the entries of the configuration that give all layers their sizes, or why there are
    none."""
    model = program.model
    shapes: dict[str, tuple[int, ...]] = {}
    changes: set[tuple[str, int, int]] = set()
    for site, layer, kept in zip(sites, layers, counts.kept, strict=True):
        for part, count in zip(layer.parts.every(), kept, strict=True):
            has = layer.groups(part)
            for path, linear in _smaller(layer.module, part, count / has).items():
                for name, value in linear.named_parameters():
                    shapes[f"{site.path}.{path}.{name}"] = tuple(value.shape)
            if isinstance(part, Attention):
                ratio = part.heads // part.kv_heads
                changes |= {("head", has * ratio, count * ratio), ("head", has, count)}
            else:
                changes.add(("", has, count))
    sizes = sizes_for(model, shapes, sorted(changes))
    if sizes:
        return sizes, ""
    kinds = {(type(part), layer.groups(part)) for layer, _, part in _pairs(layers, counts)}
    differ = len(kinds) > len({kind for kind, _ in kinds})
    what = "its layers differ" if differ else "no entry of it says these sizes"
    hint = "set `uniform: false`, and load the result with plmcc"
    return None, f"the configuration cannot say that its layers are smaller: {what}; {hint}"


def _smaller(layer: nn.Module, part: Part, left: float) -> dict[str, nn.Module]:
    """Return empty linears of a part by path, of which a share is left."""
    found: dict[str, nn.Module] = {}
    for role, path in part.linears.items():
        old = layer.get_submodule(path)
        rows, columns = matrix(old).shape
        if role in ("o", "fc2"):
            columns = round(columns * left)
        else:
            rows = round(rows * left)
        found[path] = _empty(old, rows, columns)
    return found


def _empty(old: nn.Module, rows: int, columns: int) -> nn.Module:
    """Return a linear of the kind of another, and of another shape, that holds nothing yet."""
    bias = getattr(old, "bias", None)
    weight = old.get_parameter("weight").new_empty(rows, columns)
    return plain(old, weight, None if bias is None else bias.new_empty(rows))


def _first(site: PrunableSite) -> Cut:
    """A cut of the right sizes."""
    cut = Cut()
    for part, count in zip(site.parts.every(), site.counts, strict=True):
        if isinstance(part, Attention):
            ratio = part.heads // part.kv_heads
            cut.heads.append(list(range(count * ratio)))
            left = count / part.kv_heads
        else:
            left = count / len(matrix(site.module.get_submodule(part.linears["fc1"])))
        cut.linears |= _smaller(site.module, part, left)
    return cut


class PrunedLayer(Soft):
    """A layer with fewer heads and neurons, which trains as it is."""

    def __init__(self, site: PrunableSite, cut: Cut) -> None:
        super().__init__()
        self._site, self._cut = site, cut

    def rewrite(self, program: Program, path: str) -> None:
        """Put the smaller linears in place, and tell the configuration."""
        layer = program.model.get_submodule(path)
        self._hard = SmallerLayer.of(layer, self._site.parts, self._cut, self._site.sizes)
        self._cut.put(layer, self._site.parts)
        configure(program.model, self._site.sizes)

    def harden(self) -> Hard:
        """Return the record of the sizes; the layer is already in its final form."""
        return self._hard

    def statistics(self) -> dict[str, float]:
        """Return what is kept, and the relative error of what each part adds to the hidden states,
        on the calibration data."""
        found = {"heads": float(sum(map(len, self._cut.heads)))} if self._cut.heads else {}
        if self._cut.neurons:
            found["neurons"] = float(sum(self._cut.neurons))
        return found | {f"{name}_error": value for name, value in self._cut.errors.items()}


class SmallerLayer(Hard):
    """A layer whose linears have lost rows and columns.

    `linears` are paths in the layer, `rows` and `columns` their sizes. For each of `attention`,
    `heads_before` holds heads, key-value heads and head width before, and the next of `counts` in
    `kept` the heads that stay. `entries` of the configuration have the new `values`.
    """

    def __init__(
        self,
        linears: list[str],
        rows: list[int],
        columns: list[int],
        attention: list[str],
        heads_before: list[int],
        counts: list[int],
        kept: list[int],
        entries: list[str],
        values: list[int],
    ) -> None:
        super().__init__()
        self.layout = {
            "linears": linears,
            "rows": rows,
            "columns": columns,
            "attention": attention,
            "heads_before": heads_before,
            "counts": counts,
            "kept": kept,
            "entries": entries,
            "values": values,
        }
        self.shapes = dict(zip(linears, zip(rows, columns, strict=True), strict=True))
        self.sizes = dict(zip(entries, values, strict=True))
        self.blocks: list[tuple[Attention, list[int]]] = []
        for index, path in enumerate(attention):
            block = Attention(path, {}, *heads_before[3 * index : 3 * index + 3])
            start = sum(counts[:index])
            self.blocks.append((block, kept[start : start + counts[index]]))

    @classmethod
    def of(cls, layer: nn.Module, parts: Parts, cut: Cut, sizes: Sizes) -> SmallerLayer:
        """Make the record of a layer that is about to be cut."""
        shapes = [matrix(linear).shape for linear in cut.linears.values()]
        return cls(
            linears=list(cut.linears),
            rows=[shape[0] for shape in shapes],
            columns=[shape[1] for shape in shapes],
            attention=[block.path for block in parts.attention],
            heads_before=[n for b in parts.attention for n in (b.heads, b.kv_heads, b.head_dim)],
            counts=[len(heads) for heads in cut.heads],
            kept=[head for heads in cut.heads for head in heads],
            entries=list(sizes),
            values=list(sizes.values()),
        )

    def rewrite(self, program: Program, path: str) -> None:
        """Make room for the smaller tensors, where the configuration has not done so.

        Raises:
            ValueError: the layer has no such linears.
        """
        layer = program.model.get_submodule(path)
        olds = {name: layer.get_submodule(name) for name in self.shapes}
        if all(matrix(olds[name]).shape == shape for name, shape in self.shapes.items()):
            return
        for name, (rows, columns) in self.shapes.items():
            layer.set_submodule(name, _empty(olds[name], rows, columns).train(olds[name].training))
        for block, kept in self.blocks:
            if len(kept) < block.heads:
                resize(layer.get_submodule(block.path), block, kept)
        configure(program.model, self.sizes)
