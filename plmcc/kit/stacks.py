"""Building blocks for passes on stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from plmcc.api import Miss, StackSite
from plmcc.diagnostics import error
from plmcc.ir.program import Program


def matched_stacks(
    program: Program,
    targets: str | list[str],
    expect: int | None,
    refusal: Callable[[StackSite], str] = lambda site: "",
) -> Iterator[StackSite | Miss]:
    """Yield every list of layers that contains a layer which targets name; `refusal` says why one
    does not fit, or nothing. Layers that share tensors already are a miss.

    Raises:
        PlmccError: a target matches no layer, or there is another number of stacks than expected.
    """
    layers = program.resolve(targets, "layer").sites
    paths = dict.fromkeys(site.path.rpartition(".")[0] for site in layers)
    found = [_stack(program, path, refusal) for path in paths]
    count = sum(isinstance(site, StackSite) for site in found)
    if expect is not None and count != expect:
        message = f"the targets match {count} stacks, expected {expect}"
        raise error("PLM202", message, "targets", got=", ".join(paths))
    yield from found


def _stack(program: Program, path: str, refusal: Callable[[StackSite], str]) -> StackSite | Miss:
    stack = program.model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    site = StackSite("stack", (path,), ("layer",), (stack,))
    depth = len(stack)
    if len({id(layer) for layer in stack}) < depth:
        return Miss(path, "several of its layers are the same module")
    if any(member.startswith(f"{path}.") for member in program.sharing()):
        return Miss(path, "its layers share tensors already")
    reason = refusal(site)
    return Miss(path, reason) if reason else site
