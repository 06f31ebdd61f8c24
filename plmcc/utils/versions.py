"""Installed versions of libraries, and which of them plmcc has been tested with."""

from __future__ import annotations

import importlib.metadata
import re

TESTED = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
    "sentence-transformers": ("5", "6"),
}
"""The oldest and the newest version with which `make matrix` runs the tests."""


def installed(name: str) -> str | None:
    """Return the version of a distribution without importing it, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested() -> list[str]:
    """Return a sentence for each library that is newer than what plmcc has been tested with.

    Such a version may well work, so that nothing refuses it; what is too old, pip has refused.
    """
    found = {name: installed(name) for name in TESTED}
    return [
        f"{name} {version} is newer than {TESTED[name][1]}, the newest that plmcc is tested with"
        for name, version in found.items()
        if version and _is_newer(version, TESTED[name][1])
    ]


def _is_newer(version: str, newest: str) -> bool:
    """Compare as far as `newest` goes: 2.15.1 is a 2.15."""
    bound = _numbers(newest)
    return _numbers(version)[: len(bound)] > bound


def _numbers(version: str) -> list[int]:
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in release[0].split(".")] if release else []
