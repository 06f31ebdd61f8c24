"""What libraries print while plmcc runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers
from rich.console import Console
from transformers.utils import logging


def calm() -> None:
    """Keep transformers' notes about things plmcc does on purpose off the terminal; errors still
    show."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"torch\..*|transformers\..*|accelerate\..*")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@contextmanager
def hushed() -> Iterator[None]:
    """Let transformers print nothing: neither warnings nor progress bars."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def console() -> Console:
    """Return where tables are printed: wide enough for paths where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)
