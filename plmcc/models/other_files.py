"""What is beside the weights of a model, and comes along: tokenizer, sentence-transformers modules,
templates, processors, licenses.

Everything in the directory is copied, except what is another copy of the weights, what plmcc writes
anew, and what an artifact must not hold: code and pickled objects.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from plmcc.data.pooling import MODULES
from plmcc.diagnostics import error
from plmcc.utils.files import read_json
from plmcc.utils.text import first_line

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".gguf",
    ".tflite",
    ".npz",
    ".index.json",
)
"""How the names of files end that hold weights, or say where they are."""
_OWN = ("model", "pytorch_model", "tf_model", "flax_model", "rust_model", "probes.")
"""How the names of the model's own weights begin, and of an artifact's probes."""
_OF_MODULES = (".safetensors", ".bin")
"""What sentence-transformers loads the weights of a module from."""
_PICKLED = (".pkl", ".pickle", ".joblib", ".dill")
_CODE = (".py", ".pyc", ".so", ".ipynb")
_ANEW = (
    "config.json",
    "plmcc.lock.json",
    "plmcc_export.json",
    "report.json",
    "report.html",
    "recipe.yaml",
    "README.md",
    "text_probes.json",
    "trainer_state.json",
    "all_results.json",
)
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tokenizer.model",
    "generation_config.json",
)
ADAPTER = "adapter_config.json"


class OtherFiles(NamedTuple):
    """What comes along from a model directory, and what does not."""

    copied: tuple[Path, ...]
    """Relative to the directory."""
    left: tuple[tuple[str, str], ...]
    """File or folder, and why it stays behind."""


def other_files(
    folder: Path, retokenized: PreTrainedTokenizerBase | None = None, *, code: bool = False
) -> OtherFiles:
    """Return the files beside weights and config that belong to a model.

    Args:
        folder: a model directory.
        retokenized: another tokenizer than the one in the directory, whose files then stay behind.
        code: keep Python files; they are copied and never run.

    Raises:
        PlmccError: `modules.json` is malformed.
    """
    anew = set(_ANEW)
    if retokenized is not None:
        anew |= {*_VOCABULARIES, *retokenized.vocab_files_names.values()}
    modules = _module_folders(folder)
    copied: list[Path] = []
    left: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        top = inner.parts[0]
        if any(part.startswith(".") for part in inner.parts) or not path.is_file():
            continue
        if len(inner.parts) == 1 and path.name in anew:
            continue
        reason = _LINK if leaves(path, folder) else _why_left(path, code)
        weights, alone = reason == _OTHER_WEIGHTS, len(inner.parts) == 1
        if weights and str(inner.parent) in modules:
            reason = "" if path.suffix in _OF_MODULES else _PICKLED_REASON
        elif weights and alone and path.name.startswith(_OWN):
            continue  # the model's, which the artifact replaces
        if reason:
            left[f"{top}/" if reason == _OTHER_WEIGHTS and not alone else str(inner)] = reason
        else:
            copied.append(inner)
    kept = [inner for inner in copied if f"{inner.parts[0]}/" not in left]
    return OtherFiles(tuple(kept), tuple(left.items()))


_OTHER_WEIGHTS = "weights of the original in another format"
_LINK = "a link that leads out of the directory"
_PICKLED_REASON = "pickled objects, which an artifact must not hold"


def leaves(path: Path, folder: Path) -> bool:
    """Whether a file is a link to what is not of the model: somebody else's model could name any
    file of this machine. The cache of the hub links to its blobs."""
    if not path.is_symlink():
        return False
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    of_cache = root.parent.name == "snapshots" and target.is_relative_to(blobs)
    return not (target.is_relative_to(root) or of_cache)


def _why_left(path: Path, code: bool) -> str:
    if path.name.endswith(WEIGHTS):
        return _OTHER_WEIGHTS
    if path.suffix in _PICKLED:
        return _PICKLED_REASON
    if path.suffix in _CODE and not (code and path.suffix == ".py"):
        return "code, which is kept with `--keep-code` only"
    return ""


def _module_folders(folder: Path) -> set[str]:
    """The folders of sentence-transformers modules, whose weights are not the model's."""
    file = folder / MODULES
    if not file.is_file():
        return set()
    try:
        listed = read_json(file)
        return {str(values["path"]) for values in listed if values["path"]}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise error(
            "PLM401", f"this file cannot be read: {first_line(problem)}", str(file)
        ) from None


def check_no_adapter(folder: Path) -> None:
    """Check that a model has no adapter beside it: transformers would apply it where peft is
    installed.

    Raises:
        PlmccError: it has one.
    """
    if (folder / ADAPTER).is_file():
        message = "an adapter is in the directory: what the model computes depends on peft"
        hint = (
            "merge it into the model first (`merge_and_unload()` of peft) and save that, or remove"
            f" {ADAPTER}"
        )
        raise error("PLM401", message, str(folder / ADAPTER), hint=hint)


def copy_other_files(found: OtherFiles, folder: Path, target: Path) -> None:
    """Copy files into an artifact, where it does not have them already.

    Pickled weights of modules become safetensors; without its code, no file names code.
    """
    code = any(inner.suffix == ".py" for inner in found.copied)
    for inner in found.copied:
        copy = target / inner
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if inner.suffix == ".bin" and inner.name.endswith(WEIGHTS):
            if not (folder / inner).with_name("model.safetensors").exists():
                _unpickle(folder / inner, copy.with_name("model.safetensors"))
        elif inner.suffix == ".json" and not code and _names_code(folder / inner):
            copy.write_text(_without_code(folder / inner), encoding="utf-8")
        else:
            shutil.copyfile(folder / inner, copy)


def require_plmcc(folder: Path, needed: bool) -> None:
    """Tell sentence-transformers whether a model of its kind needs plmcc: it then names the package
    where it is missing, before it reads anything else."""
    file = folder / "config_sentence_transformers.json"
    if not (folder / MODULES).is_file():
        return
    values = read_json(file) if file.is_file() else {}
    others = {n: v for n, v in (values.pop("requirements", None) or {}).items() if n != "plmcc"}
    own = {"plmcc": f">={_version()}"} if needed else {}
    if not (others or own) and not file.is_file():
        return
    more = {"requirements": others | own} if others or own else {}
    file.write_text(json.dumps(values | more, indent=2) + "\n", encoding="utf-8")


def _version() -> str:
    return importlib.metadata.version("plmcc")


def _unpickle(file: Path, copy: Path) -> None:
    """Write tensors of a file of torch as safetensors; code in it is not run."""
    try:
        values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        save_file({name: value.contiguous() for name, value in values.items()}, copy)
    except Exception as problem:  # whatever is in a file of somebody else
        raise error("PLM401", f"weights cannot be read: {first_line(problem)}", str(file)) from None


def _names_code(file: Path) -> bool:
    return b'"auto_map"' in file.read_bytes()


def _without_code(file: Path) -> str:
    values = read_json(file)
    values.pop("auto_map", None)
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def notes_of(found: OtherFiles) -> Iterator[str]:
    """Return what a user should know of files that stay behind, a sentence a reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.left:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"not copied: {', '.join(names[:3])}{more} ({reason})"
