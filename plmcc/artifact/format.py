"""Compressed models as transformers checkpoints: `AutoModel.from_pretrained(directory)` after
`import plmcc`.

The config says `model_type: plmcc`, so that transformers without plmcc refuses it, and
`base_model_type` beside it. Its `quantization_config` lists the rewritten modules; loading builds
each `Hard(**layout)` on the meta device, puts it in place, and lets transformers load the tensors.
For every tensor that a pass removed, the weight file holds an empty one of the same name: whoever
loads the file without plmcc, by whatever class, gets a size mismatch instead of random weights.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plmcc.artifact import lock as seal
from plmcc.diagnostics import error, listing
from plmcc.utils.types import Values

if TYPE_CHECKING:
    from plmcc.rewrite import Record

# This module is imported in the middle of `import transformers` (see plmcc/__init__.py), perhaps by
# another module of plmcc that is not complete yet: what it needs of those it imports when it is
# called.

METHOD = "plmcc"
FORMAT = 1
MOST_LAYERS = 1_000
NEW = 2**26
"""Parameters that a head may have which the weight files do not hold."""
_COMPUTED = 2**22
"""The same of a table of positions: some architectures compute theirs value by value."""


class PlmccConfig(PreTrainedConfig):
    """Stands for `model_type: plmcc`; reading one gives the config of the base architecture."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: Values, **kwargs: object) -> Any:
        """Return the config of `base_model_type`, which writes itself as plmcc's again.

        Raises:
            PlmccError: the base type is missing or unknown to this transformers.
        """
        base = str(config_dict.get("base_model_type"))
        if base == "word_vectors":
            importlib.import_module("plmcc.vectors.model")  # registers it
        if base not in CONFIG_MAPPING or base == METHOD:
            message = (
                f"transformers has no architecture `{base}`, the base of this compressed model"
            )
            raise error("PLM402", message, "config.json: base_model_type")
        _check_depth(config_dict)
        values = {
            k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")
        }
        loaded = CONFIG_MAPPING[base].from_dict(values, **kwargs)
        mark(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def _check_depth(values: Values) -> None:
    """Refuse numbers of layers that would take forever to build."""
    for key, value in values.items():
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            allowed = f"at most {MOST_LAYERS}"
            message = "the number of layers is too large"
            raise error("PLM402", message, f"config.json: {key}", got=str(value), allowed=allowed)


def method_of(config: PreTrainedConfig) -> str:
    """Return how a config says that its checkpoint is quantized: `plmcc` of an artifact, `torchao`
    and the like; empty of an ordinary one."""
    stored = getattr(config, "quantization_config", None)
    found = stored.get("quant_method") if isinstance(stored, dict) else stored
    found = getattr(found, "quant_method", found)
    return str(getattr(found, "value", found) or "")


class _Marked:
    """Makes a config write itself with `model_type: plmcc` and its own type beside it.

    Only into a file: in memory it is a config of its type, by which peft and others look things up.
    """

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        return json.dumps(_as_plmcc(self, values), indent=2, sort_keys=True) + "\n"

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self).__mro__[2], self.__dict__)


def _as_plmcc(config: Any, values: Values) -> Values:
    return values | {"model_type": METHOD, "base_model_type": type(config).model_type}


_MARKED: dict[type, type] = {}


def mark(config: PreTrainedConfig) -> None:
    """Make a config write itself as plmcc's.

    Its class becomes a subclass of the same name: transformers finds the class of a model by the
    name of its config's class.
    """
    kind = type(config)
    if not issubclass(kind, _Marked):
        if kind not in _MARKED:
            members = {"__module__": kind.__module__}
            _MARKED[kind] = type(kind.__name__, (_Marked, kind), members)
        config.__class__ = _MARKED[kind]


def _restore(base: type[PreTrainedConfig], values: Values) -> PreTrainedConfig:
    config = base.__new__(base)
    config.__dict__.update(values)
    mark(config)
    return config


@register_quantization_config(METHOD)
class PlmccQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model: the format version and the rewritten
    modules."""

    def __init__(
        self, modules: list[Values] | None = None, format: int = FORMAT, **extra: object
    ) -> None:
        if format != FORMAT:
            message = f"the artifact has format {format}, but this plmcc reads format {FORMAT}"
            raise error("PLM402", message, "config.json", hint="install the plmcc that wrote it")
        self.quant_method = METHOD  # type: ignore[assignment]
        if not isinstance(modules, list):
            raise error("PLM402", "the list of rewritten modules is malformed", "config.json")
        self.format = format
        self.modules = modules

    def records(self) -> list[Record]:
        """Return the rewritten modules."""
        from plmcc.rewrite import Record

        return [Record.from_json(values) for values in self.modules]


@register_quantizer(METHOD)
class PlmccQuantizer(HfQuantizer):
    """Puts the rewritten modules into a model that transformers is loading, and saves them
    again."""

    quantization_config: PlmccQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        files = kwargs.get("checkpoint_files") or []
        _check_seal(files)
        for part in model.modules():
            # A concrete class has read its own config, not through AutoConfig; transformers looks
            # up by the type how tensors of the file become those of the model.
            if isinstance(part, PreTrainedModel):
                part.config.__dict__.pop("model_type", None)
                part.config.__dict__.pop("base_model_type", None)
                mark(part.config)
        saved = _tensors(files)
        records = self.quantization_config.records()
        for record in records:
            install(model, record, saved)
        _warn_of_other_code(records)
        _check_size(model, saved)
        _check_removed(model, saved)
        for record in records:  # when all are in place: one may have changed a part of another
            path = _locate(model, record.paths[0])
            if path is not None:
                _check_tensors(model.get_submodule(path).state_dict(), record, saved)
        _check_missing(model, saved)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> PreTrainedModel:
        # What quantized models refuse (`float`, `half`), these can do.
        from plmcc.rewrite import name_tables

        _check_values(model)
        model.is_quantized = False  # type: ignore[assignment]
        name_tables(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all tensors, with an empty one for each that a pass removed."""
        # The file has the names of the model in memory. Where transformers has others in files
        # (fused experts, renamed norms), it would convert what a pass has removed or changed.
        model._weight_conversions = []  # type: ignore[assignment]
        state = model.state_dict()
        for record in self.quantization_config.records():
            path = _locate(model, record.paths[0])
            for name in record.removed if path is not None else ():
                state[f"{path}.{name}"] = torch.empty(0, dtype=model.dtype)
        return state, {}

    def is_serializable(self) -> bool:
        """A compressed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A compressed model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """A compressed model can be trained without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A compressed model can be compiled."""
        return True


AutoConfig.register(METHOD, PlmccConfig)


def adopt(model: PreTrainedModel, records: list[Record]) -> None:
    """Make a rewritten model in memory one that `save_pretrained` writes as an artifact."""
    from plmcc.rewrite import name_tables

    known = getattr(model.config, "quantization_config", None)
    earlier = known.modules if isinstance(known, PlmccQuantizationConfig) else []
    config = PlmccQuantizationConfig([*earlier, *(record.to_json() for record in records)])
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            mark(part.config)
            part.config.quantization_config = config
            part.hf_quantizer = PlmccQuantizer(config)  # type: ignore[assignment]
            part.quantization_method = METHOD  # type: ignore[assignment]
    name_tables(model)


def install(model: PreTrainedModel, record: Record, saved: dict[str, tuple[int, ...]]) -> None:
    """Put the module of a record into a model that is being loaded, on the meta device.

    The model may be of another class than the one saved: a base model without its head, or a base
    model's weights under a head. Heads that this class ties to the table become views of it too.

    Raises:
        PlmccError: the module does not fit the model or the tensors in the file.
    """
    from plmcc.ir.program import Program
    from plmcc.rewrite import build, splice

    primary = _locate(model, record.paths[0])
    if primary is None:
        if type(model).__name__ not in (model.config.architectures or ()):
            return  # a part of the head that another class does not have
        raise error("PLM402", f"the model has no module {record.paths[0]}", "config.json")
    hard = build(record)
    others = {
        p: r
        for path, r in zip(record.paths[1:], record.roles[1:], strict=True)
        if (p := _locate(model, path))
    }
    for target, source in model.all_tied_weights_keys.items():
        # transformers names a tie whatever the config says; a head of its own has a weight.
        if source == f"{primary}.weight" and not _has(saved, target):
            path = target.rpartition(".")[0]
            others.setdefault(path, "head" if path == _head_path(model) else "embedding")
    splice(Program(model), [primary, *others], [record.roles[0], *others.values()], hard)
    for module in model.get_submodule(primary).modules():
        # transformers' initializers expect the modules of the original architecture. Those with
        # buffers that no file holds (causal masks) have to be initialized nevertheless.
        if not (module._non_persistent_buffers_set and _of_transformers(module)):
            module._is_hf_initialized = True  # type: ignore[assignment]
    last = re.escape(record.paths[0].rpartition(".")[2])
    ignored = {rf"(^|\.){last}\.{re.escape(name)}$" for name in record.removed}
    model._keys_to_ignore_on_load_unexpected = (
        set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
    )


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "transformers"


def _warn_of_other_code(records: list[Record]) -> None:
    """Warn once for each pass whose code is another than when the artifact was made."""
    from plmcc.rewrite import changed_code

    said = {record.name: changed_code(record) for record in records}
    for name, change in said.items():
        if change:
            message = f"the modules of `{name}` were {change}: the outputs may be others"
            warnings.warn(message, stacklevel=2)


def _has(saved: dict[str, tuple[int, ...]], name: str) -> bool:
    """Whether a file holds a tensor; its names may lack the base model's prefix, or have one."""
    full = {f".{key}" for key, shape in saved.items() if shape != (0,)}
    return any(key.endswith(f".{name}") or f".{name}".endswith(key) for key in full)


def _head_path(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def _locate(model: PreTrainedModel, path: str) -> str | None:
    """The path in this model: classes with and without a head differ by the base model's prefix."""
    prefix = model.base_model_prefix
    for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _check_seal(files: list[str]) -> None:
    """Compare weights and config with the lock beside them, if there is one."""
    for folder in {Path(file).parent for file in files}:
        if (folder / seal.LOCK).exists():
            names = [Path(file).name for file in files if Path(file).parent == folder]
            seal.check(folder, ["config.json", *names])


def _tensors(files: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return shapes


def _check_size(model: PreTrainedModel, saved: dict[str, tuple[int, ...]]) -> None:
    """Compare what the config asks for with what the files hold, before any of it is allocated."""
    if saved:
        held = sum(math.prod(shape) for shape in saved.values())
        # With buffers: a bias over the vocabulary may be one. Shared parameters count once.
        values = {id(value): value for value in model.state_dict(keep_vars=True).values()}
        asked = sum(value.numel() for value in values.values())
        if asked > 2 * held + NEW:
            message = "the configuration describes a model much larger than the weight files"
            given = f"{asked:,} values, and {held:,} in the files"
            raise error("PLM402", message, "config.json", got=given)
        for name, value in model.state_dict().items():
            size, known = value.numel(), tuple(value.shape) in saved.values()
            if "position" in name and size > _COMPUTED and not known:
                message = f"the configuration asks for a {name} that the files do not hold"
                given = " x ".join(map(str, value.shape))
                raise error("PLM402", message, "config.json", got=given)


def _check_values(model: PreTrainedModel) -> None:
    """Let modules look at their integers, before a kernel does: some write before they check."""
    for path, module in model.named_modules():
        check = getattr(module, "check_loaded", None)
        if check is None or any(value.is_meta for value in module.state_dict().values()):
            continue  # on the meta device: offloaded, and read when it is called
        try:
            check()
        except ValueError as problem:
            message = f"the tensors of {path} do not fit: {problem}"
            hint = "the artifact is damaged: write it again"
            raise error("PLM402", message, "model.safetensors", hint=hint) from None


def _check_removed(model: PreTrainedModel, saved: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model that still has what a pass removed: its record is not in the config.

    Not every transformers refuses the empty tensor that stands for it.
    """
    prefix = f"{model.base_model_prefix}."
    removed = {key.removeprefix(prefix) for key, shape in saved.items() if shape == (0,)}
    for name, value in model.state_dict().items() if removed else ():
        if value.numel() and name.removeprefix(prefix) in removed:
            message = f"a pass removed the tensor {name}, and the config does not say which"
            hint = "the artifact is damaged: write it again"
            raise error("PLM402", message, "config.json: quantization_config", hint=hint)


def _check_missing(model: PreTrainedModel, saved: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model whose body has tensors that the files lack: they would be random.

    A head may be new, and the pooler of many encoders is.
    """
    prefix = f"{model.base_model_prefix}."
    known = {key.removeprefix(prefix) for key in saved}
    ignored = (
        [*model._keys_to_ignore_on_load_missing] if model._keys_to_ignore_on_load_missing else []
    )
    tied = {name.removeprefix(prefix) for name in model.all_tied_weights_keys}
    names = model.base_model.state_dict() if saved else {}
    missing = [
        name
        for name in names
        if name not in known
        and name not in tied
        and "pooler" not in name
        and not any(re.search(pattern, f"{prefix}{name}") for pattern in ignored)
    ]
    if missing:
        message = f"{len(missing)} tensors are not in the weight files and would be random"
        hint = "the artifact is damaged: write it again"
        raise error("PLM402", message, "config.json", got=listing(missing, 3), hint=hint)


def _check_tensors(
    state: dict[str, Tensor], record: Record, saved: dict[str, tuple[int, ...]]
) -> None:
    """transformers initializes what a file lacks at random; a compressed module must never be."""
    if not saved:
        return
    last = record.paths[0].rpartition(".")[2]
    for name, value in state.items():
        shapes = [shape for key, shape in saved.items() if f".{key}".endswith(f".{last}.{name}")]
        if tuple(value.shape) not in shapes:
            message = f"the tensor {name} of shape {tuple(value.shape)} is not in the weight file"
            given = ", ".join(map(str, shapes)) or "no such tensor"
            location = f"model.safetensors: {record.paths[0]}"
            hint = "the artifact is damaged: write it again"
            raise error("PLM402", message, location, got=given, hint=hint)
