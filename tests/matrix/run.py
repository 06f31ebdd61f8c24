"""Run the fast tests with the oldest and with the newest libraries that plmcc supports.

    python tests/matrix/run.py [--only oldest]

Each combination gets an environment of its own in `build/matrix`, some gigabytes: the newest torch
comes with its CUDA libraries. It is used again by the next run, and `make clean` removes it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = ("oldest", "newest")
_SHOWN = ("torch", "transformers", "sentence-transformers")


def environment(name: str, work: Path) -> Path:
    """Make or complete the environment of a combination; return its Python."""
    folder = work / name
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    # By the variable and not by an option, so that constraints of the machine do not count too.
    variables = os.environ | {"PIP_CONSTRAINT": str(HERE / f"{name}.txt")}
    command = [str(python), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[demo,dev]"]
    subprocess.run(command, check=True, env=variables)
    return python


def tested(python: Path, arguments: list[str]) -> bool:
    """Run the tests of `make check`; say whether they passed."""
    code = (
        "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    )
    subprocess.run([python, "-c", code, *_SHOWN], check=True)
    command = [str(python), "-m", "pytest", "-m", "not slow and not exhaustive"]
    command += ["-p", "no:cacheprovider"]
    command += arguments or ["-n", "2", "--dist", "loadfile"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--work", type=Path, default=ROOT / "build/matrix")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="its arguments")
    options = parser.parse_args()
    results = {}
    for name in [options.only] if options.only else NAMES:
        print(f"{name}:", flush=True)
        results[name] = tested(environment(name, options.work), options.pytest)
    for name, passed in results.items():
        print(f"{name}: {'passed' if passed else 'failed'}")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
