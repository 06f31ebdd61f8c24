"""Kill a run at random moments and resume it: run as a script, as the children are forks of it.

    python -P kill_and_resume.py RECIPE MODEL FOLDER KILLS

A fork needs no second of imports for each try, and this process computes nothing that a fork would
be confused by. Prints one line of JSON: what an undisturbed run wrote, and what each resumed one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import transformers  # noqa: F401
from transformers import Trainer  # noqa: F401

from plmcc.pipeline import compiler
from plmcc.pipeline.cache import folder_of
from plmcc.recipe.load import load_recipe

torch.set_num_threads(1)


def started(recipe: Path, model: Path, folder: Path, resume: bool) -> int:
    """Apply in a child. A fresh process and pictures are what other tests are for, and slow."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with (
            patch("plmcc.artifact.verify.in_fresh_process", return_value=0.0),
            patch("plmcc.report.documents.page", return_value=""),
        ):
            loaded = load_recipe(recipe, load_torch=True)
            compiler.apply(loaded, model, folder, resume=resume, base=recipe.parent)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def found(folder: Path) -> str:
    """What a killed run has left."""
    if folder.exists():
        return "finished"
    kept = folder_of(folder)
    done = len(list(kept.glob("*/stage.json")))
    steps = [int(p.parent.name.rpartition("-")[2]) for p in kept.glob("*.training/*/complete")]
    return f"{done} stages, step {max(steps, default=0)}"


def main() -> None:
    recipe, model, folder = map(Path, sys.argv[1:4])
    gc.freeze()
    start = time.monotonic()
    _, status = os.waitpid(started(recipe, model, folder / "calm", False), 0)
    assert status == 0, "the undisturbed run failed"
    seconds, draw = time.monotonic() - start, random.Random(0)
    tries = []
    for number in range(int(sys.argv[4])):
        out = folder / f"killed{number}"
        child = started(recipe, model, out, False)
        time.sleep(seconds * draw.uniform(0.1, 1.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = found(out)
        if left != "finished":
            _, status = os.waitpid(started(recipe, model, out, True), 0)
            assert status == 0, f"the resumed run failed: {left}"
        tries.append({"left": left, "digest": digest(out)})
        assert not list(folder.glob(".*.unfinished-*"))
    print(json.dumps({"seconds": seconds, "calm": digest(folder / "calm"), "tries": tries}))


if __name__ == "__main__":
    main()
