"""The proof that an artifact is the model: a fresh process loads it and repeats the recorded
outputs.

`probes.safetensors` in the artifact holds inputs and what the model in memory returned for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from plmcc.artifact import lock as seal
from plmcc.artifact import text_probes
from plmcc.artifact.limits import check_config, check_size
from plmcc.artifact.load import complete, readable
from plmcc.catalog import registry as catalog
from plmcc.data.tasks import architecture_of, auto_class, own_class, task_of
from plmcc.diagnostics import PlmccError, error
from plmcc.ir.probes import probe_inputs
from plmcc.rewrite import Record, changed_code
from plmcc.utils.files import read_json
from plmcc.utils.numerics import relative_difference

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROBES = "probes.safetensors"
_NEW_TOKENS = 8


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits or last states (float32), and for a generating model the greedy tokens."""
    found = {"output": first_output(model, inputs)}
    if model.can_generate():
        was_training = model.training
        model.eval()
        found["tokens"] = _greedy(model, inputs)
        model.train(was_training)
    return found


@torch.no_grad()
def first_output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits or last states (float32) in evaluation mode."""
    was_training = model.training
    model.eval()
    result = model(**inputs)
    model.train(was_training)
    first = next(
        v
        for v in (result.get("logits"), result.get("last_hidden_state"), result[0])
        if v is not None
    )
    mask = inputs.get("attention_mask")
    if (
        mask is not None
        and first.dim() == 3
        and first.shape[:2] == mask.shape
        and not model.config.is_encoder_decoder
    ):
        # At padding, attention implementations differ on purpose, and nobody reads it.
        first = first * mask[..., None]
    states: Tensor = first.float().cpu()
    return states


def _greedy(model: PreTrainedModel, inputs: dict[str, Tensor], **cache: bool) -> Tensor:
    tokens = _generated(model, inputs, **cache)
    assert isinstance(tokens, Tensor)
    return tokens.cpu()


def _generated(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: bool) -> Any:
    prompt = {name: value[:1] for name, value in inputs.items() if name != "decoder_input_ids"}
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": _NEW_TOKENS}
    return model.generate(**prompt, **options, **settings)  # type: ignore[operator]


def check_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Compare greedy generation with and without cache: rewritten layers must index it rightly.

    Raises:
        PlmccError: the tokens differ.
    """
    if not same_with_cache(model, inputs):
        message = "generation with the cache and without it gives different tokens"
        raise error("PLM402", message, f"model: {type(model).__name__}")


@torch.no_grad()
def same_with_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Return whether greedy generation gives the same tokens with and without cache, up to ties.

    The two ways sum up in another order. Where they choose different tokens, the logits of that
    step say whether this is all.
    """
    if not model.can_generate():
        return True
    ways = (True, False)
    if torch.equal(*(_greedy(model, inputs, use_cache=cache) for cache in ways)):
        return True
    told = {"return_dict_in_generate": True, "output_logits": True}
    runs = [_generated(model, inputs, use_cache=cache, **told) for cache in ways]
    steps = min(len(run.logits) for run in runs)
    mine, theirs = (run.sequences[0, -len(run.logits) :][:steps] for run in runs)
    step = int((mine != theirs).int().argmax())  # they agree until here
    difference = relative_difference(*(run.logits[step] for run in runs))
    return difference <= _bound(model.dtype)


@torch.no_grad()
def caches_exactly(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Return whether a model computes the same logits with its cache as without it. Some
    architectures do not, and their tokens are the same by chance.

    True also for models that do not generate.
    """
    if not model.can_generate():
        return True
    told = {"return_dict_in_generate": True, "output_logits": True}
    runs = [_generated(model, inputs, use_cache=use, **told) for use in (True, False)]
    for step, (one, two) in enumerate(zip(*(run.logits for run in runs), strict=False)):
        if relative_difference(one, two) > 10 * _bound(model.dtype):
            return False
        written = [run.sequences[0, -len(run.logits) :][step] for run in runs]
        if written[0] != written[1]:  # a tie; what follows is another text
            break
    return True


def _bound(dtype: torch.dtype) -> float:
    """Differences of outputs, relative to their scale, that rounding makes."""
    return 1e-4 if dtype == torch.float32 else 2e-2


def record(model: PreTrainedModel, folder: Path) -> None:
    """Write the probes of a model into its artifact."""
    inputs = probe_inputs(model)
    stored = {f"input.{k}": v.cpu().contiguous() for k, v in inputs.items()}
    stored |= {f"output.{k}": v.contiguous() for k, v in outputs(model, inputs).items()}
    if model.can_generate():
        stored["output.uncached"] = _greedy(model, inputs, use_cache=False)
    save_file(stored, folder / PROBES)


def compare(folder: Path) -> float:
    """Load an artifact and repeat its probes; return the largest difference relative to the
    outputs' scale.

    Raises:
        PlmccError: the outputs or greedy tokens differ, or there are no probes.
    """
    return _compared(folder)[0]


def _compared(folder: Path, own: bool = False) -> tuple[float, int, bool, list[str]]:
    """As `compare`; also the number of tensors, whether there were tokens to compare, and what
    `text_probes.check` has compared. `own`: load by the class of the model itself."""
    if not (folder / PROBES).exists():
        raise error("PLM402", "the artifact has no recorded outputs to compare with", str(folder))
    stored = load_file(folder / PROBES)
    model = _loaded(folder, own)
    inputs = {k.removeprefix("input."): v for k, v in stored.items() if k.startswith("input.")}
    found = outputs(model, inputs)
    expected = stored["output.output"]
    difference = relative_difference(found["output"], expected)
    bound = _bound(model.dtype)
    if not difference <= bound:
        message = (
            f"the reloaded model differs by {difference:.3g} of its scale from the model in memory"
        )
        raise error("PLM402", message, str(folder), allowed=f"at most {bound:g}")
    for name, cache in (("tokens", True), ("uncached", False)):
        expected_tokens = stored.get(f"output.{name}")
        if expected_tokens is None:
            continue
        if not torch.equal(_greedy(model, inputs, use_cache=cache), expected_tokens):
            how = "with" if cache else "without"
            message = f"the reloaded model generates other tokens {how} cache than it did in memory"
            raise error("PLM402", message, str(folder))
    texts = [] if own else text_probes.check(folder, max(bound, 1e-3))
    return difference, len(model.state_dict()), "output.tokens" in stored, texts


def _loaded(folder: Path, own: bool = False) -> PreTrainedModel:
    """Load an artifact, or what training alone has written: a plain checkpoint.

    Args:
        folder: the directory.
        own: by the class that the config names, which reads its config itself.

    Raises:
        PlmccError: tensors are missing (and would be random), left over, or of another shape.
    """
    check_config(folder)
    config = AutoConfig.from_pretrained(folder)
    kind = auto_class(task_of(architecture_of(config), folder), config)
    check_size(folder, config, kind)
    given: dict[str, Any] = {"config": config}
    named = own_class(architecture_of(config))
    if own and named is not None:
        kind, given = named, {}
    return complete(kind, folder, **given)


@dataclass(frozen=True)
class Proof:
    """What `plmcc verify` has found to be as recorded."""

    files: int
    tensors: int
    difference: float
    """Largest difference of the probes' outputs, relative to their scale."""
    generates: bool
    """Whether greedy tokens were compared too, with and without cache."""
    texts: list[str]
    """What was compared on texts: token ids, sentence vectors."""
    unknown: list[str]
    """Files that nothing records; nothing loads them."""


def prove(folder: Path) -> Proof:
    """Compare an artifact with its lock and with its probes.

    Raises:
        PlmccError: a file is missing or was changed, the format is another, the model's structure
            and tensors do not fit each other, or its outputs or tokens are not the recorded ones.
    """
    if not folder.is_dir():
        raise error("PLM401", "the directory does not exist", str(folder))
    unknown = seal.check(folder)
    with readable(folder):
        _check_code(folder)
        difference, tensors, generates, texts = _compared(folder)
        difference = max(difference, _compared(folder, own=True)[0])
    return Proof(len(seal.read(folder)["files"]), tensors, difference, generates, texts, unknown)


def _check_code(folder: Path) -> None:
    """Check that passes of other distributions are those that made the artifact.

    Raises:
        PlmccError: the code of one is another.
    """
    config = read_json(folder / "config.json")
    modules = (config.get("quantization_config") or {}).get("modules", [])
    for record in map(Record.from_json, modules):
        if change := changed_code(record):
            message = f"the modules of `{record.name}` were {change}"
            made = record.origin
            named = made is not None and made.distribution
            hint = f"pip install {made.distribution}=={made.version}" if made and named else ""
            raise error("PLM402", message, str(folder), hint=hint)


def reloaded_difference(folder: Path, records: Sequence[Record]) -> float:
    """Load a new artifact and repeat its probes, in a fresh process where that knows all passes:
    one that was registered with `plmcc.register` is known in this process only.

    Raises:
        PlmccError: it cannot be loaded, or its outputs are others.
    """
    here = any(catalog.is_registered(record.name) for record in records)
    return compare(folder) if here else in_fresh_process(folder)


def in_fresh_process(folder: Path) -> float:
    """Run `compare` in a new Python process, as a user would load the artifact.

    Raises:
        PlmccError: it fails there, with its reason.
    """
    return fresh("plmcc.artifact.verify", folder, "cannot reload the artifact")


def fresh(module: str, folder: Path, failed: str) -> float:
    """Return the number that a module prints for a folder in a new Python process.

    Raises:
        PlmccError: it has `failed` there, with its reason.
    """
    # It is one process, also where this one has been launched with others.
    alone = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    done = new_process(module, [folder], env=alone)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise error("PLM402", f"a fresh process {failed}: {reason}", str(folder))
    return float(done.stdout.split()[-1])


def new_process(
    module: str, arguments: Sequence[object], *, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS...` with these variables."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def answer(compute: Callable[[Path], float]) -> None:
    """Be that process: print the number for the folder of the command line, or the reason."""
    try:
        print(compute(Path(sys.argv[1])))
    except PlmccError as problem:
        print(" ".join(problem.render().split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    answer(compare)
