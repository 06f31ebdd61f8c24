"""What models are exported to: files, and libraries that this needs. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.version import Version

from plmcc.diagnostics import did_you_mean, error, listing

TARGETS = ("aoti", "onnx", "executorch")
PROGRAMS = {"aoti": "model.pt2", "onnx": "model.onnx", "executorch": "model.pte"}
"""The program of an encoder; a translation model has several, all of them `.pt2`."""
NEEDED: dict[str, tuple[str, ...]] = {
    "aoti": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch",),
}
"""Packages besides plmcc's own."""
_EXPORTERS = Version("5.23")  # of transformers: the first whose exporters can be built upon


def check_target(to: str, *others: str) -> None:
    """Check the name of a target and the libraries that it needs.

    Args:
        to: the name.
        others: what may be given as well, for the error.

    Raises:
        PlmccError: there is no such target, or a library is missing or too old.
    """
    if to not in TARGETS:
        known = (*TARGETS, *others)
        message, allowed = "there is no such target", listing(known)
        hint = did_you_mean(to, known)
        raise error("PLM502", message, "--to", got=to, allowed=allowed, hint=hint)
    missing = [name for name in NEEDED[to] if importlib.util.find_spec(name) is None]
    if missing:
        hint = f"pip install {' '.join(missing)}, or plmcc with the extra `{to}`"
        raise error("PLM303", f"exporting to {to} needs {listing(missing)}", "--to", hint=hint)
    installed = importlib.metadata.version("transformers")
    if to != "aoti" and Version(installed) < _EXPORTERS:
        message, allowed = f"exporting to {to} needs a newer transformers", f"{_EXPORTERS} or newer"
        raise error("PLM303", message, "--to", got=installed, allowed=allowed)
