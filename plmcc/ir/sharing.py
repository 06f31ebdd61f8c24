"""Modules that use the tensors of others: each tensor is stored once, under its owner's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Alias(nn.Module):
    """Stands at one path for the module at another: it has no tensors and computes what that does.

    The owner is looked up at each call, by a path in a module that is held in a tuple, so that it
    is not registered twice. What replaces the owner, a quantized linear layer say, is thereby
    used here too.
    """

    def __init__(self, root: nn.Module, path: str) -> None:
        super().__init__()
        self._root, self._path = (root,), path

    @property
    def owner(self) -> nn.Module:
        """The module that has the tensors."""
        return self._root[0].get_submodule(self._path)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the owner."""
        called: object = self.owner(*args, **kwargs)
        return called

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that is being made, or nobody else's business
            return super().__getattr__(name)
        return getattr(self.owner, name)

    def extra_repr(self) -> str:
        """Return where the owner is."""
        return f"the same as {self._path}"


def share(root: nn.Module, shares: Mapping[str, str]) -> None:
    """Let modules use the tensors of others that are built alike (`unlike` says if they are).

    Args:
        root: what contains all of them.
        shares: for the path of each module in `root` that of its owner, which shares with none
            itself.

    Raises:
        ValueError: two are not built alike, or one is not there.
    """
    for member, owner in shares.items():
        try:
            module, other = root.get_submodule(member), root.get_submodule(owner)
        except AttributeError as problem:
            raise ValueError(f"{member} cannot share with {owner}: {problem}") from None
        reason = unlike(module, other)
        if reason:
            raise ValueError(f"{member} cannot share with {owner}: {reason}")
        for path in list(_places(module, other)):
            inside = f".{path}" if path else ""
            root.set_submodule(f"{member}{inside}", Alias(root, f"{owner}{inside}"))


def unlike(module: nn.Module, owner: nn.Module) -> str:
    """Return why one module cannot use the tensors of another; empty if it can.

    An owner may have tensors that the module lacks.
    """
    own = owner.state_dict()
    for name, value in module.state_dict().items():
        if name not in own:
            return f"only one has {name}"
        if own[name].shape != value.shape:
            return f"{name} has the shapes {tuple(value.shape)} and {tuple(own[name].shape)}"
    for path in _places(module, owner):
        part = module.get_submodule(path)
        if part._modules and part is not owner.get_submodule(path):
            return f"{path or type(part).__name__} has tensors beside modules"
    return ""


def sharing(model: nn.Module) -> dict[str, str]:
    """Return the path of the owner for the path of each module that uses the tensors of another."""
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    return {p: paths[m.owner] for p, m in modules.items() if isinstance(m, Alias)}


def _places(module: nn.Module, owner: nn.Module) -> Iterator[str]:
    """Yield the paths of the outermost modules that have tensors of their own, or are those of
    the owner."""
    if _tensors(module) or (module is owner and any(map(_tensors, module.modules()))):
        yield ""
        return
    others = dict(owner.named_children())
    for name, child in module.named_children():
        for path in _places(child, others.get(name, nn.Module())):
            yield f"{name}.{path}" if path else name


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors of a module itself that are saved."""
    passing = module._non_persistent_buffers_set
    saved = {n: v for n, v in module._buffers.items() if n not in passing}
    return [v for v in (*module._parameters.values(), *saved.values()) if v is not None]
