"""Drop layers: keep some of a stack's repeated layers, in order, and forget the others.

After Kasai, Pappas, Peng, Cross and Smith, "Deep Encoder, Shallow Decoder", ICLR 2021 (2006.10369):
decoding time is the decoder's depth. Which layers stay is given, evenly spaced (as for DistilBART
and DistilBERT), or measured: Men et al., "ShortGPT" (2403.03853), rank a layer by its block
influence, 1 - E[cos(x_in, x_out)] over the tokens; Song et al., "SLEB" (2402.09025), drop the layer
without which the loss is least, and measure again. Kept layers are numbered anew, so that each
writes to its own place in the cache, and the configuration says the new depth. Matches a stack: a
list of repeated layers. Stored: nothing beside the kept layers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from plmcc.api import (
    Call,
    Hard,
    Miss,
    Pass,
    Planned,
    Program,
    Site,
    Soft,
    StackSite,
    Values,
    refuse_unused,
)
from plmcc.kit import matched_stacks
from plmcc.kit.configured import check_readable, live_configs
from plmcc.kit.graphs import stack_depths

Index = Annotated[int, Field(ge=0)]


class DropLayers(Pass):
    """Keep only some layers of an encoder or decoder."""

    preserves: ClassVar[Literal["exact", "within", "lossy"]] = "lossy"
    paper: ClassVar[str] = "Kasai et al., ICLR 2021, arXiv:2006.10369; arXiv:2403.03853, 2402.09025"
    hazards: ClassVar[tuple[str, ...]] = (
        "The model is broken until it is trained again: distill it in a `train` section.",
        "Language models lose reasoning before fluency: measure tasks too (arXiv:2602.01997).",
        "Passes for the kept layers belong in a later stage: the layers are numbered anew.",
    )

    targets: str | list[str] = ""
    """The stacks: every list of layers that contains a matching layer. By default the decoder, or
    the layers of a model that has only an encoder."""
    keep: Annotated[int, Field(ge=1)] | Annotated[list[Index], Field(min_length=1)] = 2
    """The number of layers to keep, or a list of layers, counted from 0."""
    select: Literal["even", "importance"] | None = None
    """For a number: evenly spaced, first and last included, or the most important ones. By default
    `importance` with `text`, and for models with a decoder only, which evenly spaced layers
    ruin."""
    importance: Literal["influence", "perplexity"] = "influence"
    """What is important: how much a layer changes the hidden states, or by how much its absence
    raises the loss, measured again after each layer that goes."""
    text: str | list[str] = Field(default_factory=list)
    """A file of raw text, or several, to measure on; by default the data of `calibrate`, or of the
    next stage that trains."""

    @model_validator(mode="after")
    def _importance_is_used(self) -> DropLayers:
        chosen = self.select != "even" and not isinstance(self.keep, list)
        given = "with `select: even`" if self.select == "even" else "with a list of layers"
        refuse_unused(self, {"importance": chosen, "text": chosen or not self.text}, given)
        return self

    def calibrates_on(self) -> list[str]:
        """The files of `text`."""
        return [self.text] if isinstance(self.text, str) else self.text

    def needs_data(self) -> str:
        """Importance is measured."""
        asked = self.select == "importance" or self.text
        measured = asked and not isinstance(self.keep, list)
        return "`select: importance` measures what each layer changes" if measured else ""

    def _measures(self, model: PreTrainedModel) -> bool:
        """Say whether it is measured which layers stay."""
        if self.select is not None or isinstance(self.keep, list):
            return self.select == "importance" and not isinstance(self.keep, list)
        decodes = model.can_generate() and not model.config.is_encoder_decoder
        return decodes or bool(self.text)

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield the stacks that have more layers than are kept."""
        both = program.model.config.is_encoder_decoder
        targets = self.targets or ("decoder" if both else "layers")
        refusal = partial(self._refusal, program)
        yield from matched_stacks(program, targets, self.expect, refusal)

    def _refusal(self, program: Program, site: StackSite) -> str:
        model = program.model
        depth = len(site.layers)
        kept = self.keep if isinstance(self.keep, list) else None
        if kept is not None and (max(kept) >= depth or len(set(kept)) < len(kept)):
            given = ", ".join(map(str, kept))
            return f"`keep` is {given}; its layers are 0 to {depth - 1}, each once"
        if (len(kept) if kept is not None else self.keep) >= depth:  # type: ignore[operator]
            return f"it has {depth} layers, not more than are to be kept"
        done = next((n for n, part in site.layers.named_modules() if isinstance(part, Hard)), "")
        if done:  # an artifact names modules by the numbers of their layers
            return f"{site.path}.{done} is rewritten already: drop layers before other passes"
        special = _special(site.layers)
        if special is not None and kept is not None and kept[0] != special:
            lacking = sorted(_names(site.layers[special]) - _names(site.layers[-1]))
            return f"layer {special} alone has {', '.join(lacking)}: keep it first"
        if _resized(model, site.path, list(range(depth - 1))) is None:
            return "no entry of the configuration holds its number of layers"
        if self.select is None and self._measures(model) and not program.data:
            hint = "add `text: [FILE]`, or say which with `keep: [...]` or `select: even`"
            return f"which layers of a language model can go has to be measured: {hint}"
        return ""

    def plan(self, site: Site) -> Planned:
        """As many layers as will stay; which is of no matter where all are alike."""
        assert isinstance(site, StackSite)
        even = self.model_copy(update={"select": "even"})
        return Planned(KeptLayers(even._chosen(site.layers, []), {}))

    def replace(self, site: Site, program: Program) -> Soft:
        """Choose the layers that stay; `rewrite` drops the others."""
        assert isinstance(site, StackSite)
        if not self._measures(program.model):
            even = self.model_copy(update={"select": "even"})
            return KeptLayers(even._chosen(site.layers, []), {})
        if self.importance == "influence":
            influence = _influence(program, site.layers)
            named = {f"influence_{index}": value for index, value in enumerate(influence)}
            return KeptLayers(self._chosen(site.layers, influence), named)
        assert isinstance(self.keep, int)
        return KeptLayers(*_least_loss(program, site.layers, self.keep))

    def _chosen(self, layers: nn.ModuleList, influence: Sequence[float]) -> list[int]:
        depth, first = len(layers), _special(layers) is not None
        if isinstance(self.keep, list):
            return sorted(self.keep)
        if self.select == "even":
            steps = max(1, self.keep - 1)
            return [round(i * (depth - 1) / steps) for i in range(self.keep)]
        order = sorted(range(depth), key=lambda i: (not (first and i == 0), -influence[i]))
        return sorted(order[: self.keep])


class KeptLayers(Soft):
    """The choice of layers; they train as they are."""

    def __init__(self, kept: list[int], measured: dict[str, float]) -> None:
        super().__init__()
        self.kept, self.measured = kept, measured

    def rewrite(self, program: Program, path: str) -> None:
        """Drop the other layers, number the kept ones, and tell the configuration."""
        _drop(program.model, path, self.kept)

    def harden(self) -> Hard:
        """Return the record of the choice; the stack is already in its final form."""
        return Stack(depth=len(self.kept), kept=self.kept)

    def statistics(self) -> dict[str, float]:
        """Return the measured influence of every original layer, 1 - cos(x_in, x_out); or the loss
        with all layers, and after each that went."""
        return self.measured


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


def _special(layers: nn.ModuleList) -> int | None:
    """Return the first layer, if it alone holds tensors that all need."""
    last = _names(layers[-1])
    return next((i for i, layer in enumerate(layers) if _names(layer) != last), None)


def _names(layer: nn.Module) -> set[str]:
    return set(layer.state_dict())


def _drop(model: PreTrainedModel, path: str, kept: list[int]) -> None:
    resized = _resized(model, path, kept)
    assert resized is not None, "checked when matching"
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    layers = [stack[index] for index in kept]
    numbers = _numbers(stack)
    stack._modules.clear()
    for index, layer in enumerate(layers):
        stack.append(layer)
        for name, attribute, first in numbers:
            module = dict(layer.named_modules()).get(name)
            if module is not None and attribute in vars(module):
                setattr(module, attribute, first + index)
    for live, values in zip(live_configs(model), resized, strict=True):
        for name, value in values.items():
            setattr(live, name, value)


def _numbers(stack: nn.ModuleList) -> list[tuple[str, str, int]]:
    """Return where layers hold their own number: path in the layer, attribute, number of layer 0.

    A layer writes to the cache at its number: with the old one, generation goes wrong. It is
    called `layer_idx`, `layer_id` and more; what counts up with the layers is it.
    """
    values: dict[tuple[str, str], dict[int, int]] = {}
    for index, layer in enumerate(stack):
        for name, module in layer.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    values.setdefault((name, attribute), {})[index] = value
    found = []
    for (name, attribute), by_layer in values.items():
        firsts = {value - index for index, value in by_layer.items()}
        if len(firsts) == 1 and (len(by_layer) > 1 or attribute == "layer_idx"):
            found.append((name, attribute, firsts.pop()))
    return found


def _resized(model: PreTrainedModel, path: str, kept: list[int]) -> list[Values] | None:
    """Return what each configuration has to say for the stack to have the kept layers.

    Which entry means this stack is tried out: a model built from the changed configuration, on the
    meta device, has that depth there, and in no other place another one. T5's decoder has a copy of
    the configuration in which the entry has another name; copies are changed as the trial's are.
    """
    depth, before = len(model.get_submodule(path)), stack_depths(model)  # type: ignore[arg-type]
    wanted = before | {path: len(kept)}
    names = [n for n, v in model.config.to_dict().items() if v == depth and "layer" in n]
    for name, lists in itertools.product(names, ("layer", "attention", "")):
        config = copy.deepcopy(model.config)
        _shorten(config, name, depth, kept, lists)
        try:
            check_readable(config)
            with torch.device("meta"):
                trial = type(model)._from_config(config)
        except Exception:  # whatever a configuration or model makes of values that do not fit
            continue
        if stack_depths(trial) == wanted:
            pairs = zip(live_configs(model), live_configs(trial), strict=True)
            return [_changes(live, new) for live, new in pairs]
    return None


def _shorten(config: PreTrainedConfig, name: str, depth: int, kept: list[int], lists: str) -> None:
    """Set the number of layers, and cut lists with one entry a layer: those with "layer" or the
    text `lists` in their name."""
    setattr(config, name, len(kept))
    for key, value in config.to_dict().items():
        if not isinstance(value, list) or not ("layer" in key or lists in key):
            continue
        if len(value) == depth:
            setattr(config, key, [value[index] for index in kept])
        elif len(entries := _unrolled(value)) == depth:
            setattr(config, key, [[[entries[index] for index in kept], 1]])


def _unrolled(value: list[object]) -> list[object]:
    """The entries of a list of [entries, repetitions], as GPT-Neo has it."""
    found: list[object] = []
    for part in value:
        if not (isinstance(part, list) and len(part) == 2 and isinstance(part[0], list)):
            return []
        found += part[0] * part[1] if isinstance(part[1], int) else []
    return found


def _changes(live: PreTrainedConfig, new: PreTrainedConfig) -> Values:
    old, values = live.to_dict(), new.to_dict()
    return {
        n: v
        for n, v in values.items()
        if n in old and old[n] != v and ("layer" in n or isinstance(v, list))
    }


def _least_loss(
    program: Program, stack: nn.ModuleList, keep: int
) -> tuple[list[int], dict[str, float]]:
    """Drop the layer without which the loss is least, until so many are left; return them, and the
    loss (nats a token) with all of them and after each drop."""
    first = _special(stack)
    kept, gone = list(range(len(stack))), list[int]()
    losses = {"loss": program.data.loss()}
    while len(kept) > keep:
        tried: dict[int, float] = {}
        for index in kept:
            if index != first:
                with _skipped([stack[i] for i in (*gone, index)]):
                    tried[index] = program.data.loss()
        best = min(tried, key=lambda index: tried[index])
        gone.append(best)
        kept.remove(best)
        losses[f"loss_without_{best}"] = tried[best]
    return kept, losses


@contextmanager
def _skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers return the hidden states that they are given."""

    def skip(module: nn.Module, args: tuple[object, ...], kwargs: Values, output: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _influence(program: Program, stack: nn.ModuleList) -> list[float]:
    """Return each layer's block influence on recorded states."""
    cosines: list[list[Tensor]] = [[] for _ in stack]

    numbers = {layer: index for index, layer in enumerate(stack)}

    def note(layer: nn.Module, call: Call) -> None:
        given, made = (program.data.real_tokens(x) for x in (call.input, call.result))
        cosines[numbers[layer]].append(F.cosine_similarity(given, made, dim=-1))

    program.data.observe(stack, note)
    return [float(1 - torch.cat(found).mean()) for found in cosines]
