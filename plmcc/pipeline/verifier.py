"""The model after each pass: is it still a program, and what does it look like?

As the verifiers of MLIR and xDSL, this names the pass that broke something, where later checks
would only see that something is broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.api import Hard
from plmcc.artifact.verify import first_output
from plmcc.diagnostics import error, listing
from plmcc.ir.layers import Layer
from plmcc.ir.program import Program
from plmcc.rewrite import Replacement, View, calling
from plmcc.utils.files import replace_file

Form = Literal["trainable", "deployed"]


@dataclass(frozen=True)
class Dump:
    """Where the model is written as text after a pass."""

    names: Sequence[str]
    """Of the passes."""
    folder: Path

    def write(
        self, model: PreTrainedModel, stage: str, done: Sequence[Replacement], form: Form
    ) -> Path | None:
        """Write the model as a pass has left it, if its name is asked for; return the file."""
        name = done[0].name
        if name not in self.names:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{stage}.{name}.{form}.txt"
        with replace_file(file) as draft:
            draft.write_text("\n".join(_text(model, stage, done, form)) + "\n", encoding="utf-8")
        return file


def ties_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the names of tied tensors, with those of what they are tied to. transformers names
    some that are not tied."""
    pairs = model.all_tied_weights_keys.items()
    return {one: two for one, two in pairs if _tensor(model, one) is _tensor(model, two)}


def verify_program(
    model: PreTrainedModel,
    done: Sequence[Replacement],
    inputs: dict[str, Tensor],
    ties: Mapping[str, str],
    form: Form,
) -> None:
    """Check what one pass has made of a model.

    Args:
        model: with the sites of the pass in the form.
        done: these sites.
        inputs: arguments of the model.
        ties: `ties_of` the model before the stage.
        form: "trainable", after `replace`, or "deployed", after `harden`.

    Raises:
        PlmccError: a site holds another module than it should, a tied path keeps a weight, a
            deployed tensor has a dtype that the site did not have, or values are not finite. The
            error names the pass.
    """
    for site, reason in _violations(model, done, ties, form):
        raise _broken(done, f"model: {site}", reason)
    with calling(done[0].options, "forward", f"model: {done[0].site.path}"):
        output = first_output(model, inputs)
    if not torch.isfinite(output).all():
        raise _broken(done, f"model: {type(model).__name__}", "the outputs are not finite")


def _broken(done: Sequence[Replacement], at: str, reason: str) -> Exception:
    hint = "this is a bug of the pass, or its options do not suit the weights"
    return error("PLM112", f"after the pass `{done[0].name}` {reason}", at, hint=hint)


def _violations(
    model: PreTrainedModel, done: Sequence[Replacement], ties: Mapping[str, str], form: Form
) -> Iterator[tuple[str, str]]:
    for one in done:
        layer = one.site.roles[0] == "layer"
        for path in one.site.paths[1:]:
            module = model.get_submodule(path)
            if not layer and not isinstance(module, View):
                yield path, f"it is a {type(module).__name__}, and should share {one.site.path}"
        module = model.get_submodule(one.site.path)
        if not layer and form == "deployed" and not isinstance(module, Hard):
            yield one.site.path, f"it is a {type(module).__name__}, and no `Hard`"
        for name, value in module.state_dict(keep_vars=True).items():
            at = f"{one.site.path}.{name}"
            if not value.is_floating_point():
                continue
            if form == "deployed" and one.dtypes and value.dtype not in one.dtypes:
                was = listing(sorted(str(dtype) for dtype in one.dtypes))
                yield at, f"the tensor has the dtype {value.dtype}, and the site had {was}"
            if not torch.isfinite(value).all():
                yield at, "the tensor has values that are not finite"
    for target, source in ties.items():
        if _tensor(model, target) is not _tensor(model, source):
            yield target, f"the tensor is no longer tied to {source}"


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # of a layer that was dropped
        return None
    return module._parameters.get(last, module._buffers.get(last))


def _text(
    model: PreTrainedModel, stage: str, done: Sequence[Replacement], form: Form
) -> Iterator[str]:
    """Yield the lines of a dump: sites, graphs, modules, tensors."""
    yield f"# stage {stage}, after the pass {done[0].name}, {form}"
    yield ""
    yield "## sites"
    for one in done:
        tied = f" (tied: {listing(one.site.paths[1:])})" if len(one.site.paths) > 1 else ""
        module = model.get_submodule(one.site.path)
        layout = getattr(module, "layout", None) if form == "deployed" else None
        yield f"{one.site.path}{tied}: {type(one.site.module).__name__} -> {type(module).__name__}"
        if layout:
            yield f"    layout: {layout}"
    program = Program(model)
    layers = {s.path for one in done for s in [one.site] if program.is_layer(s.path)}
    for path in sorted(layers):
        layer = program.layer(path)
        yield from ("", f"## graph of {path}")
        yield layer.graph_module.code.strip() if isinstance(layer, Layer) else layer.reason
    yield from ("", "## modules", repr(model), "", "## tensors")
    seen: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(value), name)
        shape = " x ".join(map(str, value.shape)) or "scalar"
        about = f"tied to {first}" if first != name else f"{value.nbytes:,} bytes"
        yield f"{name}: {str(value.dtype).removeprefix('torch.')} {shape}, {about}"
    for member, owner in program.sharing().items():
        yield f"{member}: the tensors of {owner}"
