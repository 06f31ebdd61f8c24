"""The proof that an artifact is the model: a fresh process loads it and repeats the recorded
outputs.

`probes.safetensors` in the artifact holds inputs and what the model in memory returned for them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from plmcc.diagnostics import error
from plmcc.lower import load
from plmcc.probes import probe_inputs
from plmcc.tasks import auto_class, task_of

PROBES = "probes.safetensors"
_NEW_TOKENS = 8


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits or last states (float32), and for a generating model the greedy tokens."""
    was_training = model.training
    model.eval()
    result = model(**inputs)
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
    found = {"output": first.float().cpu()}
    if model.can_generate():
        prompt = {name: value[:1] for name, value in inputs.items() if name != "decoder_input_ids"}
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": _NEW_TOKENS}
        tokens = model.generate(**prompt, **options)  # type: ignore[operator]
        assert isinstance(tokens, Tensor)
        found["tokens"] = tokens.cpu()
    model.train(was_training)
    return found


def check_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Compare greedy generation with and without cache: rewritten layers must index it rightly.

    Raises:
        PlmccError: the tokens differ.
    """
    if not same_with_cache(model, inputs):
        message = "generation with cache gives other tokens than without"
        raise error("PLM402", message, f"model: {type(model).__name__}")


@torch.no_grad()
def same_with_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Return whether greedy generation gives the same tokens with and without cache."""
    if not model.can_generate():
        return True
    prompt = {name: value[:1] for name, value in inputs.items() if name != "decoder_input_ids"}
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": _NEW_TOKENS}
    runs = [model.generate(**prompt, **options, use_cache=cache) for cache in (True, False)]  # type: ignore[operator]
    return torch.equal(*runs)


def record(model: PreTrainedModel, folder: Path) -> None:
    """Write the probes of a model into its artifact."""
    inputs = probe_inputs(model)
    stored = {f"input.{k}": v.cpu().contiguous() for k, v in inputs.items()}
    stored |= {f"output.{k}": v.contiguous() for k, v in outputs(model, inputs).items()}
    save_file(stored, folder / PROBES)


def compare(folder: Path) -> float:
    """Load an artifact and repeat its probes; return the largest difference relative to the
    outputs' scale.

    Raises:
        PlmccError: the outputs or greedy tokens differ, or there are no probes.
    """
    if not (folder / PROBES).exists():
        raise error("PLM402", "the artifact has no probes to compare with", str(folder))
    stored = load_file(folder / PROBES)
    model = _loaded(folder)
    inputs = {k.removeprefix("input."): v for k, v in stored.items() if k.startswith("input.")}
    found = outputs(model, inputs)
    expected = stored["output.output"]
    scale = float(expected.abs().max().clamp(min=1e-6))
    difference = float((found["output"] - expected).abs().max()) / scale
    bound = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not difference <= bound:
        message = (
            f"the reloaded model differs by {difference:.3g} of its scale from the model in memory"
        )
        raise error("PLM402", message, str(folder), allowed=f"at most {bound:g}")
    if "output.tokens" in stored and not torch.equal(found["tokens"], stored["output.tokens"]):
        raise error(
            "PLM402",
            "the reloaded model generates other tokens than the model in memory",
            str(folder),
        )
    return difference


def _loaded(folder: Path) -> PreTrainedModel:
    """Load an artifact, or what training alone has written: a plain checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        return load(folder)
    kind = auto_class(task_of((config.architectures or [""])[0], folder), config)
    model: PreTrainedModel = kind.from_pretrained(folder, config=config)
    return model


def in_fresh_process(folder: Path) -> float:
    """Run `compare` in a new Python process, as a user would load the artifact.

    Raises:
        PlmccError: it fails there, with its reason.
    """
    done = subprocess.run(
        [sys.executable, "-m", "plmcc.verify", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise error("PLM402", f"a fresh process cannot reload the artifact: {reason}", str(folder))
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    from plmcc.diagnostics import PlmccError

    try:
        print(compare(Path(sys.argv[1])))
    except PlmccError as problem:
        print(" ".join(problem.render().split()), file=sys.stderr)
        sys.exit(1)
