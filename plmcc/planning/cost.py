"""What a model costs, counted on the meta device: parameters, bytes, operations, cache and
activations.

The model runs there without values. Layers of the same shape are run once and counted as often as
there are: for 80 layers that is a second instead of a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from plmcc.artifact.size import component_bytes, parameter_count
from plmcc.ir.modules import checkpoint_activations
from plmcc.ir.probes import positions_of, probe_inputs
from plmcc.ir.program import Program
from plmcc.utils.attributes import kept
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

LENGTH = 128
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Cost:
    """The costs of a model; None where they cannot be known without weights."""

    parameters: int
    """Trainable parameters, shared ones once."""
    bytes: int
    """Of all tensors, as in the weight file."""
    components: dict[str, int]
    """Bytes by embedding table, stack of layers, and the rest."""
    flops: int | None
    """Of the matrix products of a forward pass over one sequence of `length` tokens (source and
    target each), two for a multiply-add."""
    length: int
    cache_bytes: int | None
    """Of the key-value cache for one token; of an encoder-decoder for one token of the target and
    one of the source. None where nothing is generated."""
    unknown: str = ""
    """Why the model could not be run on the meta device."""

    @property
    def flops_per_token(self) -> float | None:
        """Operations by token of a sequence."""
        return None if self.flops is None else self.flops / self.length

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self) | {"flops_per_token": self.flops_per_token}


def cost(
    model: PreTrainedModel, length: int = LENGTH, named: Iterable[str] = (), *, run: bool = True
) -> Cost:
    """Count what a model on the meta device costs.

    Args:
        model: left as it is.
        length: tokens of the sequence; fewer where the model cannot read so many.
        named: paths that are components too, whatever stands there now.
        run: whether to count operations and cache, which takes longer.
    """
    sizes = component_bytes(model, [name for name in named if name != "other"])
    parameters = parameter_count(model)
    length = _readable(model, length)
    if not run:
        return Cost(parameters, sum(sizes.values()), sizes, None, length, None)
    flops, cache, unknown = None, None, ""
    counter = FlopCounterMode(display=False)
    caches: list[object] = []

    def totals() -> tuple[int, int]:
        return counter.get_total_flops(), sum(_cache_bytes(c) for c in caches)

    try:
        with (
            _inputs(model, 1, length) as given,
            torch.no_grad(),
            _repeating(model, totals, caches) as counted,
            counter,
        ):
            output = model(**given)
        found = [value for value in output.values() if isinstance(value, Cache)]
        caches[:] = found if model.can_generate() else []
        flops, cached = (a + b for a, b in zip(totals(), counted(), strict=True))
        cache = cached // length if caches else None
    except Exception as problem:  # foreign code, which may look at values
        unknown = _sentence(problem)
    return Cost(parameters, sum(sizes.values()), sizes, flops, length, cache, unknown)


def operations(
    model: PreTrainedModel, names: Iterable[str], length: int = LENGTH
) -> dict[str, int]:
    """Count the operations of a forward pass over one sequence by component.

    Args:
        model: on the meta device; left as it is.
        names: paths of modules; what is in none of them is `other`.
        length: tokens of the sequence; fewer where the model cannot read so many.

    Returns:
        Nothing where the model cannot be run without weights.
    """
    counter = FlopCounterMode(display=False)
    try:
        with _inputs(model, 1, _readable(model, length)) as given, torch.no_grad(), counter:
            model(**given)
    except Exception:  # foreign code, which may look at values
        return {}
    kind = type(model).__name__
    by_path = {
        path.removeprefix(f"{kind}."): sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
    }
    # A list of layers is no module that is called.
    inside = {
        name: sum(n for path, n in by_path.items() if path.rpartition(".")[0] == name)
        for name in names
    }
    found = {n: by_path.get(n, parts) for n, parts in inside.items() if n != "other"}
    return found | {"other": max(0, counter.get_total_flops() - sum(found.values()))}


def activation_bytes(
    model: PreTrainedModel, batch: int, length: int, checkpointing: bool = False
) -> int | None:
    """Return the bytes that autograd keeps of a batch until the backward pass, parameters left out.

    That is the model's own dtype, logits in float32 as losses take them, without what passes add
    while they train. None if the model does not run on the meta device.
    """
    kept: dict[int, int] = {}
    alive: list[Tensor] = []
    known = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in known and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(value)  # an address is not given twice while its tensor lives
        return value

    length, mode = _readable(model, length), model.training

    def totals() -> tuple[int, ...]:
        return (sum(kept.values()),)

    try:
        model.train()
        if checkpointing:
            checkpoint_activations(model)
        around = nullcontext(lambda: (0,)) if checkpointing else _repeating(model, totals, [])
        options = {"use_cache": False} if model.can_generate() else {}
        with (
            _inputs(model, batch, length, **options) as given,
            around as counted,
            saved_tensors_hooks(keep, lambda value: value),
        ):
            output = model(**given)
            logits = output.get("logits")
            if logits is not None:
                logits.float().log_softmax(-1)
        return sum(kept.values()) + counted()[0]
    except Exception:  # foreign code, which may look at values
        return None
    finally:
        if checkpointing:
            checkpoint_activations(model, on=False)
        model.train(mode)


@contextmanager
def _inputs(model: PreTrainedModel, batch: int, length: int, **options: Any) -> Iterator[Values]:
    """Yield arguments without padding with which the model, in eager attention, runs without
    values.

    Whether there is padding is a question of values, which some models ask if they get a mask, and
    some if they get none.
    """
    given = probe_inputs(model, batch, length) | options
    mask = given.pop("attention_mask", None)
    own = {}
    if "decoder_input_ids" in given:
        own = {"decoder_attention_mask": torch.ones_like(given["decoder_input_ids"])}
    ways = [{}, own] if mask is None else [{}, own, {"attention_mask": mask} | own]
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield next(given | way for way in ways if way is ways[-1] or _runs(model, given | way))
    finally:
        model.set_attn_implementation(chosen)


def _runs(model: PreTrainedModel, given: Values) -> bool:
    try:
        with torch.no_grad(), _repeating(model, tuple, []):
            model(**given)
    except RuntimeError:
        return False
    return True


def _readable(model: PreTrainedModel, length: int) -> int:
    limit = positions_of(model) or getattr(model.config, "n_positions", None) or length
    return min(length, limit)


@contextmanager
def _repeating(
    model: PreTrainedModel, totals: Callable[[], tuple[int, ...]], caches: list[object]
) -> Iterator[Callable[[], tuple[int, ...]]]:
    """Let layers of one shape run once: the others return the same outputs.

    Yields a function that returns what `totals` lacks for that reason. `caches` gets the caches
    that layers are called with.
    """
    done: dict[object, tuple[object, tuple[int, ...]]] = {}
    more = [0] * len(totals())
    layers = [model.get_submodule(path) for path in Program(model).layer_paths()]

    def wrapped(layer: nn.Module, shape: object) -> Callable[..., object]:
        own = layer.forward

        def forward(*args: object, **kwargs: object) -> object:
            if shape in done:
                output, added = done[shape]
                more[:] = [a + b for a, b in zip(more, added, strict=True)]
                return output
            caches[:] = [v for v in (*args, *kwargs.values()) if isinstance(v, Cache)] or caches
            before = totals()
            output = own(*args, **kwargs)
            added = tuple(a - b for a, b in zip(totals(), before, strict=True))
            done[shape] = (output, added)
            return output

        return forward

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(kept(layer, "forward"))
            layer.forward = wrapped(layer, _shape_of(layer))
        yield lambda: tuple(more)


def _shape_of(layer: nn.Module) -> object:
    """What decides the cost of a layer: classes, settings but for its number, shapes of tensors."""
    settings = tuple(
        (name, type(module).__qualname__, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, _PLAIN) and key not in ("layer_idx", "training")
    )
    shapes = tuple((n, tuple(v.shape), v.dtype) for n, v in layer.state_dict().items())
    return settings, shapes


def _cache_bytes(cache: Any) -> int:
    if isinstance(cache, EncoderDecoderCache):
        return _cache_bytes(cache.self_attention_cache) + _cache_bytes(cache.cross_attention_cache)
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    return sum(t.nbytes for pair in pairs for t in pair if isinstance(t, Tensor))


def _sentence(problem: Exception) -> str:
    return f"it does not run on the meta device: {first_line(problem)}"
