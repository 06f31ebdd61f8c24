"""Where a result can run: one line with the reason for each deploy target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from transformers import PreTrainedModel

from plmcc.diagnostics import PlmccError
from plmcc.export.exporter import check_export
from plmcc.export.targets import TARGETS
from plmcc.inference.generate import compilable
from plmcc.utils.types import Values

Verdict = Literal["yes", "no", "untried"]
# Configs of transformers that CTranslate2's converter (4.x) has a reader for.
_CTRANSLATE2 = {
    "BartConfig",
    "BertConfig",
    "BloomConfig",
    "CodeGenConfig",
    "DistilBertConfig",
    "FalconConfig",
    "Gemma2Config",
    "GemmaConfig",
    "GPT2Config",
    "GPTBigCodeConfig",
    "GPTJConfig",
    "GPTNeoXConfig",
    "LlamaConfig",
    "M2M100Config",
    "MarianConfig",
    "MBartConfig",
    "MistralConfig",
    "MptConfig",
    "MT5Config",
    "OPTConfig",
    "PegasusConfig",
    "Phi3Config",
    "PhiConfig",
    "Qwen2Config",
    "T5Config",
    "WhisperConfig",
    "XLMRobertaConfig",
}


@dataclass(frozen=True)
class Target:
    """A runtime, whether it takes the result, and why. "untried" is what nobody has measured."""

    name: str
    takes: Verdict
    reason: str

    def to_json(self) -> Values:
        """Return plain values."""
        return asdict(self)


def targets(
    model: PreTrainedModel, rewritten: Sequence[tuple[str, str, str]], needs_plmcc: str = ""
) -> list[Target]:
    """Return what each deploy target does with a result.

    Args:
        model: the result, also one on the meta device.
        rewritten: pass, module path and class of every place that is no longer transformers' own.
        needs_plmcc: why transformers alone does not load it.
    """
    return [
        _transformers(needs_plmcc),
        _compile(model),
        *(_exported(model, to) for to in TARGETS),
        _ctranslate2(model, rewritten),
    ]


def _transformers(needs_plmcc: str) -> Target:
    if needs_plmcc:
        reason = f"`from_pretrained` loads it after `import plmcc`: {needs_plmcc}"
        return Target("transformers", "yes", reason)
    return Target("transformers", "yes", "an ordinary checkpoint, loaded without plmcc")


def _compile(model: PreTrainedModel) -> Target:
    if compilable(model):
        return Target("compile", "yes", "plmcc.compile: the forward pass, and beam search")
    return Target("compile", "yes", "plmcc.compile: the forward pass")


def _exported(model: PreTrainedModel, to: str) -> Target:
    try:
        check_export(model, to)
    except PlmccError as problem:
        found = problem.diagnostics[0]
        return Target(to, "no", f"{found.message} ({found.hint})")
    return Target(to, "yes", f"`plmcc export --to {to}`, or `lower: {{to: [{to}]}}`")


def _ctranslate2(model: PreTrainedModel, rewritten: Sequence[tuple[str, str, str]]) -> Target:
    name = "ctranslate2"
    if rewritten:
        passes, path, kind = rewritten[0]
        more = f" (and {len(rewritten) - 1} more places)" if len(rewritten) > 1 else ""
        reason = f"it cannot load `{kind}`, which {passes} puts at {path}{more}"
        return Target(name, "no", reason)
    config = type(model.config).__name__
    if config not in _CTRANSLATE2:
        return Target(name, "untried", f"its converter has no known reader for {config}")
    return Target(name, "untried", f"an ordinary checkpoint; its converter reads {config}")
