"""`plmcc verify`: whatever changes in an artifact is noticed, and nothing of it loads quietly."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSeq2SeqLM

import plmcc
from plmcc.artifact import lock as seal
from plmcc.artifact.verify import prove
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from support.processes import run_module
from support.tiny_models import tiny
from support.tokenizers import words

RECIPE = "plmcc: 1\npasses:\n  - compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}\n"
CORRUPTIONS = 200


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seal")
    tiny("marian").save_pretrained(folder / "m")
    words().save_pretrained(folder / "m")
    plmcc.apply(parse_recipe(RECIPE, load_torch=True), folder / "m", folder / "out")
    return folder / "out"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["verify", *arguments])


def test_an_artifact_is_what_was_written(artifact: Path) -> None:
    done = run(artifact)
    assert done.returncode == 0, done.stderr
    assert "the same tokens with the cache and without" in done.stdout
    proof = json.loads(run(artifact, "--format", "json").stdout)
    assert proof["ok"]
    assert proof["files"] == len(list(seal.files(artifact)))
    assert proof["difference"] < 1e-4


def corrupted(file: Path, drawn: random.Random) -> str:
    """Flip a bit of a file, or cut its end off."""
    raw = bytearray(file.read_bytes())
    if drawn.random() < 0.3:
        left = drawn.randrange(len(raw))
        file.write_bytes(raw[:left])
        return f"{file.name}: {left} of {len(raw)} bytes are left"
    location, bit = drawn.randrange(len(raw)), drawn.randrange(8)
    raw[location] ^= 1 << bit
    file.write_bytes(raw)
    return f"{file.name}: bit {bit} of byte {location}"


def refusal(action: Callable[[], object]) -> str:
    """What an error says; nothing where there is none."""
    try:
        action()
    except PlmccError as problem:
        return problem.render()
    except Exception as problem:  # whatever the reader of a broken file says
        return f"{type(problem).__name__}: {problem}"
    return ""


def test_every_flipped_bit_and_missing_end_is_noticed(artifact: Path, tmp_path: Path) -> None:
    """Each file in turn; weights and config do not load either."""
    drawn = random.Random(0)
    names = [file.relative_to(artifact) for file in [*seal.files(artifact), artifact / seal.LOCK]]
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    missed, loaded = [], []
    for turn in range(CORRUPTIONS):
        name = names[turn % len(names)]
        what = corrupted(folder / name, drawn)
        if name.name not in refusal(lambda: prove(folder)):
            missed.append(what)
        kept = name.name in ("config.json", "model.safetensors")
        if kept and not refusal(lambda: AutoModelForSeq2SeqLM.from_pretrained(folder)):
            loaded.append(what)
        shutil.copyfile(artifact / name, folder / name)
    assert missed == []
    assert loaded == []
    prove(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: error PLM402: the file is missing"),
        (lambda f: (f / seal.LOCK).unlink(), "plmcc.lock.json is missing"),
        (lambda f: (f / "more.safetensors").write_bytes(b""), "the file is not in plmcc.lock.json"),
        (lambda f: (f / "modeling.py").write_text("1"), "the file is not in plmcc.lock.json"),
        (lambda f: shutil.rmtree(f), "the directory does not exist"),
    ],
)
def test_what_is_missing_or_added_has_a_sentence(
    artifact: Path, tmp_path: Path, change: object, said: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    assert callable(change)
    change(folder)
    with pytest.raises(PlmccError) as found:
        prove(folder)
    if not folder.exists():
        with pytest.raises(PlmccError, match=said):
            seal.check(folder)
    assert said in " ".join(found.value.render().split())


READ = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "added_tokens.json",
    "processor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.vocab",
    "modeling.pyc",
    "weights.ckpt",
    "weights.pickle",
    "weights.PT",
    "manifest.json",
    "aoti/model.pt2",
    "no_ending",
]


@pytest.mark.parametrize("name", READ)
def test_what_a_loader_could_read_is_in_the_lock(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    assert name not in seal.read(folder)["files"]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(PlmccError, match="the file is not in plmcc"):
        seal.check(folder)


@pytest.mark.parametrize(
    "name", ["notes.txt", "NOTES.md", ".gitattributes", ".cache/x.json", "plot.png", "LICENSE"]
)
def test_what_nobody_reads_is_only_told(artifact: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert seal.check(folder) == [name]


def test_files_outside_of_the_artifact_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    values = seal.read(folder)
    values["files"]["../m/config.json"] = "0" * 64
    (folder / seal.LOCK).write_text(seal._text(values))
    with pytest.raises(PlmccError, match="outside of the artifact"):
        prove(folder)


def test_resealed_weights_with_other_values_fail_the_probes(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("fc1.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seal.write(folder, seal.read(folder))
    with pytest.raises(PlmccError, match="differs by"):
        prove(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seal.write(folder, seal.read(folder))
    with pytest.raises(PlmccError, match="would be random"):
        prove(folder)


def test_the_command_ends_in_one_paragraph(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    (folder / "recipe.yaml").write_text("plmcc: 1\n")
    done = run(folder)
    assert done.returncode == 1
    assert "recipe.yaml: error PLM402: the file was changed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_saved_elsewhere_has_no_seal_and_loads(artifact: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(artifact)
    model.save_pretrained(tmp_path / "other")
    AutoModel.from_pretrained(tmp_path / "other")
