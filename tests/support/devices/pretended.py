"""A second device without hardware: tensors that say `gpu:0`, hold a CPU tensor, and do not mix.

    with pretended() as seen:
        model.to("gpu")
        model(**inputs)

Every operation computes real values on the CPU. As on CUDA

- an operation on tensors of two devices is an error (scalar tensors and indices may be on the CPU),
- a CPU generator does not draw for the device,
- what waits for the device (`.item()`, `.cpu()`, `nonzero`, a mask as an index) is counted, by the
  line of plmcc that asks.

Not pretended: autocast, streams, and what kernels demand of alignment.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "gpu"
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "argwhere",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_MAKING = (torch.tensor, torch.as_tensor, torch.asarray)


class MixedDevicesError(RuntimeError):
    """What a GPU would not do."""


class Seen:
    """Counts of what waits for the device: `waits[kind, operation, line]`."""

    def __init__(self) -> None:
        self.waits: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def note(self, kind: str, operation: str) -> None:
        self.waits[kind, operation, _line()] += 1


_seen = Seen()


def _line() -> str:
    """The line of plmcc that asks; "elsewhere" if a library does, or a model."""
    frames = (f for f in traceback.extract_stack() if f.filename != __file__)
    asking = [f for f in frames if "/torch/" not in f.filename]
    _, found, place = asking[-1].filename.rpartition("/plmcc/")
    return f"{place}:{asking[-1].lineno}" if found else "elsewhere"


class GpuTensor(Tensor):
    """A tensor on the pretended device."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[GpuTensor], elem: Tensor, index: int = 0) -> GpuTensor:
        make: Any = Tensor._make_wrapper_subclass
        made: GpuTensor = make(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device(NAME, index),
            requires_grad=False,
        )
        return made

    def __init__(self, elem: Tensor, index: int = 0) -> None:
        self.elem = elem

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["elem"], self.device.index

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], index: int, size: object, stride: object
    ) -> GpuTensor:
        return GpuTensor(inner["elem"], index)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"GpuTensor({self.elem!r})"

    def tolist(self) -> Any:
        _seen.note("waits", "tolist")
        return self.elem.tolist()

    def numpy(self, **_: object) -> Any:
        raise MixedDevicesError(f"a tensor of a device is no array, at {_line()}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            found: Tensor = memo[id(self)]
            return found
        copied: Tensor = GpuTensor(self.elem.detach().clone(), self.device.index)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        else:
            copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, tuple(args), dict(kwargs or {}))


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _bare(value: Any) -> Any:
    return value.elem if isinstance(value, GpuTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation below autograd."""
    leaves = tree_leaves((args, kwargs))
    placed = [value for value in leaves if isinstance(value, GpuTensor)]
    if not placed and not _is_device(kwargs.get("device")):
        return func(*args, **kwargs)
    composite = "CompositeImplicitAutograd"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if torch.is_inference_mode_enabled() and has(func.name(), composite):
        with _Dispatched():  # type: ignore[no-untyped-call]  # in that mode composite operations arrive whole
            return func.decompose(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    index = placed[0].device.index if placed else torch.device(kwargs["device"]).index or 0
    if name == "_to_copy":
        return _copied(func, args, kwargs, index)
    if name == "copy_":
        return _written(args[0], args[1])
    _check_places(name, args, kwargs, leaves, index)
    if "device" in kwargs and _is_device(kwargs["device"]):
        kwargs = kwargs | {"device": "cpu"}
    if name != "_pin_memory":
        kwargs.pop("pin_memory", None)
    made = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))

    def place(value: Any) -> Any:
        on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
        return GpuTensor(value, index) if on_cpu else value

    return return_and_correct_aliasing(func, args, kwargs, tree_map(place, made))


def _copied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
    """`.to(...)`: from a device, to it, or to another dtype there."""
    source: Any = args[0]
    wanted: Any = kwargs.get("device")
    here = isinstance(source, GpuTensor)
    there = _is_device(wanted) or (wanted is None and here)
    if here and not there:
        _seen.note("copy from the device", "to")
    if there and not here:
        _seen.note("copy to the device", "to")
    rest = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    if wanted is not None and torch.device(wanted).type == "meta":
        return func(_bare(source), **rest, device="meta")
    made = func(_bare(source), **rest)
    made = made.clone() if made is _bare(source) else made
    if not there:
        return made
    return GpuTensor(made, (torch.device(wanted).index or 0) if _is_device(wanted) else index)


def _written(target: Tensor, source: Tensor) -> Tensor:
    if isinstance(target, GpuTensor) != isinstance(source, GpuTensor) and source.dim():
        _seen.note("copy across", "copy_")
    _bare(target).copy_(_bare(source))
    return target


def _check_places(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], index: int
) -> None:
    """Refuse what a GPU would refuse, and count what would make the CPU wait for it."""
    outside = [
        value
        for value in leaves
        if isinstance(value, Tensor)
        and not isinstance(value, GpuTensor)
        and value.dim()
        and value.device.type == "cpu"
    ]
    values = [value for value in leaves if isinstance(value, GpuTensor)] + outside
    if name in _INDEXED:  # an index may be on the CPU: then it is copied first
        values = [v for v in (args[0], *args[2:3]) if isinstance(v, Tensor) and v.dim()]
        if any(value is not args[0] for value in outside):
            _seen.note("index on the CPU", name)
        if any(_is_mask(value) for value in args[1]):
            _seen.note("mask as an index", name)
    devices = {str(value.device) for value in values}
    if _is_device(kwargs.get("device")):
        devices.add(f"{NAME}:{index}")
    if len(devices) > 1:
        raise MixedDevicesError(f"{name} on {', '.join(sorted(devices))} at {_line()}")
    drawing = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    if any(generator.device.type == "cpu" for generator in drawing):
        raise MixedDevicesError(f"{name} with a generator of the CPU at {_line()}")
    if name in _WAITING and kwargs.get("output_size") is None:
        _seen.note("waits", name)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, tuple(args), dict(kwargs or {}))


class _Functions(torch.overrides.TorchFunctionMode):
    """What does not reach the dispatcher: `torch.tensor(..., device="gpu")`, lists as indices."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        values = not any(isinstance(value, Tensor) for value in args)
        if func in _MAKING and _is_device(kwargs.get("device")) and values:
            device = kwargs.pop("device")
            _seen.note("copy to the device", "tensor")
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs, device="cpu").to(device)
        on_device = bool(args) and isinstance(args[0], GpuTensor)
        if func is Tensor.new_tensor and on_device:
            made = torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype)
            return made.to(args[0].device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and on_device:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                device = args[0].device
                index = tuple(
                    torch.tensor(part).to(device) if isinstance(part, list) else part
                    for part in index
                )
                args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Make the device known. Before the first backward: autograd counts devices once."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        torch.__future__.set_swap_module_params_on_conversion(True)


@contextmanager
def pretended() -> Iterator[Seen]:
    """Tensors may be on `gpu:N` inside."""
    global _seen
    register()
    _seen = Seen()
    with _Functions(), _Dispatched():  # type: ignore[no-untyped-call]
        yield _seen
