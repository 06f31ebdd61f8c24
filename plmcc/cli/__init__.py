"""The command line; `python -m plmcc.cli` is the same."""

from plmcc.cli.app import main

__all__ = ["main"]
