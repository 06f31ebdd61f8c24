"""Runs that are killed, and runs that want one output: what is left, and what comes of it.

    python benchmarks/robustness.py             # 300 kills, 200 pairs; half an hour

Kills: SIGKILL at a random moment of `apply`, then the same call with `resume`. Two recipes: two
passes and a training in two stages; and one with `--overwrite`, where an artifact has the name
already. After each kill the directory is absent, or whole, the old or the new one; after resuming,
every file has the bytes of an undisturbed run, but for recorded times.

Pairs: two processes apply different recipes to one output, with a random delay. One wins, the other
refuses in a sentence, and the directory is whole and the winner's; with `--overwrite` also both may
succeed, where the second began after the end of the first.

The children are forks: they need no seconds of imports. The reload in a fresh process is left out.
Results go to `benchmarks/results/robustness.json`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import Trainer  # noqa: F401  (before the forks)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from plmcc.artifact import lock as seal  # noqa: E402
from plmcc.diagnostics import PlmccError  # noqa: E402
from plmcc.pipeline import compiler  # noqa: E402
from plmcc.pipeline.cache import folder_of  # noqa: E402
from plmcc.recipe.load import load_recipe  # noqa: E402
from support.tiny_models import tiny  # noqa: E402
from support.tokenizers import words  # noqa: E402

RESULT = ROOT / "benchmarks/results/robustness.json"
TRAIN = """
    train:
      data: {train: text.txt}
      distill: {teacher: original, logits: 1.0}
      arguments: {max_steps: 12, save_strategy: steps, save_steps: 3, learning_rate: 1.0e-3,
                  per_device_train_batch_size: 16, disable_tqdm: true, logging_strategy: "no"}"""
STAGES = f"""\
plmcc: 1
name: stages
task: fill-mask
seed: SEED
stages:
  - name: codes
    passes: [{{compositional_codes: {{codebooks: 4, codewords: 8, rounds: 1}}}}]{TRAIN}
  - name: prune
    passes: [{{movement_pruning: {{granularity: neuron, density: 0.5, warmup: 0.3}}}}]{TRAIN}
"""
SINGLE = f"""\
plmcc: 1
name: single
task: fill-mask
seed: SEED
stages:
  - name: rank
    passes: [{{low_rank: {{rank: 4, weighting: none}}}}]{TRAIN}
"""
TIMES = re.compile(r"seconds|latency")
DESCRIBED = ("report.json", "report.html", "plmcc.lock.json", "README.md")
"""Files in which recorded times, or digests of such files, are."""


def child(
    recipe: Path, model: Path, out: Path, *, overwrite: bool = False, resume: bool = False
) -> int:
    """Apply in a fork: it ends with 0, or 3 after a refusal in a sentence, or 1."""
    made = os.fork()
    if made:
        return made
    code = 1
    try:
        os.dup2(
            os.open(out.with_name(f"{out.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
        )
        os.dup2(1, 2)
        with patch("plmcc.artifact.verify.in_fresh_process", return_value=0.0):
            loaded = load_recipe(recipe, load_torch=True)
            compiler.apply(
                loaded, model, out, base=recipe.parent, overwrite=overwrite, resume=resume
            )
        code = 0
    except PlmccError as problem:
        print(problem.render(), flush=True)
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def alone(recipe: Path, model: Path, out: Path) -> float:
    """Apply undisturbed; return the seconds that it took."""
    start = time.monotonic()
    if ended(child(recipe, model, out)) != 0:
        raise RuntimeError(out.with_name(f"{out.name}.log").read_text())
    return time.monotonic() - start


def ended(process: int) -> int:
    """Wait for a child; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of each file, without recorded times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        data = file.read_bytes()
        if name in ("report.json", "plmcc.lock.json"):
            values = json.loads(data)
            if name == "plmcc.lock.json":
                del values["sha256"]
                values["files"] = {k: v for k, v in values["files"].items() if k not in DESCRIBED}
            data = json.dumps(_untimed(values), sort_keys=True).encode()
        elif name in DESCRIBED:
            data = b""  # prose and pictures of report.json
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _untimed(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _untimed(v) for k, v in values.items() if not TIMES.fullmatch(k)}
    return [_untimed(v) for v in values] if isinstance(values, list) else values


def is_whole(folder: Path) -> bool:
    """Say whether an artifact is as its lock says."""
    try:
        seal.check(folder)
    except PlmccError:
        return False
    return True


def left_over(folder: Path, out: Path) -> list[str]:
    """Return what a finished run has left beside its output."""
    ours = (out.name, f"{out.name}.log", folder_of(out).name)
    return [f.name for f in folder.iterdir() if out.name in f.name and f.name not in ours]


def kills(count: int, recipes: dict[str, Path], model: Path, folder: Path) -> list[dict[str, Any]]:
    """Kill and resume, with and without an artifact that is replaced."""
    draw, rows = random.Random(0), []
    for name, overwrite in (("stages", False), ("single", True)):
        seconds = alone(recipes[name], model, folder / f"calm-{name}")
        calm = contents(folder / f"calm-{name}")
        before = folder / "before"
        if overwrite and not before.exists():
            alone(recipes["other"], model, before)
        row = Counter(kills=0, differing=0, broken=0, left_over=0, failed=0)
        moments: Counter[str] = Counter()
        for number in range(count // 2):
            out = folder / f"{name}{number}"
            if overwrite:
                shutil.copytree(before, out)
            process = child(recipes[name], model, out, overwrite=overwrite)
            time.sleep(seconds * draw.uniform(0.02, 1.05))
            os.kill(process, signal.SIGKILL)
            ended(process)
            row["kills"] += 1
            moments[moment(out, before if overwrite else None)] += 1
            if out.exists() and not is_whole(out):
                row["broken"] += 1
            if overwrite or not out.exists():
                code = ended(child(recipes[name], model, out, overwrite=overwrite, resume=True))
                row["failed"] += code != 0
            made = contents(out)
            other = sorted(name for name in calm | made if calm.get(name) != made.get(name))
            row["differing"] += bool(other)
            if other:
                print(out.name, *other, flush=True)
            row["left_over"] += bool(left_over(folder, out))
            for path in (out, folder_of(out)):
                shutil.rmtree(path, ignore_errors=True)
        rows.append({"recipe": name, "overwrite": overwrite, **row, "killed_when": dict(moments)})
        print(rows[-1], flush=True)
    return rows


def moment(out: Path, before: Path | None) -> str:
    """Say how far a killed run had come."""
    if out.exists() and (before is None or contents(out) != contents(before)):
        return "finished"
    kept = folder_of(out)
    done = len(list(kept.glob("*/stage.json")))
    steps = bool(list(kept.glob("*.training/*/complete")))
    drafts = any(out.parent.glob(f".{out.name}.unfinished-*"))
    return f"{done} stages done" + (", in training" if steps else "") + (", writing" * drafts)


def pairs(count: int, recipes: dict[str, Path], model: Path, folder: Path) -> list[dict[str, Any]]:
    """Let two processes apply to one output."""
    draw, rows = random.Random(1), []
    calm, seconds = {}, 0.0
    for name in ("single", "other"):
        seconds = alone(recipes[name], model, folder / f"alone-{name}")
        calm[name] = contents(folder / f"alone-{name}")
    for overwrite in (False, True):
        row: Counter[str] = Counter(pairs=0, one_wins=0, in_turn=0, wrong=0, left_over=0)
        for number in range(count // 2):
            out = folder / f"pair{overwrite}{number}"
            first = child(recipes["single"], model, out, overwrite=overwrite)
            time.sleep(seconds * draw.uniform(0, 1.2 if overwrite else 0.9))
            second = child(recipes["other"], model, out, overwrite=overwrite)
            codes = (ended(first), ended(second))
            row["pairs"] += 1
            winners = {(0, 3): ["single"], (3, 0): ["other"], (0, 0): ["single", "other"]}
            right = is_whole(out) and contents(out) in [calm[w] for w in winners.get(codes, [])]
            right &= codes != (0, 0) or overwrite
            row["one_wins"] += 3 in codes
            row["in_turn"] += codes == (0, 0)
            row["left_over"] += bool(left_over(folder, out))
            if not right:
                row["wrong"] += 1
                print(codes, out, flush=True)
            else:
                shutil.rmtree(out, ignore_errors=True)
        rows.append({"overwrite": overwrite, **row})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run both, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="plmcc-robustness-") as place:
        folder = Path(place)
        tiny("bert").save_pretrained(folder / "model")
        words().save_pretrained(folder / "model")
        draw = random.Random(1)
        lines = (
            " ".join(f"w{draw.randrange(94)}" for _ in range(draw.randint(3, 12)))
            for _ in range(120)
        )
        (folder / "text.txt").write_text("\n".join(lines) + "\n")
        recipes = {}
        for name, text in (("stages", STAGES), ("single", SINGLE), ("other", SINGLE)):
            recipes[name] = folder / f"{name}.yaml"
            recipes[name].write_text(text.replace("SEED", "7" if name == "other" else "0"))
        gc.freeze()
        killed = kills(asked.kills, recipes, folder / "model", folder)
        both = pairs(asked.pairs, recipes, folder / "model", folder)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    values = {
        "command": "python benchmarks/robustness.py",
        "commit": commit.stdout.strip(),
        "seed": 0,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "kills": killed,
        "pairs": both,
    }
    asked.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
