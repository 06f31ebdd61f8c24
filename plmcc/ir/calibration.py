"""What modules are called with, and what they return, while a model runs on calibration data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.ir.probes import probe_inputs
from plmcc.ir.site import LinearSite, Site
from plmcc.ir.tracer import signature
from plmcc.utils.types import Values

Batch = dict[str, Tensor]
Kind = Literal["second_moment", "mean_norm"]
_BUDGET = 2**30  # bytes of statistics that are gathered in one pass over the data
_PROBES, _PROBED_ROWS, _PROBED_TOKENS = 10, 16, 32


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    arguments: Values
    """By the names of the parameters of `forward`, those that were given."""
    output: object

    @property
    def input(self) -> Tensor:
        """The first tensor that the module was given, for a layer its hidden states."""
        return next(v for v in self.arguments.values() if isinstance(v, Tensor))

    @property
    def result(self) -> Tensor:
        """The output, of a tuple the first part."""
        found = self.output[0] if isinstance(self.output, tuple) else self.output
        assert isinstance(found, Tensor)
        return found


@contextmanager
def observing(
    modules: Iterable[nn.Module], note: Callable[[nn.Module, Call], None]
) -> Iterator[None]:
    """Call `note` after each call of one of the modules, as long as the context lasts."""

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: Values, output: object) -> None:
        names = [parameter.name for parameter in signature(module)]
        note(module, Call({**dict(zip(names, args, strict=False)), **kwargs}, output))

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True)
class CalibrationData:
    """Encoded rows of the recipe's text that passes measure on."""

    batches: Sequence[Batch] = ()
    """Inputs of the model."""
    counts: Tensor | None = None
    """How often each token id occurs in all rows: (n,) int64, n - 1 the largest id that occurs;
    None without data."""
    tokenizer: object | None = None
    """The tokenizer of the model, where it has one."""
    planned: bool = False
    """Whether this is a plan: there will be batches, which are not read now."""
    synthetic: bool = False
    """Whether token ids are random, as the recipe asks."""

    @classmethod
    def random(cls, model: PreTrainedModel) -> CalibrationData:
        """Return batches of random token ids, for tests of passes on small models."""
        config = model.config
        names = ("max_position_embeddings", "max_target_positions", "n_positions")
        limits = [getattr(config, name) for name in names if getattr(config, name, None)]
        length = min([_PROBED_TOKENS, *limits])
        batches = [probe_inputs(model, _PROBED_ROWS, length, seed) for seed in range(_PROBES)]
        return cls(batches, synthetic=True)


@dataclass
class Calibration:
    """The calibration data of a stage together with the model: `program.data`.

    It is true where there are batches, or will be (in a plan). Everything is measured in
    evaluation mode, without gradients or a cache, on the model as it is when the first site of a
    pass asks: what other sites of that pass need is gathered on the same run.
    """

    model: PreTrainedModel
    data: CalibrationData = field(default_factory=CalibrationData)
    sites: Sequence[Site] = ()
    """What has been matched in the stage."""
    _found: dict[tuple[Kind, str], Tensor] = field(default_factory=dict, repr=False)
    _mask: Tensor | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return bool(self.data.batches) or self.data.planned

    @property
    def counts(self) -> Tensor | None:
        """How often each token id occurs in the data, (n,) int64; None without data."""
        return self.data.counts

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, or None."""
        return self.data.tokenizer

    @property
    def planned(self) -> bool:
        """Whether this is a plan: statistics then have shapes and no values."""
        return self.data.planned

    def run(
        self, gradients: bool = False, ended: Callable[[Any], None] = lambda output: None
    ) -> None:
        """Run the model on all batches, and call `ended` with each output. With gradients, run it
        backwards too, from the loss of the task or the mean square of the output: parameters then
        have no gradients, and hooks give inputs that need one.

        Raises:
            PlmccError: there is no data.
        """
        if not self:
            hint = "add `calibrate: {data: FILE}`, or `{data: synthetic}` for random token ids"
            message = "the pass measures the model on data, and the recipe has none"
            raise error("PLM303", message, hint=hint)
        model, mode = self.model, self.model.training
        known = inspect.signature(model.forward).parameters
        options = {"use_cache": False} if "use_cache" in known else {}
        frozen = [p for p in model.parameters() if gradients and p.requires_grad]
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            for number, batch in enumerate(self.data.batches):
                given = {name: value.to(model.device) for name, value in batch.items()}
                with torch.set_grad_enabled(gradients), self.masked(number):
                    output: Any = model(**given, **options)
                    ended(output)
                    if gradients:
                        _loss(output).backward()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            model.train(mode)

    def loss(self) -> float:
        """Return the mean loss of the task over the batches, in nats; 0 in a plan.

        Raises:
            PlmccError: there is no data, or the model has no loss on it.
        """
        found: list[float] = []

        def note(output: Any) -> None:
            loss = getattr(output, "loss", None)
            if loss is None:
                message = "the model has no loss on the calibration data: it has no labels"
                hint = "measure a language model, or labeled data"
                raise error("PLM303", message, got=type(self.model).__name__, hint=hint)
            found.append(float(loss))

        if not self.planned:
            self.run(ended=note)
        return sum(found) / max(1, len(found))

    @contextmanager
    def masked(self, batch: int) -> Iterator[None]:
        """Let `real_tokens` know the padding of a batch, given by its number, while a part of the
        model runs on it."""
        self._mask = self.data.batches[batch].get("attention_mask")
        try:
            yield
        finally:
            self._mask = None

    def observe(
        self, modules: Iterable[nn.Module], note: Callable[[nn.Module, Call], None]
    ) -> None:
        """Run the model on all batches, and call `note` after each call of one of the modules.

        In a plan nothing is run.
        """
        if not self.planned:
            with observing(modules, note):
                self.run()

    def record(self, path: str) -> list[Call]:
        """Return all calls of the module at a path; none in a plan."""
        calls: list[Call] = []
        self.observe([self.model.get_submodule(path)], lambda _, call: calls.append(call))
        assert calls or self.planned, f"the model never ran {path}"
        return calls

    def second_moment(self, site: LinearSite) -> Tensor:
        """Return E[x xᵀ] of the inputs of a linear map over all real tokens: (in, in) float32."""
        return self._statistic("second_moment", site)

    def mean_norm(self, site: LinearSite) -> Tensor:
        """Return √E[x²] of each input of a linear map over all real tokens: (in,) float32."""
        return self._statistic("mean_norm", site)

    def _statistic(self, kind: Kind, site: LinearSite) -> Tensor:
        if (kind, site.path) not in self._found:
            self._found |= self._gathered(kind, self._group(kind, site))
        return self._found.pop((kind, site.path))

    def _group(self, kind: Kind, site: LinearSite) -> list[LinearSite]:
        """Return a site, and as many of those after it as memory allows."""
        linears = [one for one in self.sites if isinstance(one, LinearSite)]
        paths = [one.path for one in linears]
        rest = linears[paths.index(site.path) :] if site.path in paths else [site]
        sizes = accumulate(8 * math.prod(_shape(kind, one)) for one in rest)
        fits = [one for one, size in zip(rest, sizes, strict=True) if size <= _BUDGET]
        return fits or [site]

    def _gathered(self, kind: Kind, sites: Sequence[LinearSite]) -> dict[tuple[Kind, str], Tensor]:
        shapes = {(kind, site.path): _shape(kind, site) for site in sites}
        if self.planned:
            return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        owners = {module: (kind, site.path) for site in sites for module in site.modules}
        sums: dict[tuple[Kind, str], Tensor] = {}
        tokens = dict.fromkeys(shapes, 0)

        def note(module: nn.Module, call: Call) -> None:
            x_ND, key = self.real_tokens(call.input), owners[module]
            added = (x_ND.T @ x_ND if kind == "second_moment" else x_ND.square().sum(0)).double()
            sums[key] = sums[key] + added if key in sums else added
            tokens[key] += len(x_ND)

        self.observe(owners, note)
        missing = [path for _, path in shapes if (kind, path) not in sums]
        assert not missing, f"the model never ran {', '.join(missing)}"
        means = {key: (sums[key] / max(1, tokens[key])).float() for key in shapes}
        return {k: mean if kind == "second_moment" else mean.sqrt() for k, mean in means.items()}

    def real_tokens(self, x: Tensor) -> Tensor:
        """Return the vectors (N, D) of hidden states (B, L, D) or (B L, D) that are no padding.

        To be called while a batch runs, as by `note` of `observe`.
        """
        mask = self._mask
        if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
            return x[mask.bool()].float()
        if mask is not None and x.dim() == 2 and len(x) == mask.numel():  # OPT flattens them
            return x[mask.flatten().bool()].float()
        return x.flatten(0, -2).float()


def _loss(output: Any) -> Tensor:
    """Return the loss of the task, or the mean square of the first output."""
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is None:
        first: Tensor = output[0]
        loss = first.float().square().mean()
    return loss


def _shape(kind: Kind, site: LinearSite) -> tuple[int, ...]:
    return (site.in_features,) * (2 if kind == "second_moment" else 1)
