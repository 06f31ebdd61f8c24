"""Linear layers in 8 or 4 bits: weights quantized by torchao, stored and loaded as plain integers.

Weight-only: `int8`, symmetric with one scale for each output; `int4`, symmetric with one scale for
each group of 32 inputs or so. `int8_dynamic` (Jacob et al., CVPR 2018, 1712.05877; activations by
token as in ZeroQuant, 2206.01861) also quantizes activations on arrival, with one scale for each
token, and multiplies integers. Matches linear layers, GPT-2's transposed ones included; a head that
is tied to an embedding table is left to the passes on tables. Stored: integers (O, I), two in a
byte where they have 4 bits, and scales in the model's dtype. With `trainable` the weights are
trained while the layers compute with their quantized values, and gradients pass as if they did not
(quantization-aware training as in Jacob et al.; straight through: Bengio et al., 1308.3432).
Quantizing without it needs torchao (extra `quantize`), loading the result does not.
Shapes: O outputs, I inputs, G groups of inputs, N tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from plmcc.api import (
    Hard,
    LinearSite,
    Miss,
    Pass,
    Planned,
    Program,
    Site,
    Soft,
    error,
    refuse_unused,
)
from plmcc.kit import HardLinear, Trainable, matched_linears, weight_of

_LEVELS = 127


class QuantizedLinears(Pass):
    """Quantize linear layers to 8 or 4 bits, as the last step of a recipe."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Jacob et al., CVPR 2018, arXiv:1712.05877; by torchao"
    hazards: ClassVar[tuple[str, ...]] = (
        "Weight-only layers are smaller, and on CPUs slower than float ones in large batches.",
        "int4 without training afterwards costs small models more than a point.",
    )

    targets: str | list[str] = "linears"
    """The linear layers to quantize."""
    scheme: Literal["int8", "int4", "int8_dynamic"] = "int8"
    """Weights in 8 or 4 bits, or weights and activations in 8 bits."""
    group: int = Field(32, ge=8, le=1024)
    """int4: number of inputs that share a scale."""
    trainable: bool = False
    """Train the weights too, quantized in every step (quantization-aware training). Without, the
    integers stay as they are, and only biases are trained."""

    @model_validator(mode="after")
    def _group_has_effect(self) -> QuantizedLinears:
        refuse_unused(self, {"group": self.scheme == "int4"}, "unless `scheme` is `int4`")
        return self

    def needs_training(self) -> str:
        """Weights that are to be trained."""
        return "`trainable` trains the weights with the errors of their integers" * self.trainable

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield linear layers; inputs that groups do not divide are a miss."""
        yield from matched_linears(program, self.targets, self.expect, self._refusal)

    def _refusal(self, site: LinearSite) -> str:
        if self.scheme == "int4" and site.in_features % self.group:
            return (
                f"its {site.in_features} inputs are not a multiple of the group size {self.group}"
            )
        if self.scheme == "int4" and site.in_features % 2:
            return f"its {site.in_features} inputs are an odd number, and int4 stores pairs"
        return ""

    def plan(self, site: Site) -> Planned:
        """The layer with empty integers."""
        assert isinstance(site, LinearSite)
        trained = site.in_features * site.out_features if self.trainable else 0
        return Planned(self._empty(site), trained=trained)

    def _empty(self, site: LinearSite) -> QuantizedLinear:
        inputs, outputs = site.in_features, site.out_features
        groups = inputs // self.group if self.scheme == "int4" else 1
        return QuantizedLinear(inputs, outputs, self.scheme, groups, site.bias)

    def replace(self, site: Site, program: Program) -> Soft:
        """Quantize the weights; biases stay trainable.

        Raises:
            PlmccError: torchao is not installed, or a weight is not finite.
        """
        assert isinstance(site, LinearSite)
        weight_OI = weight_of(site)
        hard = self._empty(site).to(weight_OI.device, weight_OI.dtype)
        hard.take_bias(site)
        if self.trainable:
            return FakeQuantized(hard, weight_OI)
        hard.take(*_rounded(weight_OI, 4 if self.scheme == "int4" else 8, self.group))
        error_OI = hard.dense().detach().float() - weight_OI.float()
        size = weight_OI.float().square().mean().sqrt().clamp(min=1e-12)
        return Trainable(hard, {"relative_error": float(error_OI.square().mean().sqrt() / size)})


def _rounded(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers (O, I) int8, and scales (O, G)."""
    try:
        library: Any = importlib.import_module("torchao.quantization")
    except ImportError:
        hint = "pip install torchao, or plmcc with the extra `quantize`"
        raise error(
            "PLM303", "quantizing weights needs torchao", "quantized_linears", hint=hint
        ) from None
    grains = importlib.import_module("torchao.quantization.granularity")
    config = library.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=grains.PerAxis(0) if bits == 8 else grains.PerGroup(group),
    )
    with torch.device("meta"):
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI.float(), requires_grad=False)
    holder = nn.Sequential(linear)
    library.quantize_(holder, config)
    found: Any = holder[0].weight
    return found.qdata, found.scale.reshape(len(weight_OI), -1)


def _pairs(levels_OI: Tensor) -> Tensor:
    """Two levels of -8 to 7 in a byte: the first in the high half."""
    shifted_OI = (levels_OI + 8).to(torch.uint8)
    return shifted_OI[:, ::2] << 4 | shifted_OI[:, 1::2]


class QuantizedLinear(HardLinear):
    """A linear layer of integers (O, I), uint8 pairs where they have 4 bits, and scales (O, G)."""

    def __init__(
        self, in_features: int, out_features: int, scheme: str, groups: int, bias: bool
    ) -> None:
        super().__init__(in_features, out_features, bias, scheme=scheme, groups=groups)
        if scheme not in ("int8", "int4", "int8_dynamic"):
            raise ValueError(f"no scheme {scheme!r}: int8, int4, int8_dynamic")
        self.scheme, self.groups = scheme, groups
        self.rounds_inputs = scheme == "int8_dynamic"
        halves = scheme == "int4"
        width, kind = (in_features // 2, torch.uint8) if halves else (in_features, torch.int8)
        self.levels: Tensor
        self.register_buffer("levels", torch.zeros(out_features, width, dtype=kind))
        self.scales: Tensor
        self.register_buffer("scales", torch.zeros(out_features, groups))

    def take(self, levels_OI: Tensor, scales_OG: Tensor) -> None:
        """Store integers and scales."""
        self.levels.copy_(_pairs(levels_OI) if self.scheme == "int4" else levels_OI)
        self.scales.copy_(scales_OG)

    def parameter_count(self) -> int:
        """Return the number of integers, scales and biases."""
        more = self.levels.numel() if self.scheme == "int4" else 0
        return super().parameter_count() + more

    def dense(self) -> Tensor:
        """The weight (O, I) in the scales' dtype."""
        if self.scheme != "int4":
            return self.levels.to(self.scales.dtype) * self.scales
        pairs_OI2 = torch.stack([self.levels >> 4, self.levels & 15], -1)
        levels_OGi = pairs_OI2.view(self.out_features, self.groups, -1).to(self.scales.dtype) - 8
        return (levels_OGi * self.scales[..., None]).flatten(1)

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.scheme == "int8":
            return F.linear(x, self.levels.to(x.dtype)) * self.scales[:, 0]
        if self.scheme == "int4":
            return F.linear(x, self.dense().to(x.dtype))
        return self._dynamic(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)

    def _dynamic(self, x_NI: Tensor) -> Tensor:
        """Products (N, O) of quantized activations: exact integers, then both scales."""
        levels_NI, rounded_NI, step_N1 = quantized_inputs(x_NI)
        if torch.is_grad_enabled() or x_NI.device.type != "cpu":
            # In float32 sums of 8-bit products are exact up to 2^24, and near it beyond.
            sums_NO = F.linear(levels_NI.float(), self.levels.float())
        else:
            sums_NO = torch._int_mm(rounded_NI.to(torch.int8), self.levels.T).float()
        return (sums_NO * step_N1.float()).to(x_NI.dtype) * self.scales[:, 0]


def quantized_inputs(x_NI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations in steps of their token, straight through and as whole numbers, and the
    steps (N, 1)."""
    step_N1 = (x_NI.detach().abs().amax(1, keepdim=True) / _LEVELS).clamp(min=1e-8)
    rounded_NI = (x_NI / step_N1).round()
    return x_NI / step_N1 + (rounded_NI - x_NI / step_N1).detach(), rounded_NI, step_N1


class FakeQuantized(Soft):
    """A linear layer with float weights that computes with what they are quantized to. Gradients
    reach the weights as if they were not; scales follow the largest weight of each group."""

    def __init__(self, hard: QuantizedLinear, weight_OI: Tensor) -> None:
        super().__init__()
        self.hard, self.weight = hard, nn.Parameter(weight_OI.clone())
        self.in_features, self.out_features = hard.in_features, hard.out_features
        self.bits = 4 if hard.scheme == "int4" else 8

    def _quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight in steps (O, G, i) and the nearest integers, and the steps (O, G): the
        same as torchao's symmetric mapping, up to ties."""
        least, most = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        weight_OGi = self.weight.float().unflatten(1, (self.hard.groups, -1))
        half = (most - least) / 2
        step_OG = (weight_OGi.detach().abs().amax(-1) / half).clamp(min=torch.finfo().tiny)
        steps_OGi = weight_OGi / step_OG[..., None]
        return steps_OGi, steps_OGi.detach().round().clamp(least, most), step_OG

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.product(x)
        return y if self.hard.bias is None else y + self.hard.bias

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), without the bias."""
        steps_OGi, levels_OGi, step_OG = self._quantized()
        through_OGi = steps_OGi + (levels_OGi - steps_OGi).detach()
        if self.hard.scheme != "int8_dynamic":
            weight_OI = (through_OGi * step_OG[..., None]).flatten(1)
            return F.linear(x, weight_OI.to(x.dtype))
        inputs_NI, _, step_N1 = quantized_inputs(x.reshape(-1, self.in_features))
        sums_NO = F.linear(inputs_NI.float(), through_OGi.flatten(1))
        made = (sums_NO * step_N1.float()).to(x.dtype) * step_OG[:, 0].to(x.dtype)
        return made.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def harden(self) -> Hard:
        """Return the layer with the integers that the weights have become."""
        _, levels_OGi, step_OG = self._quantized()
        self.hard.take(levels_OGi.flatten(1).to(torch.int8), step_OG)
        return self.hard

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Return the error of the integers relative to the weights."""
        steps_OGi, levels_OGi, step_OG = self._quantized()
        error = ((levels_OGi - steps_OGi) * step_OG[..., None]).square().mean().sqrt()
        size = self.weight.float().square().mean().sqrt().clamp(min=1e-12)
        return {"relative_error": float(error / size)}
