"""Fresh Python processes that need not import torch and transformers again.

A server has imported them and nothing else, and forks for each call (`multiprocessing`'s fork
server): the child shares no state with the tests, as a new interpreter would not. Importing takes
some seconds, and the tests start hundreds of processes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "datasets", "plmcc.artifact.verify", "plmcc.pipeline.compiler"]
)


def run_module(
    module: str,
    arguments: Sequence[object] = (),
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    text: str = "",
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS...`.

    Args:
        module: its dotted name.
        arguments: of the command line.
        cwd: where it runs.
        env: all its variables; by default those of this process.
        text: its standard input.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").write_text(text, encoding="utf-8")
        given = list(map(str, arguments))
        settings = (module, given, str(cwd or Path.cwd()), dict(env or os.environ), folder)
        child = _CONTEXT.Process(target=_be, args=settings)
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired([module, *given], timeout)
        out, err = ((Path(folder) / name).read_text("utf-8", "replace") for name in ("out", "err"))
    return subprocess.CompletedProcess([module, *given], child.exitcode, out, err)


def _be(module: str, arguments: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    """Be that process."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    files = [
        (0, "in", os.O_RDONLY),
        (1, "out", os.O_WRONLY | os.O_CREAT),
        (2, "err", os.O_WRONLY | os.O_CREAT),
    ]
    for number, name, flags in files:
        opened = os.open(Path(folder) / name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, mode, closefd=False), encoding="utf-8", line_buffering=True)  # noqa: SIM115
        for number, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
    )
    sys.argv = [module, *arguments]
    sys.path.insert(0, cwd)
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
