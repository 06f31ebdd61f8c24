"""Checks of integer tensors that come from a file: `Hard.check_loaded` calls them before any kernel
reads the values, since some write before they look at bounds."""

from __future__ import annotations

from torch import Tensor


def check_range(name: str, values: Tensor, below: int) -> None:
    """Check that integers are at least 0 and below a bound.

    Args:
        name: of the tensor, for the message.
        values: integers of any shape and dtype.
        below: the bound.

    Raises:
        ValueError: one is not.
    """
    if values.numel() == 0:
        return
    low, high = (int(value) for value in values.long().aminmax())
    if low < 0 or high >= below:
        worst = low if low < 0 else high
        raise ValueError(f"`{name}` has the value {worst}; 0 to {below - 1} are allowed")


def check_starts(name: str, starts: Tensor, total: int) -> None:
    """Check where the rows of a sparse matrix begin: from 0 to the number of its values, in order.

    Args:
        name: of the tensor, for the message.
        starts: (rows + 1,) integers.
        total: how many values there are.

    Raises:
        ValueError: they do not.
    """
    wide = starts.long()
    ordered = bool((wide.diff() >= 0).all())
    if int(wide[0]) != 0 or int(wide[-1]) != total or not ordered:
        message = f"`{name}` does not rise from 0 to {total}, the number of values"
        raise ValueError(message)


def check_counts(name: str, found: Tensor, expected: Tensor) -> None:
    """Check that counts which are computed from a tensor are those that others rely on.

    Args:
        name: of the tensor, for the message.
        found: the counts, integers.
        expected: as many integers.

    Raises:
        ValueError: they differ.
    """
    if not bool((found.long() == expected.long()).all()):
        raise ValueError(f"`{name}` names other places than there are values for")
