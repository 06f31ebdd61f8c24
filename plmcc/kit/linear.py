"""Building blocks for passes on linear maps: what a site holds, and what it becomes.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plmcc.api import Hard, Layout, LinearSite, Miss
from plmcc.diagnostics import error
from plmcc.ir.program import Program


def matched_linears(
    program: Program,
    targets: str | list[str],
    expect: int | None,
    refusal: Callable[[LinearSite], str] = lambda site: "",
) -> Iterator[LinearSite | Miss]:
    """Yield the linear maps that targets name; `refusal` says why one does not fit, or nothing."""
    for found in program.resolve(targets, "linear", expect):
        if isinstance(found, Miss) or not isinstance(found, LinearSite):
            yield cast(Miss, found)
        else:
            reason = refusal(found)
            yield Miss(found.path, reason) if reason else found


def weight_of(site: LinearSite) -> Tensor:
    """Return the weight (O, I) of a linear map without its history, `Conv1D` turned.

    Raises:
        PlmccError: it holds values that are not finite.
    """
    weight = site.module.get_parameter("weight").detach()
    if not weight.is_meta and not torch.isfinite(weight).all():
        message = "the weight contains values that are not finite"
        raise error("PLM203", message, f"model: {site.path}")
    return weight.T.contiguous() if site.transposed else weight


class HardLinear(Hard):
    """A linear map in another form; abstract: `product` and `dense` say which.

    `layout` holds the sizes and all of `own`. `weight` costs nothing where a model only asks for
    its dtype, device or shape (T5 does, at every call).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        **own: int | float | bool | str | list[int] | list[str],
    ) -> None:
        super().__init__()
        self.layout: Layout = {
            "in_features": in_features,
            "out_features": out_features,
            **own,
            "bias": bias,
        }
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def product(self, x: Tensor) -> Tensor:
        """Return the products (..., O) of inputs (..., I) with the weight, without the bias."""
        raise NotImplementedError(f"{type(self).__name__} has no method `product`")

    def dense(self) -> Tensor:
        """Return the weight (O, I)."""
        raise NotImplementedError(f"{type(self).__name__} has no method `dense`")

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O).

        Inputs of another floating dtype are cast: T5 keeps some layers in float32, and casts what
        it hands them, but only where `weight` is a tensor.
        """
        dtype = self.stored_like().dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def stored_like(self) -> Tensor:
        """Return a tensor of the dtype and on the device in which this is stored."""
        tensors = (*self.parameters(), *self.buffers())
        return next(tensor for tensor in tensors if tensor.is_floating_point())

    @property
    def weight(self) -> Tensor:
        """The weight (O, I): built when it is used, and not when its attributes are read."""
        return cast(Tensor, LazyWeight(self))

    def merged(self) -> nn.Linear:
        """Return an ordinary linear layer that computes the same."""
        weight = self.dense().detach()
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        made.weight = nn.Parameter(weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made.train(self.training)

    def take_bias(self, site: LinearSite) -> None:
        """Copy the bias of a site."""
        if self.bias is not None:
            self.bias.data.copy_(site.module.get_parameter("bias").detach())


class LazyWeight:
    """Stands for the weight of a `HardLinear`; any use of its values builds it."""

    def __init__(self, linear: HardLinear) -> None:
        like = linear.stored_like()
        self.dtype, self.device, self._linear = like.dtype, like.device, linear
        self.shape = torch.Size((linear.out_features, linear.in_features))
        self.ndim, self.requires_grad, self.is_meta = 2, like.requires_grad, like.is_meta

    def dim(self) -> int:
        """Return 2."""
        return 2

    def size(self, dim: int | None = None) -> int | torch.Size:
        """Return the shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of entries."""
        return self.shape.numel()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_linear":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._linear.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def built(value: Any) -> Any:
            return value._linear.dense() if isinstance(value, cls) else value

        named = {name: built(value) for name, value in (kwargs or {}).items()}
        return function(*map(built, args), **named)


def _forwarded(name: str) -> Callable[..., object]:
    def operator(self: LazyWeight, *args: object) -> object:
        result: object = getattr(self._linear.dense(), name)(*args)
        return result

    return operator


_BINARY = ("add", "sub", "mul", "truediv", "matmul", "pow")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "getitem", "len", "iter", "abs"):
    # Python looks operators up on the class.
    setattr(LazyWeight, f"__{_name}__", _forwarded(f"__{_name}__"))
