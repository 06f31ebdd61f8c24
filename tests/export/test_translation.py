"""`plmcc export` and `plmcc translate`, and export directories in a process without the model's
code."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from plmcc.diagnostics import PlmccError
from plmcc.evaluation.latency import measure_generation
from plmcc.export.exported import Exported
from plmcc.export.exporter import export_directory
from plmcc.export.manifest import MANIFEST
from plmcc.export.translate import Options, Translator, load_translator, stream
from support.tiny_models import prompt, tiny
from support.tokenizers import words

ROOT = Path(__file__).parents[2]
TEXT = "w5 w6 w7\n\nw8 w9 w10 w11 w12 w13 w14 w15\n   \nw20\r\nw21 w22 w23 w24\n"


def plmcc(*arguments: str | Path, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error::UserWarning", "-m", "plmcc.cli", *map(str, arguments)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, env=settings, input=text, capture_output=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory: model and tokenizer."""
    path = tmp_path_factory.mktemp("model") / "bart"
    model: Any = tiny("bart")
    with torch.no_grad():  # or each token calls for itself
        model.model.decoder.embed_positions.weight *= 20
    model.generation_config.max_new_tokens = 12
    model.generation_config.bad_words_ids = [[0], [7]]  # as models of OPUS-MT have, with padding
    model.generation_config.renormalize_logits = True
    model.save_pretrained(path)
    words().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    target = folder.parent / "exported"
    done = plmcc("export", folder, "--to", "aoti", "-o", target)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if b"No CUDA runtime" not in line]
    assert said == []  # a torch with CUDA says that there is none
    assert b"machine code" in done.stdout
    return target


def expected(folder: Path, text: str, **options: Any) -> list[str]:
    """What transformers says, a sentence at a time."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = []
    for line in text.splitlines():
        if not line.strip():
            lines.append("")
            continue
        ids = tokenizer(line, return_tensors="pt").input_ids
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        lines.append(str(tokenizer.decode(found[0], skip_special_tokens=True)).strip())
    return lines


def translated(translator: Translator, text: bytes, **options: Any) -> list[str]:
    out = io.BytesIO()
    count = stream(translator, io.BytesIO(text), "in.txt", Options(**options), out)
    lines = out.getvalue().decode().split("\n")
    assert lines.pop() == ""
    assert count == len(lines)
    return lines


@pytest.mark.parametrize("beams", [1, 3])
def test_lines_keep_their_order_and_blank_lines(folder: Path, beams: int) -> None:
    translator = load_translator(str(folder), "cpu")
    wanted = expected(folder, TEXT, num_beams=beams)
    assert len(wanted) == 6
    assert any(wanted)
    for batch in (1, 2, 16):
        assert translated(translator, TEXT.encode(), beams=beams, batch=batch) == wanted
    assert translated(translator, b"", beams=beams) == []
    assert translated(translator, TEXT.encode().rstrip(b"\n"), beams=beams) == wanted


def test_what_only_transformers_can_search_for_is_translated(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "opus"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "generation_config.json").read_text())
    config |= {"bad_words_ids": [[7, 8]]}
    (copy / "generation_config.json").write_text(json.dumps(config))
    found = translated(load_translator(str(copy), "cpu"), b"w5 w6 w7\n", beams=2)
    assert found == expected(copy, "w5 w6 w7", num_beams=2)


def test_results_come_chunk_by_chunk(folder: Path) -> None:
    translator = load_translator(str(folder), "cpu")
    read = 0

    def source() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"w5 w6\n"

    lines = translator.lines(source(), "in.txt", Options(batch=2))
    next(lines)
    assert read == 32


def test_a_line_that_is_too_long(folder: Path) -> None:
    translator = load_translator(str(folder), "cpu")
    text = b"w5\n" + b"w6 " * 60 + b"\n"
    with pytest.raises(PlmccError) as caught:
        translated(translator, text)
    assert caught.value.render() == (
        "in.txt:2: error PLM302: the sentence is longer than the model can read\n"
        "  got: 62 tokens\n  allowed: 48 tokens\n  hint: split it, or add --truncate"
    )
    assert len(translated(translator, text, truncate=True)) == 2


def test_a_line_that_is_not_utf8(folder: Path) -> None:
    done = plmcc("translate", folder, text=b"w5\nw6 \xff\n")
    assert done.returncode == 1
    assert done.stderr.startswith(b"stdin:2: error PLM005: the line is not UTF-8 text")
    assert b"Traceback" not in done.stderr


def test_a_file_that_is_missing_shows_before_a_model_is_loaded(tmp_path: Path) -> None:
    done = plmcc("translate", tmp_path / "no-model", tmp_path / "no-file.txt")
    assert done.returncode == 1
    wanted = f"{tmp_path / 'no-file.txt'}: error PLM501: No such file or directory\n"
    assert done.stderr.decode() == wanted


def test_a_model_that_does_not_translate(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    message = f"^{tmp_path}: error PLM401: GPT2LMHeadModel "
    with pytest.raises(PlmccError, match=message + "is not a translation model"):
        load_translator(str(tmp_path))
    with pytest.raises(PlmccError, match=message + "does not go to aoti: only encoders of text"):
        export_directory(str(tmp_path), tmp_path.parent / "out")
    assert not (tmp_path.parent / "out").exists()


def test_the_command_line_from_end_to_end(folder: Path, exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text(TEXT)
    for model, beams, options in ((folder, 4, ["--device", "cpu"]), (exported, 1, [])):
        done = plmcc("translate", model, file, "--beam", str(beams), *options)
        assert (done.returncode, done.stderr) == (0, b"")
        wanted = expected(folder, TEXT, num_beams=beams)
        assert done.stdout.decode().split("\n") == [*wanted, ""]


def test_a_reader_that_leaves(exported: Path) -> None:
    command = f"{sys.executable} -m plmcc.cli translate {exported} --batch 1 | head -1"
    text = "w5 w6\n" * 400
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, env=settings, input=text, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_an_export_runs_without_the_models_code(folder: Path, exported: Path) -> None:
    given = prompt("bart", 4)
    code = (
        "import json, sys, torch\n"
        "from plmcc.export.exported import Exported\n"
        "ids, mask = (torch.tensor(x) for x in json.loads(sys.stdin.read()))\n"
        f"model = Exported({str(exported)!r})\n"
        "found = [model.generate(ids, mask, num_beams=n).tolist() for n in (1, 4)]\n"
        "bad = {m for m in sys.modules if 'transformers' in m or 'plmcc.passes' in m}\n"
        "print(json.dumps([found, sorted(bad)]))\n"
    )
    text = json.dumps([given["input_ids"].tolist(), given["attention_mask"].tolist()])
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, imported = json.loads(done.stdout)
    assert imported == []
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert found == [model.generate(**given, num_beams=n).tolist() for n in (1, 4)]


def test_an_export_takes_any_batch_and_length(folder: Path, exported: Path) -> None:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    programs = Exported(exported)
    options: list[dict[str, Any]] = [
        {"num_beams": 1, "max_new_tokens": 40},
        {"num_beams": 3, "max_new_tokens": 5, "length_penalty": 2.0, "early_stopping": True},
    ]
    for batch, length in ((1, 1), (1, 40), (9, 12)):
        ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(7))
        for option in options:
            wanted = model.generate(input_ids=ids, **option)
            assert torch.equal(programs.generate(ids, **option), wanted)
            assert torch.equal(programs.generate(ids.int(), ids.ge(0), **option), wanted)


def test_what_an_export_refuses(exported: Path, tmp_path: Path) -> None:
    programs = Exported(exported)
    ids = torch.full((1, 49), 5)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: programs.generate(ids), "the source is too long"),
        (lambda: programs.generate(ids[:, :4], max_new_tokens=49), "the translation is too long"),
        (lambda: programs.generate(ids[:, :4], num_beams=5), "no program for 5 beams"),
        (lambda: programs.generate(ids[:, :4] + 94), "got: 99 to 99\n  allowed: 0 to 98"),
        (lambda: programs.generate(ids[:0]), "got: none"),
        (lambda: programs.generate(ids[:, :4], num_beams=0), "got: 0\n  allowed: at least 1"),
        (lambda: programs.generate(ids[:, :4], max_new_tokens=0), "`max_new_tokens` is out of"),
        (lambda: programs.generate(ids[0]), "these are not token ids"),
        (lambda: programs.generate(ids[:, :4], ids), "`attention_mask` does not have the shape"),
        (lambda: Exported(tmp_path), "this is not an export directory"),
        (lambda: load_translator(str(exported), "cuda"), "made for another device"),
    ]
    for action, message in cases:
        with pytest.raises(PlmccError, match=message):
            action()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"torch": "1.0.0"}}, "compiled by another version of torch"),
        ({"cpu": "AVX9000"}, "compiled for another processor"),
        ({"plmcc_export": 99}, "another version of plmcc"),
    ],
)
def test_an_export_from_elsewhere(
    exported: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = json.loads((exported / MANIFEST).read_text()) | change
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(PlmccError, match=message):
        Exported(tmp_path)


def test_a_damaged_export(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "step-1.pt2").write_bytes(b"nothing")
    with pytest.raises(PlmccError, match="the file was changed after it was written"):
        Exported(copy)
    (copy / "step-1.pt2").unlink()
    with pytest.raises(PlmccError, match="is missing"):
        Exported(copy)


def test_an_export_is_replaced_only_when_asked(folder: Path, exported: Path) -> None:
    with pytest.raises(PlmccError, match="the output directory exists\n  hint: add --overwrite"):
        export_directory(str(folder), exported)
    with pytest.raises(PlmccError, match="was not written by this command"):
        export_directory(str(folder), folder.parent)
    with pytest.raises(PlmccError, match="inside the directory of the model"):
        export_directory(str(folder), folder / "inside")


def test_transformers_has_no_pipeline_for_translation(folder: Path) -> None:
    # Since version 5; `plmcc translate` is what remains. A test, so that its return is noticed.
    task: Any = "translation"
    with pytest.raises(KeyError, match=task):
        pipeline(task, model=str(folder))


def test_tokens_per_second_count_what_was_generated() -> None:
    calls: list[str] = []

    def fake(name: str) -> Any:
        def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            calls.append(name)
            return torch.tensor([[0, 5, 6, 2, 2], [0, 5, 2, 0, 0]])[: len(input_ids)]

        return generate

    models = {"a": fake("a"), "b": fake("b")}
    rows = measure_generation(models, [[3, 4], [3], [3]], 2, 1, pad=0, eos=2, rounds=2)
    assert [(row.name, row.tokens) for row in rows] == [("a", 8), ("b", 8)]
    assert rows[0].speedup == 1
    assert "".join(calls) == "bbaaaabbbbaa"
