"""The model that a recipe is applied to: loaded from a folder or the hub, with tokenizer and
pooling."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plmcc.artifact import format as artifact
from plmcc.artifact.limits import check_config, check_size
from plmcc.artifact.lock import digest
from plmcc.data.classification import head_task
from plmcc.data.pooling import MODULES, Pooling
from plmcc.data.tasks import EMBEDDING, LABELED, architecture_of, auto_class, task_of
from plmcc.diagnostics import PlmccError, error, listing
from plmcc.ir.probes import positions_of
from plmcc.models.other_files import (
    WEIGHTS,
    OtherFiles,
    check_no_adapter,
    notes_of,
    other_files,
)
from plmcc.models.static import as_encoder, is_static
from plmcc.utils.files import check_not_local, read_json
from plmcc.utils.text import first_line
from plmcc.utils.types import Values
from plmcc.vectors.files import kind_of


@dataclass(frozen=True)
class Source:
    """A loaded model and what belongs to it. `folder` is None for the hub and for models made in
    Python."""

    model: PreTrainedModel
    task: str
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    pooling: Pooling = field(default_factory=Pooling)
    notes: tuple[str, ...] = ()
    """What the user should know of the loaded weights: new heads, unused tensors."""
    new_head: bool = False
    """Whether the head for the task is new and random: then it has no metrics."""
    scratch: bool = False
    """Whether the weights are random: then nothing is compared with them."""
    retokenized: bool = False
    """Whether `tokenizer` is another than the one in `folder`."""
    stored: torch.dtype | None = None
    """Where weights are saved in another dtype than they are trained in: that dtype."""
    in_float32: frozenset[str] = frozenset()
    """Then, the modules whose tensors stay in float32 all the same."""
    first: tuple[str, int] | None = None
    """Of an artifact: the model that it was first made from, and the bytes of that."""
    keep_code: bool = False
    """Whether Python files of `folder` come along; they are never run."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Source:
        """Return the source of a model made in Python: without tokenizer, task by its class."""
        return cls(model, task_of(type(model).__name__), type(model).__name__)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, one of which precedes every text."""
        return self.pooling.prompts

    def need_tokenizer(self, why: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            PlmccError: the model came without one.
        """
        if self.tokenizer is None:
            message = f"{why} needs a tokenizer, but the model has none"
            raise error(
                "PLM303",
                message,
                self.name,
                hint="put the tokenizer files into the model directory",
            )
        return self.tokenizer

    def max_length(self, asked: int) -> int:
        """Return the largest number of tokens that was asked for and that the model can read."""
        positions = positions_of(self.model)
        known = self.tokenizer.model_max_length if self.tokenizer else asked
        return int(min(asked, known, positions or asked, self.pooling.max_length or asked))

    def original(self) -> PreTrainedModel:
        """Return a copy of the model as it is now, frozen: the teacher and the measure of
        fidelity."""
        copied: PreTrainedModel = copy.deepcopy(self.model).eval().requires_grad_(False)
        return copied

    def other_files(self) -> OtherFiles:
        """Return the files beside weights and config that belong to the model."""
        if self.folder is None:
            return OtherFiles((), ())
        return other_files(
            self.folder, self.tokenizer if self.retokenized else None, code=self.keep_code
        )


def load_source(
    name: str | Path,
    task: str = "auto",
    head: Values | None = None,
    broken: Literal["refuse", "skip"] = "refuse",
    *,
    meta: bool = False,
) -> Source:
    """Load a model to compress.

    Args:
        name: a local directory or a hub id.
        task: a task of the recipe, or "auto" to take it from the checkpoint.
        head: values of the config (number or names of labels), if the checkpoint has no head of its
            own for the task.
        broken: what to do with broken lines of a file of word vectors.
        meta: read no weights, only the config and the tokenizer: the model is on the meta device.
            (Word vectors have no config: they are read, and then dropped.)

    Raises:
        PlmccError: the model cannot be found or read.
    """
    folder: Path | None = Path(name) if Path(name).is_dir() else None
    if folder is not None:
        check_no_adapter(folder)
    if is_vectors(Path(name)):
        source = _vectors(Path(name), broken)
        return replace(source, model=source.model.to("meta")) if meta else source  # type: ignore[arg-type]
    if folder is None:
        check_not_local(str(name))
    static = folder if folder is not None and is_static(folder) else _static_snapshot(folder, name)
    if static is not None:
        source = load_source(as_encoder(static.resolve()), task, head, broken, meta=meta)
        note = "a static model: a table of token vectors, and their mean"
        return replace(source, name=str(name), notes=(note, *source.notes))
    config = _config(name)
    folder = folder or _snapshot(str(name))
    found = task_of(_architecture(config), folder)
    chosen = found if task == "auto" else head_task(task)
    options = head if head and found != chosen else {}
    kind = auto_class(chosen, config)
    notes: tuple[str, ...] = ()
    if meta:
        model = outline(config, kind, options, str(name))
    else:
        if folder is not None:
            check_size(folder, config, kind)
        model, notes = _model(name, kind, options)
        placed: torch.nn.Module = model
        placed.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = _tokenizer(name, folder)
    _check_tokens(model, tokenizer, str(name))
    if "id2label" in options:
        notes += (f"its head is new, with the labels {listing(list(options['label2id']))}",)
    tokenizer, padded = _agreeing(model, tokenizer, chosen)
    notes += (padded,) if padded else ()
    first = _first_original(folder)
    if first is not None:
        notes += (
            f"it is compressed already: the first original, {first[0]}, has {first[1]:,} bytes",
        )
    pooling = _pooling(folder, tokenizer) if chosen in EMBEDDING else Pooling()
    notes += (f"embeddings: {pooling.told}",) if pooling.told else ()
    source = Source(
        model,
        chosen,
        str(name),
        tokenizer,
        folder,
        pooling,
        notes,
        found != chosen and chosen in LABELED,
        retokenized=bool(padded),
        first=first,
    )
    return replace(source, notes=(*source.notes, *notes_of(source.other_files())))


def _first_original(folder: Path | None) -> tuple[str, int] | None:
    """What the report of an artifact says it was first made from."""
    if folder is None or not (folder / "plmcc.lock.json").is_file():
        return None
    try:
        values = read_json(folder / "report.json")
        return str(values["original"]["name"]), int(values["original"]["bytes"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # of another version, or without its report


def _agreeing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, task: str
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Give a classifier and its tokenizer the same padding token: it looks for the last token that
    is no padding. Return the tokenizer, and what was changed."""
    if tokenizer is None or task != "text-classification":
        return tokenizer, ""
    config = model.config.get_text_config()
    known = config.pad_token_id
    if known is not None and tokenizer.pad_token_id is not None:
        return tokenizer, ""
    made = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None:
        named = made.convert_ids_to_tokens(known) if known is not None else None
        made.pad_token = named or made.eos_token or made.unk_token
    for part in (model.config, config):
        part.pad_token_id = made.pad_token_id
    whose = "the model" if known is None else "the tokenizer"
    return made, f"{whose} has no padding token: both get `{made.pad_token}`"


def _pooling(folder: Path | None, tokenizer: PreTrainedTokenizerBase | None) -> Pooling:
    """How a model makes vectors of sentences; later modules are told how long the prompt is."""
    pooling = Pooling.of(folder)
    if not (pooling.prompt and tokenizer is not None):
        return pooling
    ids = tokenizer(pooling.prompt)["input_ids"]
    ended = bool(ids) and ids[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id)
    return replace(pooling, prompt_tokens=len(ids) - ended)


def _check_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> None:
    """Refuse a tokenizer whose ids lie beyond the table; a table may have rows to spare.

    Raises:
        PlmccError: they do.
    """
    if tokenizer is None:
        return
    for path, module in model.named_modules():
        if module is model.get_input_embeddings() and isinstance(module, torch.nn.Embedding):
            word, last = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
            if last >= module.num_embeddings:
                count = module.num_embeddings
                message = f"the table {path} has {count:,} rows, too few for the tokenizer"
                given = f"the token `{word}` has the number {last}"
                hint = "save the model after model.resize_token_embeddings(len(tokenizer))"
                raise error("PLM401", message, name, got=given, hint=hint)
            return


def is_vectors(file: Path) -> bool:
    """Say whether a file is one of word vectors, by its name."""
    return file.is_file() and kind_of(file) in (".txt", ".vec", ".bin", ".npy")


def _vectors(file: Path, broken: Literal["refuse", "skip"]) -> Source:
    from plmcc.vectors.load import load
    from plmcc.vectors.model import model_of

    vectors = load(file, broken=broken)
    model, tokenizer = model_of(vectors)
    return Source(model, "feature-extraction", str(file), tokenizer, notes=vectors.notes)


def _model(name: str | Path, kind: Any, options: Values) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the weights and say what does not fit: nothing may be random without a word.

    Raises:
        PlmccError: weights that cannot be read, have other shapes than the config says, or lack
            tensors of the base model.
    """
    try:
        model, info = kind.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except PlmccError:
        raise
    except Exception as problem:  # whatever transformers does with a config that makes no sense
        message = f"the model cannot be loaded: {first_line(problem)}"
        raise error("PLM401", message, str(name)) from None
    kind_name = type(model).__name__
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        message = f"the weights do not have the shape that config.json says: {key}"
        given, allowed = str(tuple(stored)), str(tuple(wanted))
        raise error("PLM401", message, str(name), got=given, allowed=allowed)
    prefix = f"{model.base_model_prefix}."
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    body = [k for k in missing if model.base_model is model or k.startswith(prefix)]
    body = [k for k in body if "pooler" not in k]  # checkpoints of many encoders have none
    if body:
        message = f"{len(body)} tensors of the model are not in its weights: {listing(body, 3)}"
        raise error("PLM401", message, str(name), hint="compare config.json with the weights")
    notes = []
    if missing:
        notes.append(f"{kind_name} starts with new, random tensors: {listing(missing, 4)}")
    if unused:
        notes.append(f"{kind_name} does not use, and drops: {listing(unused, 4)}")
    return model, tuple(notes)


def outline(config: PreTrainedConfig, kind: Any, options: Values, name: str) -> PreTrainedModel:
    """Return a model without weights, on the meta device; that of an artifact is compressed.

    Args:
        config: what the model is built from.
        kind: its class, or an Auto class.
        options: values of the config that are others.
        name: what errors call it.

    Raises:
        PlmccError: transformers cannot build it so.
    """
    config = copy.deepcopy(config)
    for key, value in options.items():
        setattr(config, key, value)
    build = getattr(kind, "_from_config", None) or kind.from_config
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build(config, dtype=config.dtype or torch.float32)
    except Exception as problem:  # whatever an architecture makes of its configuration
        message = f"the model cannot be built without its weights: {first_line(problem)}"
        raise error("PLM401", message, name) from None
    stored = getattr(config, "quantization_config", None)
    if stored is not None and artifact.method_of(config) == artifact.METHOD:
        values = stored if isinstance(stored, dict) else stored.to_dict()
        for record in artifact.PlmccQuantizationConfig(**values).records():
            artifact.install(model, record, {})
    model.train(False)
    return model


def _config(name: str | Path) -> PreTrainedConfig:
    check_config(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except PlmccError:
        raise
    except Exception as problem:
        hint = "pass a directory with config.json and weights, or a hub id"
        if "trust_remote_code" in str(problem):
            message = "this model needs code of its own, which plmcc does not run"
            hint = "choose a model whose architecture is part of transformers"
            raise error("PLM401", message, str(name), hint=hint) from None
        what = (
            "this is no model" if Path(name).is_dir() else "no such directory, or model of the hub"
        )
        raise error("PLM401", f"{what}: {first_line(problem)}", str(name), hint=hint) from None
    return config


def _static_snapshot(folder: Path | None, name: str | Path) -> Path | None:
    """The files of a static model of the hub; of no other model is anything read here."""
    if folder is not None:
        return None
    try:
        modules = hf_hub_download(str(name), MODULES)
    except (OSError, HFValidationError, LocalEntryNotFoundError):
        return None
    if not is_static(Path(modules).parent):
        return None
    return Path(snapshot_download(str(name)))


def _snapshot(name: str) -> Path | None:
    """The small files of a hub model (tokenizer, sentence-transformers) in the local cache."""
    try:
        weights = [f"*{suffix}" for suffix in WEIGHTS]
        found = Path(snapshot_download(name, ignore_patterns=weights))
        if (found / MODULES).is_file():  # its modules have weights of their own
            inner = [f"[0-9]*/*{suffix}" for suffix in (".safetensors", ".bin")]
            snapshot_download(name, allow_patterns=inner)
        return found
    except (OSError, HFValidationError, LocalEntryNotFoundError):
        return None


def _architecture(config: PreTrainedConfig) -> str:
    return architecture_of(config)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a directory or hub id; None if there is none.

    Raises:
        PlmccError: it cannot be read.
    """
    folder: Path | None = Path(name) if Path(name).is_dir() else None
    if folder is None:
        check_not_local(str(name))
    return _tokenizer(name, folder or _snapshot(str(name)))


def _tokenizer(name: str | Path, folder: Path | None) -> PreTrainedTokenizerBase | None:
    if folder is None or not any((*folder.glob("*token*"), *folder.glob("vocab*"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as problem:  # the tokenizers library raises bare exceptions
        message = f"the tokenizer cannot be read: {first_line(problem)}"
        raise error("PLM401", message, str(name), hint="repair it or remove its files") from None


def folder_digests(folder: Path | None) -> dict[str, str]:
    """Return the SHA-256 of each weight file and config of a model directory, or of a file."""
    if folder is None:
        return {}
    if folder.is_file():
        return {folder.name: digest(folder)}
    files = sorted(
        f
        for f in folder.iterdir()
        if f.suffix in (".safetensors", ".bin") or f.name == "config.json"
    )
    return {file.name: digest(file) for file in files}
