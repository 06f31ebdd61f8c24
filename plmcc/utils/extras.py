"""Libraries that come with plmcc's extras, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from plmcc.diagnostics import error


def library(module: str, extra: str, what: str, location: str, package: str = "") -> Any:
    """Return a module that comes with an extra.

    Args:
        module: its dotted name.
        extra: the extra of plmcc that brings it.
        what: what needs it, the subject of the error.
        location: the location of the error.
        package: its name for pip, if that is not the first part of `module`.

    Raises:
        PlmccError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.partition(".")[0]
        hint = f"pip install {package}, or plmcc with the extra `{extra}`"
        raise error("PLM303", f"{what} needs {package}", location, hint=hint) from None
