"""Texts for messages."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if it has no message."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
