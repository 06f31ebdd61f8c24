"""Drop layers: keep some of a stack's repeated layers, in order, and forget the others.

After Kasai, Pappas, Peng, Cross and Smith, "Deep Encoder, Shallow Decoder", ICLR 2021 (2006.10369):
decoding time is the decoder's depth. Which layers stay is given, evenly spaced (as for DistilBART
and DistilBERT), or measured: Men et al., "ShortGPT" (2403.03853), rank a layer by its block
influence, 1 - E[cos(x_in, x_out)] over the tokens. Kept layers are numbered anew, so that each
writes to its own place in the cache, and the configuration says the new depth. Matches a stack: a
list of repeated layers. Stored: nothing beside the kept layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from plmcc.api import Hard, Miss, Pass, Planned, Site, Soft
from plmcc.diagnostics import error
from plmcc.program import Program

Index = Annotated[int, Field(ge=0)]


class DropLayers(Pass):
    """Keep only some layers of an encoder or decoder."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Kasai et al., ICLR 2021, arXiv:2006.10369; Men et al., arXiv:2403.03853"
    hazards: ClassVar[tuple[str, ...]] = (
        "The model is broken until it is trained again: distil it in a `train` section.",
        "Passes for the kept layers belong in a later stage: the layers are numbered anew.",
    )

    targets: str | list[str] = "decoder"
    """Which stacks: every list of layers that holds a matching layer is one."""
    keep: Annotated[int, Field(ge=1)] | Annotated[list[Index], Field(min_length=1)] = 2
    """How many layers stay, or which, counted from 0."""
    select: Literal["even", "importance"] = "even"
    """For a number: evenly spaced, first and last included, or those that change states most."""

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the stacks that have more layers than are kept."""
        layers = program.resolve(self.targets, "layer").sites
        stacks = dict.fromkeys(site.path.rpartition(".")[0] for site in layers)
        found = [self._stack(program, path) for path in stacks]
        count = sum(isinstance(site, Site) for site in found)
        if self.expect is not None and count != self.expect:
            message = f"the targets match {count} stacks, expected {self.expect}"
            raise error("PLM202", message, "targets", given=", ".join(stacks))
        yield from found

    def _stack(self, program: Program, path: str) -> Site | Miss:
        stack = program.model.get_submodule(path)
        assert isinstance(stack, nn.ModuleList)
        depth = len(stack)
        kept = self.keep if isinstance(self.keep, list) else None
        if kept is not None and (max(kept) >= depth or len(set(kept)) < len(kept)):
            given = ", ".join(map(str, kept))
            return Miss(path, f"`keep` is {given}; its layers are 0 to {depth - 1}, each once")
        if (len(kept) if kept is not None else self.keep) >= depth:  # type: ignore[operator]
            return Miss(path, f"it has {depth} layers, not more than are to be kept")
        if sum(layer is stack[0] for layer in stack) > 1:
            return Miss(path, "its layers are one and the same")
        own = [sorted(layer.state_dict()) for layer in stack]
        special = next((i for i, names in enumerate(own) if names != own[-1]), None)
        if special is not None and kept is not None and kept[0] != special:
            lacking = sorted(set(own[special]) - set(own[-1]))
            return Miss(path, f"layer {special} alone has {', '.join(lacking)}: keep it first")
        if _resized(program.model, path, list(range(depth - 1))) is None:
            return Miss(path, "no entry of the configuration says how many layers it has")
        facts = {"program": program, "first": special is not None}
        return Site("stack", (path,), ("layer",), (stack,), facts)

    def plan(self, site: Site) -> Planned:
        """As many layers as will stay; which is of no matter where all are alike."""
        stack = site.module
        assert isinstance(stack, nn.ModuleList)
        even = self.model_copy(update={"select": "even"})
        return Planned(KeptLayers(even._chosen(len(stack), [], site.facts["first"]), []))

    def replace(self, site: Site) -> Soft:
        """Choose the layers that stay; `rewrite` drops the others."""
        stack = site.module
        assert isinstance(stack, nn.ModuleList)
        measured = self.select == "importance" and not isinstance(self.keep, list)
        influence = _influence(site.facts["program"], site.path, stack) if measured else []
        return KeptLayers(self._chosen(len(stack), influence, site.facts["first"]), influence)

    def _chosen(self, depth: int, influence: Sequence[float], first: bool) -> list[int]:
        if isinstance(self.keep, list):
            return sorted(self.keep)
        if self.select == "even":
            steps = max(1, self.keep - 1)
            return [round(i * (depth - 1) / steps) for i in range(self.keep)]
        order = sorted(range(depth), key=lambda i: (not (first and i == 0), -influence[i]))
        return sorted(order[: self.keep])


class KeptLayers(Soft):
    """The choice of layers; they train as they are."""

    def __init__(self, kept: list[int], influence: list[float]) -> None:
        super().__init__()
        self.kept, self.influence = kept, influence

    def rewrite(self, program: Program, path: str) -> None:
        """Drop the other layers, number the kept ones, and tell the configuration."""
        _drop(program.model, path, self.kept)

    def harden(self) -> Hard:
        """Return the record of the choice; the stack is already in its final form."""
        return Stack(depth=len(self.kept), kept=self.kept)

    def facts(self) -> dict[str, float]:
        """Return the measured influence of every original layer, 1 - cos(x_in, x_out)."""
        return {f"influence_{index}": value for index, value in enumerate(self.influence)}


class Stack(Hard):
    """A shorter stack: the configuration builds it, its layers are the original's."""

    def __init__(self, depth: int, kept: list[int]) -> None:
        super().__init__()
        self.layout = {"depth": depth, "kept": kept}

    def rewrite(self, program: Program, path: str) -> None:
        """Drop layers of the original; an artifact's configuration has built the right number.

        Raises:
            ValueError: there is another number of layers than either has.
        """
        stack = program.model.get_submodule(path)
        kept: list[int] = self.layout["kept"]  # type: ignore[assignment]
        layers = len(stack) if isinstance(stack, nn.ModuleList) else 0
        if layers == len(kept):
            return
        if layers <= max(kept):
            raise ValueError(f"{path} has not the {len(kept)} layers of the artifact")
        _drop(program.model, path, kept)


def _drop(model: PreTrainedModel, path: str, kept: list[int]) -> None:
    resized = _resized(model, path, kept)
    assert resized is not None, "checked when matching"
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    layers = [stack[index] for index in kept]
    stack._modules.clear()
    for index, layer in enumerate(layers):
        stack.append(layer)
        _number(layer, index)
    for live, values in zip(_configs(model), resized, strict=True):
        for name, value in values.items():
            setattr(live, name, value)


def _number(layer: nn.Module, index: int) -> None:
    """A layer writes to the cache at its `layer_idx`: with the old one, generation goes wrong."""
    for module in layer.modules():
        if isinstance(vars(module).get("layer_idx"), int):
            module.layer_idx = index  # type: ignore[assignment]


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the different configuration objects of a model and the models in it."""
    found = {id(p.config): p.config for p in model.modules() if isinstance(p, PreTrainedModel)}
    return list(found.values())


def _resized(model: PreTrainedModel, path: str, kept: list[int]) -> list[dict[str, Any]] | None:
    """Return what each configuration has to say for the stack to have the kept layers.

    Which entry means this stack is tried out: a model built from the changed configuration, on the
    meta device, has that depth there, and in no other place another one. T5's decoder has a copy of
    the configuration in which the entry has another name; copies are changed as the trial's are.
    """
    depth, before = len(model.get_submodule(path)), _depths(model)  # type: ignore[arg-type]
    wanted = before | {path: len(kept)}
    names = [n for n, v in model.config.to_dict().items() if v == depth and "layer" in n]
    for name in names:
        config = copy.deepcopy(model.config)
        _shorten(config, name, depth, kept)
        try:
            with torch.device("meta"):
                trial = type(model)._from_config(config)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            continue
        if _depths(trial) == wanted:
            pairs = zip(_configs(model), _configs(trial), strict=True)
            return [_changes(live, new) for live, new in pairs]
    return None


def _shorten(config: PreTrainedConfig, name: str, depth: int, kept: list[int]) -> None:
    setattr(config, name, len(kept))
    for key, value in config.to_dict().items():  # one entry a layer: types of attention and such
        if isinstance(value, list) and len(value) == depth and "layer" in key:
            setattr(config, key, [value[index] for index in kept])


def _changes(live: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, Any]:
    old, values = live.to_dict(), new.to_dict()
    return {n: v for n, v in values.items() if "layer" in n and n in old and old[n] != v}


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Return the length of every list of modules that lies in no other list."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(p.isdigit() for p in path.split("."))
    }


def _influence(program: Program, path: str, stack: nn.ModuleList) -> list[float]:
    """Return each layer's block influence on recorded states."""
    cosines: list[list[Tensor]] = [[] for _ in stack]

    def watch(index: int) -> Any:
        def note(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            same = F.cosine_similarity(given.float(), result.float(), dim=-1)
            cosines[index].append(same.flatten())

        return stack[index].register_forward_hook(note, with_kwargs=True)

    hooks = [watch(index) for index in range(len(stack))]
    try:
        program.record(f"{path}.0")
    finally:
        for hook in hooks:
            hook.remove()
    return [float(1 - torch.cat(found).mean()) for found in cosines]
