"""The recipe of a command: checked before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plmcc.recipe.load import Recipe


_VECTORS = {".txt", ".vec", ".bin", ".npy"}
"""Suffixes of files of word vectors, which are models too."""


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe without mistakes, whose passes have options but no code until `load`."""

    path: Path
    recipe: Recipe

    def load(self) -> Recipe:
        """Return the recipe with passes that can be applied; this imports torch."""
        from plmcc.utils.terminal import calm

        calm()
        return self.recipe.with_code()

    def check_data(self, model: str | None, *, large: bool = False) -> int:
        """Read the data and check what needs no model; return the number of rows.

        Raises:
            PlmccError: the first thing that is wrong with it.
        """
        from plmcc.data.check import check_data

        check_model(model or self.recipe.model)
        return check_data(self.recipe, model, self.path.parent, large)


def check_model(name: object) -> None:
    """Refuse the name of a model that is no directory and no hub id, before torch is imported.

    Raises:
        PlmccError: it is not.
    """
    from plmcc.utils.files import check_not_local

    if not isinstance(name, str) or Path(name).is_dir():
        return
    if not (Path(name).is_file() and _VECTORS & set(Path(name).suffixes)):
        check_not_local(name)


def check_recipe(path: Path, overrides: Sequence[str] | None) -> CheckedRecipe:
    """Return the recipe in a file.

    Raises:
        PlmccError: everything that is wrong with it.
    """
    from plmcc.recipe.load import load_recipe
    from plmcc.recipe.needs import check_calibrated, check_trained

    recipe = load_recipe(path, overrides or ())
    check_trained(recipe)
    check_calibrated(recipe)
    return CheckedRecipe(path, recipe)
