"""What libraries print while plmcc runs."""

from __future__ import annotations

import sys
import warnings

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


def console() -> Console:
    """Return where tables are printed: wide enough for paths where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)
