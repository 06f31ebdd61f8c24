"""Linear layers in 8 or 4 bits: weights rounded by torchao, stored and loaded as plain integers.

Weight-only: `int8`, symmetric with one scale for each output; `int4`, symmetric with one scale for
each group of 32 inputs or so. `int8_dynamic` (Jacob et al., CVPR 2018, 1712.05877; activations by
token as in ZeroQuant, 2206.01861) also rounds activations when they arrive, with one scale for each
token, and multiplies integers. Matches linear layers, GPT-2's transposed ones included; a head that
is tied to an embedding table is left to the passes on tables. Stored: integers (O, I), two in a
byte where they have 4 bits, and scales in the model's dtype. Rounding needs torchao (extra
`quantize`), loading the result does not.
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

from plmcc.api import Hard, Miss, Pass, Planned, Site, Soft
from plmcc.diagnostics import error
from plmcc.program import Program

_LEVELS = 127


class QuantizedLinears(Pass):
    """Round the weights of linear layers to 8 or 4 bits; as the last step of a recipe."""

    preserves: ClassVar[Literal["lossy"]] = "lossy"
    paper: ClassVar[str] = "Jacob et al., CVPR 2018, arXiv:1712.05877; rounding by torchao"
    hazards: ClassVar[tuple[str, ...]] = (
        "Weight-only layers are smaller, and on CPUs slower than float ones in large batches.",
        "int4 without training afterwards costs small models more than a point.",
    )

    targets: str | list[str] = "linears"
    """Which linear layers."""
    scheme: Literal["int8", "int4", "int8_dynamic"] = "int8"
    """Weights in 8 or 4 bits, or weights and activations in 8."""
    group: int = Field(32, ge=8, le=1024)
    """int4: inputs that share a scale."""

    @model_validator(mode="after")
    def _group_has_effect(self) -> QuantizedLinears:
        if self.group != 32 and self.scheme != "int4":
            raise ValueError("`group` has an effect with scheme `int4` only: remove it")
        return self

    def match(self, program: Program) -> Iterator[Site | Miss]:
        """Yield linear layers; inputs that groups do not divide are a miss."""
        for found in program.resolve(self.targets, "linear", self.expect):
            width = found.facts["in_features"] if isinstance(found, Site) else 0
            if self.scheme == "int4" and width % self.group:
                yield Miss(found.path, f"its {width} inputs are not whole groups of {self.group}")
            elif isinstance(found, Site) and len(found.paths) > 1:
                yield Miss(found.path, f"it shares its weight with {', '.join(found.paths[1:])}")
            else:
                yield found

    def plan(self, site: Site) -> Planned:
        """The layer with empty integers."""
        return Planned(self._empty(site.facts))

    def _empty(self, facts: dict[str, Any]) -> QuantizedLinear:
        inputs, outputs = facts["in_features"], facts["out_features"]
        groups = inputs // self.group if self.scheme == "int4" else 1
        return QuantizedLinear(inputs, outputs, self.scheme, groups, facts["bias"])

    def replace(self, site: Site) -> Soft:
        """Round the weights; biases stay trainable.

        Raises:
            PlmccError: torchao is not installed.
            ValueError: a weight is not finite.
        """
        weight_OI = site.module.get_parameter("weight").detach()
        if site.facts["transposed"]:
            weight_OI = weight_OI.T.contiguous()
        if not torch.isfinite(weight_OI).all():
            raise ValueError("the weight holds values that are not finite")
        levels_OI, scales_OG = _rounded(weight_OI, 4 if self.scheme == "int4" else 8, self.group)
        hard = self._empty(site.facts).to(weight_OI.device, weight_OI.dtype)
        hard.levels.copy_(_pairs(levels_OI) if self.scheme == "int4" else levels_OI)
        hard.scales.copy_(scales_OG)
        if hard.bias is not None:
            hard.bias.data.copy_(site.module.get_parameter("bias").detach())
        error_OI = hard.weight.detach().float() - weight_OI.float()
        size = weight_OI.float().square().mean().sqrt().clamp(min=1e-12)
        return SoftQuantized(hard, float(error_OI.square().mean().sqrt() / size))


def _rounded(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers (O, I) int8, and scales (O, G)."""
    try:
        library: Any = importlib.import_module("torchao.quantization")
    except ImportError:
        cure = "pip install torchao, or plmcc with the extra `quantize`"
        raise error("PLM303", "rounding weights needs torchao", "quantized_linears",
                    cure=cure) from None  # fmt: skip
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


class SoftQuantized(Soft):
    """Frozen integers and scales; the bias trains."""

    def __init__(self, quantized: QuantizedLinear, relative_error: float) -> None:
        super().__init__()
        self.quantized, self.relative_error = quantized, relative_error

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y: Tensor = self.quantized(x)
        return y

    @property
    def weight(self) -> Tensor:
        """The weight (O, I)."""
        return self.quantized.weight

    def harden(self) -> Hard:
        """Return the layer itself."""
        return self.quantized

    def facts(self) -> dict[str, float]:
        """Root mean square of the rounding error, relative to that of the weights."""
        return {"relative_error": self.relative_error}


class QuantizedLinear(Hard):
    """A linear layer of integers (O, I), uint8 pairs where they have 4 bits, and scales (O, G)."""

    def __init__(
        self, in_features: int, out_features: int, scheme: str, groups: int, bias: bool
    ) -> None:
        super().__init__()
        if scheme not in ("int8", "int4", "int8_dynamic"):
            raise ValueError(f"no scheme {scheme!r}: int8, int4, int8_dynamic")
        self.layout = {
            "in_features": in_features, "out_features": out_features, "scheme": scheme,
            "groups": groups, "bias": bias,
        }  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.groups = scheme, groups
        halves = scheme == "int4"
        width, kind = (in_features // 2, torch.uint8) if halves else (in_features, torch.int8)
        self.levels: Tensor
        self.register_buffer("levels", torch.zeros(out_features, width, dtype=kind))
        self.scales: Tensor
        self.register_buffer("scales", torch.zeros(out_features, groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) in the scales' dtype."""
        if self.scheme != "int4":
            return self.levels.to(self.scales.dtype) * self.scales
        pairs_OI2 = torch.stack([self.levels >> 4, self.levels & 15], -1)
        levels_OGi = pairs_OI2.view(self.out_features, self.groups, -1).to(self.scales.dtype) - 8
        return (levels_OGi * self.scales[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.scheme == "int8":
            y = F.linear(x, self.levels.to(x.dtype)) * self.scales[:, 0]
        elif self.scheme == "int4":
            y = F.linear(x, self.weight.to(x.dtype))
        else:
            y = self._dynamic(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _dynamic(self, x_NI: Tensor) -> Tensor:
        """Products (N, O) of rounded activations: exact integers, then both scales."""
        step_N1 = (x_NI.detach().abs().amax(1, keepdim=True) / _LEVELS).clamp(min=1e-8)
        rounded_NI = (x_NI / step_N1).round()
        levels_NI = x_NI / step_N1 + (rounded_NI - x_NI / step_N1).detach()  # straight through
        if torch.is_grad_enabled() or x_NI.device.type != "cpu":
            # In float32 sums of 8-bit products are exact up to 2^24, and near it beyond.
            sums_NO = F.linear(levels_NI.float(), self.levels.float())
        else:
            sums_NO = torch._int_mm(rounded_NI.to(torch.int8), self.levels.T).float()
        return (sums_NO * step_N1.float()).to(x_NI.dtype) * self.scales[:, 0]
