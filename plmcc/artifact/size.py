"""Bytes of a model by component, as they are on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from plmcc.diagnostics import error
from plmcc.ir.forms import Counted


@dataclass(frozen=True)
class Inventory:
    """The bytes of a model's tensors, and the paths of its tables and stacks of layers."""

    tensors: dict[tuple[str, ...], int]
    """By all names that a tensor has; the first is that of its component."""
    parts: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Inventory:
        """Take it. A tensor that several modules share counts once, for the first of them, or the
        first embedding table: some models hold their head before what it is tied to.
        Non-persistent buffers do not count: they are not in a file."""
        modules = list(model.named_modules())
        tables = {path for path, module in modules if isinstance(module, nn.Embedding)}
        stacks = {path for path, module in modules if isinstance(module, nn.ModuleList)}
        sizes = {names: value.nbytes for names, value in _tensors(model, tables).items()}
        return cls(sizes, (*sorted(tables), *sorted(stacks, key=len)))

    def by_component(self, rewritten: Iterable[str] = ()) -> dict[str, int]:
        """Return bytes by component: each rewritten path, the embedding tables, each stack of
        layers, the rest. The same paths make the bytes before and after comparable."""
        chosen, sizes = [*rewritten], dict[str, int]()
        for names, size in self.tensors.items():
            # A rewritten path may be another name of a tensor than the first.
            pairs = [(path, name) for path in chosen for name in names]
            pairs += [(path, names[0]) for path in self.parts]
            owner = next((path for path, name in pairs if name.startswith(f"{path}.")), "other")
            sizes[owner] = sizes.get(owner, 0) + size
        return sizes


def component_bytes(model: PreTrainedModel, rewritten: Iterable[str] = ()) -> dict[str, int]:
    """Return a model's bytes by component (`Inventory.by_component`)."""
    return Inventory.of(model).by_component(rewritten)


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, shared ones once. Integers that a pass has put
    in the place of weights count too."""
    own, seen, known = 0, set[int](), set[int]()
    for part in module.modules():
        if id(part) in known:
            continue
        if isinstance(part, Counted):
            own += part.parameter_count()
            known |= {id(child) for child in part.modules()}
            seen |= {id(p) for p in part.parameters()}
            continue
        for value in part.parameters(recurse=False):
            own += value.numel() if id(value) not in seen else 0
            seen.add(id(value))
    return own


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors, shared ones once."""
    seen = {id(value): value.nbytes for value in module.state_dict(keep_vars=True).values()}
    return sum(seen.values())


def file_bytes(folder: Path) -> int:
    """Return the bytes of the weight files in a folder."""
    return sum(
        file.stat().st_size
        for file in folder.glob("*.safetensors")
        if file.name != "probes.safetensors"
    )


def check_file(folder: Path, expected: dict[str, int]) -> None:
    """Compare the tensors in the weight files with what the components should take.

    Raises:
        PlmccError: the files hold more or fewer bytes of tensors.
    """
    stored = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    if stored != sum(expected.values()):
        given = f"{stored} bytes of tensors on disk, {sum(expected.values())} in memory"
        raise error("PLM402", "the weight file does not contain the model", str(folder), got=given)


def _tensors(model: PreTrainedModel, tables: set[str]) -> dict[tuple[str, ...], Tensor]:
    # transformers does not write what the model computes by itself, such as sinusoidal positions.
    unwritten = set(model._keys_to_ignore_on_save or ())
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in unwritten:
            found.setdefault(id(value), ([], value))[0].append(name)
    return {
        tuple(sorted(names, key=lambda name: name.rpartition(".")[0] not in tables)): value
        for names, value in found.values()
    }
