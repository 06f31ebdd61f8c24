"""Models without weights, recipes in a line, and the command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plmcc.cli.app import main
from plmcc.recipe import Recipe, parse_recipe
from support.processes import run_module
from support.tiny_models import tiny


def outline_of(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A directory with a config and no weights."""
    model = tiny(name)
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    return folder


def recipe_of(text: str) -> Recipe:
    return parse_recipe("plmcc: 1\n" + text, load_torch=True)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", arguments)


def run_here(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, which has torch already: a tenth of the time. What is
    no error of the user is raised."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["plmcc", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    captured = capsys.readouterr()
    code = int(end.value.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, captured.out, captured.err)
