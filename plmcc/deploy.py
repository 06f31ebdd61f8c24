"""Where a result can run: one line with the reason for each deploy target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from plmcc.generate import compilable, translates

Verdict = Literal["yes", "no", "untried"]
# Configs of transformers that CTranslate2's converter (4.x) has a reader for.
_CTRANSLATE2 = {
    "BartConfig", "BertConfig", "BloomConfig", "CodeGenConfig", "DistilBertConfig", "FalconConfig",
    "Gemma2Config", "GemmaConfig", "GPT2Config", "GPTBigCodeConfig", "GPTJConfig", "GPTNeoXConfig",
    "LlamaConfig", "M2M100Config", "MarianConfig", "MBartConfig", "MistralConfig", "MptConfig",
    "MT5Config", "OPTConfig", "PegasusConfig", "Phi3Config", "PhiConfig", "Qwen2Config",
    "T5Config", "WhisperConfig", "XLMRobertaConfig",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A runtime, whether it takes the result, and why. "untried" is what nobody has measured."""

    name: str
    takes: Verdict
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def targets(model: PreTrainedModel, rewritten: Sequence[tuple[str, str, str]]) -> list[Target]:
    """Return what each deploy target does with a result.

    Args:
        model: the result, also one on the meta device.
        rewritten: pass, module path and class of every place that is no longer transformers' own.
    """
    return [
        _transformers(rewritten),
        _compile(model),
        _aoti(model),
        _exporter("onnx", "ONNX"),
        _exporter("executorch", "ExecuTorch"),
        _ctranslate2(model, rewritten),
    ]


def _transformers(rewritten: Sequence[tuple[str, str, str]]) -> Target:
    if rewritten:
        return Target("transformers", "yes", "`from_pretrained` loads it after `import plmcc`")
    return Target("transformers", "yes", "an ordinary checkpoint, loaded without plmcc")


def _compile(model: PreTrainedModel) -> Target:
    if _runs_programs(model):
        return Target("compile", "yes", "plmcc.compile: the forward pass, and beam search")
    return Target("compile", "yes", "plmcc.compile: the forward pass")


def _aoti(model: PreTrainedModel) -> Target:
    if not translates(model):
        reason = f"only translation models are exported, and {type(model).__name__} is none"
        return Target("aoti", "no", reason)
    if not _runs_programs(model):
        return Target("aoti", "no", "its attention or cache is its own: no program can run it")
    return Target("aoti", "yes", "`plmcc export`, if its generation config is plain beam search")


def _runs_programs(model: PreTrainedModel) -> bool:
    try:
        return compilable(model)
    except RuntimeError:  # its code looks at values, which the meta device does not have
        return False


def _exporter(name: str, title: str) -> Target:
    reason = f"plmcc writes no {title}; `transformers.exporters` may, from the loaded model"
    return Target(name, "untried", reason)


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
