"""The model that a recipe is applied to: loaded from a folder or the hub, with tokenizer and
pooling."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plmcc.diagnostics import did_you_mean, error
from plmcc.tasks import Pooling, auto_class, task_of

_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.index.json",
)

_KEPT = (".json", ".txt", ".model", ".jinja")


@dataclass
class Source:
    """A loaded model and what belongs to it. `folder` is None for the hub and for models made in
    Python."""

    model: PreTrainedModel
    task: str
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    pooling: Pooling = field(default_factory=Pooling)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Source:
        """Return the source of a model made in Python: without tokenizer, task by its class."""
        return cls(model, task_of(type(model).__name__), type(model).__name__)

    def need_tokenizer(self, why: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            PlmccError: the model came without one.
        """
        if self.tokenizer is None:
            message = f"{why} needs a tokenizer, and the model comes without one"
            raise error(
                "PLM303", message, self.name, cure="put the tokenizer's files beside the model"
            )
        return self.tokenizer

    def max_length(self, asked: int) -> int:
        """Return the largest number of tokens that was asked for and that the model can read."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        known = self.tokenizer.model_max_length if self.tokenizer else asked
        return int(min(asked, known, positions or asked))

    def original(self) -> PreTrainedModel:
        """Return a copy of the model as it is now, frozen: the teacher and the measure of
        fidelity."""
        copied: PreTrainedModel = copy.deepcopy(self.model).eval().requires_grad_(False)
        return copied

    def other_files(self) -> list[Path]:
        """Return the files beside weights and config that belong to the model
        (sentence-transformers, tokenizer)."""
        if self.folder is None:
            return []
        weights = {file for pattern in _WEIGHTS for file in self.folder.rglob(pattern)}
        kept = (p for p in self.folder.rglob("*") if p.is_file() and p.suffix in _KEPT)
        skipped = ("config.json", "plmcc.lock.json", "report.json")
        return sorted(
            p for p in kept
            if p not in weights and not (p.parent == self.folder and p.name in skipped)
            and not any(part.startswith(".") for part in p.relative_to(self.folder).parts)
        )  # fmt: skip


def load_source(name: str | Path, task: str = "auto", classes: int | None = None) -> Source:
    """Load a model to compress.

    Args:
        name: a local directory or a hub id.
        task: a task of the recipe, or "auto" to take it from the checkpoint.
        classes: the number of labels, if the checkpoint has no classification head of its own.

    Raises:
        PlmccError: the model cannot be found or read.
    """
    folder: Path | None = Path(name) if Path(name).is_dir() else None
    if folder is None and (Path(name).is_file() or str(name).startswith((".", "/", "~"))):
        siblings = [path.name for path in Path(name).parent.glob("*")]
        raise error(
            "PLM401",
            "there is no such model directory",
            str(name),
            cure=did_you_mean(Path(name).name, siblings),
        )
    config = _config(name)
    folder = folder or _snapshot(str(name))
    chosen = task_of(_architecture(config), folder) if task == "auto" else task
    options = {}
    if (
        chosen == "text-classification"
        and task_of(_architecture(config)) != chosen
        and classes is not None
    ):
        options["num_labels"] = classes
    try:
        model = auto_class(chosen, config).from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        raise error("PLM401", f"the model cannot be loaded: {_line(problem)}", str(name)) from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Source(model, chosen, str(name), _tokenizer(name), folder, Pooling.of(folder))


def _config(name: str | Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, HFValidationError, KeyError) as problem:
        here = [path.name for path in Path().iterdir() if path.is_dir()]
        cure = did_you_mean(
            name, here, "name a directory with config.json and weights, or a hub id"
        )
        raise error("PLM401", f"this is no model: {_line(problem)}", str(name), cure=cure) from None
    return config


def _snapshot(name: str) -> Path | None:
    """The small files of a hub model (tokenizer, sentence-transformers) in the local cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in _KEPT]))
    except (OSError, HFValidationError, LocalEntryNotFoundError):
        return None


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_digests(folder: Path | None) -> dict[str, str]:
    """Return the SHA-256 of each weight file and config of a model directory."""
    if folder is None:
        return {}
    files = sorted(
        f
        for f in folder.iterdir()
        if f.suffix in (".safetensors", ".bin") or f.name == "config.json"
    )
    return {file.name: file_digest(file) for file in files}


def write_json(file: Path, values: object) -> None:
    """Write plain values as readable JSON."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
