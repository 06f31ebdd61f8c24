"""Word-vector files: every format gives the same words and numbers; broken lines have numbers."""

from __future__ import annotations

import gzip
import json
import subprocess
import tracemalloc
from codecs import BOM_UTF8
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmcc import apply, vectors
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from plmcc.vectors.keyed import Score, Vectors
from support.plans import run_here
from support.processes import run_module
from support.tiny_models import tiny

WORDS = ["king", "queen", "man", "woman", "Zürich", "new york", "..."]
TABLE = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float32)
_FAMILY = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0.1], [0, 0, 1, 0, 0.1]]
TABLE[:4] = np.array(_FAMILY, dtype=np.float32)
SMALL = "plmcc: 1\npasses:\n  - compositional_codes: {codebooks: 4, codewords: 8}\n"
SHARED = Path(__file__).parents[3] / "shared/data"


def text(header: bool, end: str = "\n") -> bytes:
    lines = [f"{len(WORDS)} {TABLE.shape[1]}"] if header else []
    lines += [
        f"{word} " + " ".join(map(repr, row.tolist()))
        for word, row in zip(WORDS, TABLE, strict=True)
    ]
    return (end.join(lines) + end).encode()


def binary(newline: bytes = b"\n") -> bytes:
    head = f"{len(WORDS)} {TABLE.shape[1]}\n".encode()
    pairs = zip((w.replace(" ", "_") for w in WORDS), TABLE, strict=True)
    return head + b"".join(word.encode() + b" " + row.tobytes() + newline for word, row in pairs)


FILES: dict[str, bytes] = {
    "word2vec.txt": text(True),
    "glove.txt": text(False),
    "windows.vec": text(True, "\r\n"),
    "marked.txt": BOM_UTF8 + text(False),
    "trailing.vec": text(True, " \n"),
    "word2vec.bin": binary(),
    "plain.bin": binary(b""),
    "word2vec.txt.gz": gzip.compress(text(True)),
    "glove.txt.gz": gzip.compress(text(False)),
    "word2vec.bin.gz": gzip.compress(binary()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    found = vectors.load(tmp_path / name)
    expected = [w.replace(" ", "_") for w in WORDS] if ".bin" in name else WORDS
    assert found.index_to_key == expected
    assert np.array_equal(found.vectors, TABLE)
    assert found.vectors.dtype == np.float32
    assert found.notes == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_with_words_beside_them(dtype: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", TABLE.astype(dtype))
    with pytest.raises(PlmccError, match="the file with the words is missing"):
        vectors.load(tmp_path / "table.npy")
    lines = "\n".join(f"{word}\t{100 - i}" for i, word in enumerate(WORDS))
    (tmp_path / "vocab.txt").write_text(lines, encoding="utf-8")
    found = vectors.load(tmp_path / "table.npy")
    assert found.index_to_key == WORDS
    assert np.allclose(found.vectors, TABLE, atol=2e-3)
    (tmp_path / "names").write_text("\n".join(WORDS), encoding="utf-8")
    assert list(vectors.load(tmp_path / "table.npy", words=tmp_path / "names")) == WORDS
    (tmp_path / "names").write_text("\n".join(WORDS[1:]), encoding="utf-8")
    with pytest.raises(PlmccError, match="6 words, 7 rows"):
        vectors.load(tmp_path / "table.npy", words=tmp_path / "names")
    np.save(tmp_path / "table.npy", TABLE[0])
    with pytest.raises(PlmccError, match="not a table of floating-point numbers"):
        vectors.load(tmp_path / "table.npy")


BROKEN: dict[str, tuple[bytes, str]] = {
    "too few": (b"x 1 2 3\n", "`x` has 3 numbers, but the first line has 5"),
    "too many": (b"x 1.0 2.0 3.0 4.0 5.0 6.0\n", "`x` has 6 numbers"),
    "no number": (b"x 1 2 three 4 5\n", "`x` has a value that is not a valid number"),
    "not a number": (b"x 1 2 nan 4 5\n", "not finite"),
    "too large": (b"x 1 2 1e40 4 5\n", "not finite"),
    "twice": (b"man 1 2 3 4 5\n", "`man` appears twice"),
    "bytes": (b"\xff\xfe 1 2 3 4 5\n", "not UTF-8"),
}


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines_have_their_number(kind: str, header: bool, tmp_path: Path) -> None:
    line, message = BROKEN[kind]
    lines = text(header).splitlines(keepends=True)
    if header:
        lines[0] = b"8 5\n"
    lines.insert(4, line)
    file = tmp_path / "broken.txt"
    file.write_bytes(b"".join(lines))
    with pytest.raises(PlmccError, match=message) as caught:
        vectors.load(file)
    assert f"{file}:5" in str(caught.value)
    found = vectors.load(file, broken="skip")
    assert found.index_to_key == WORDS
    assert np.array_equal(found.vectors, TABLE)
    assert found.notes[0].startswith("1 broken line")
    assert found.notes[1].startswith("line 5: ")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"8 5\n" + text(False), "announces 8 words, but there are 7"),
        ("a.txt", b"99999999999 300\nx 1\n", "the header claims"),
        ("a.txt", b"word\n", "neither a header nor a word"),
        ("a.bin", b"nothing", "no header"),
        ("a.bin", binary()[:-12], "the file ends in word 7 of 7"),
        ("a.txt.gz", b"not packed", "cannot be read"),
        ("a.txt.gz", gzip.compress(text(True))[:-20], "cannot be read"),
        ("a.npy", b"nothing", "cannot be read"),
    ],
)
def test_damaged_files_are_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlmccError, match=message):
        vectors.load(tmp_path / name)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(PlmccError, match="the file does not exist"):
        vectors.load("nowhere.txt")


def test_words_are_for_arrays(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_bytes(text(False))
    with pytest.raises(PlmccError, match=r"goes with a \.npy file"):
        vectors.load(tmp_path / "glove.txt", words=tmp_path / "names")
    np.save(tmp_path / "table.npy", TABLE)
    with pytest.raises(PlmccError, match=r"names: error PLM301: the file does not exist"):
        vectors.load(tmp_path / "table.npy", words=tmp_path / "names")


@pytest.mark.parametrize("header", [False, True])
def test_reading_takes_little_more_memory_than_the_table(header: bool, tmp_path: Path) -> None:
    count, width = 4000, 300
    row = " ".join(["0.125"] * width)
    lines = [f"{count} {width}"] if header else []
    file = tmp_path / "large.txt"
    file.write_text("\n".join([*lines, *(f"w{i} {row}" for i in range(count))]), encoding="utf-8")
    tracemalloc.start()
    found = vectors.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == count
    assert peak < 1.5 * found.vectors.nbytes


# --- using them


def small() -> Vectors:
    return Vectors(list(WORDS), TABLE.copy())


def test_a_mapping_with_gensims_names() -> None:
    found = small()
    assert np.array_equal(found["queen"], TABLE[1])
    assert "queen" in found
    assert "prince" not in found
    assert (len(found), list(found), found.vector_size) == (7, WORDS, 5)
    assert found.key_to_index["woman"] == 3
    with pytest.raises(KeyError):
        found["prince"]
    cosine = TABLE[0] @ TABLE[4] / np.linalg.norm(TABLE[0]) / np.linalg.norm(TABLE[4])
    assert found.similarity("king", "Zürich") == pytest.approx(float(cosine), abs=1e-6)


def test_nearest_words_and_analogies() -> None:
    found = small()
    cosines = {w: found.similarity("king", w) for w in WORDS if w != "king"}
    wanted = sorted(cosines, key=lambda word: -cosines[word])
    assert [word for word, _ in found.most_similar("king", topn=100)] == wanted
    assert found.most_similar(["king", "woman"], ["man"], 1)[0][0] == "queen"
    with pytest.raises(PlmccError, match="did you mean `queen`"):
        found.most_similar("quen")


def test_evaluation(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("word1,word2,score\nking,queen,9\nking,man,5\nking,Woman,1\nking,x,3\n")
    score = vectors.evaluate(small(), pairs)
    assert score == Score("pairs", "similarity", score.score, 3, 25.0)
    assert score.score == pytest.approx(50.0)
    questions = tmp_path / "questions.txt"
    questions.write_text(": family\nman king woman queen\nking man queen woman\nman king x queen\n")
    score = vectors.evaluate(small(), questions)
    assert (score.kind, score.score, score.used) == ("analogy", 100.0, 2)
    for wrong, message in (
        ("a b\n", "neither"),
        ("# x\n\nking queen x 3\nking man 5\n", "pairs.csv:3: .*not a number"),
        ("king queen 3\nking man 3\n", "no rank correlation"),
    ):
        pairs.write_text(wrong)
        with pytest.raises(PlmccError, match=message):
            vectors.evaluate(small(), pairs)


@pytest.mark.skipif(not (SHARED / "wordsim").is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "rho"), [("EN-MEN-TR-3k", 68.7), ("EN-WS-353-ALL", 69.4), ("EN-SIMLEX-999", 37.5)]
)
def test_scores_are_those_that_the_data_comes_with(name: str, rho: float) -> None:
    found = vectors.load(SHARED / "wordvec_wiki50k/vectors.f16.npy")
    score = vectors.evaluate(found, SHARED / f"wordsim/{name}.txt")
    assert score.score == pytest.approx(rho, abs=0.1)


def test_a_recipe_compresses_them(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    table = random.standard_normal((200, 8)).astype(np.float32)
    words = [*WORDS, *(f"w{i}" for i in range(193))]
    lines = [
        f"{w} " + " ".join(map(str, row.tolist())) for w, row in zip(words, table, strict=True)
    ]
    (tmp_path / "vectors.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe = parse_recipe(
        "plmcc: 1\npasses:\n  - compositional_codes: {codebooks: 8, codewords: 16, "
        "initialization: residual}\n",
        load_torch=True,
    )
    result = apply(recipe, tmp_path / "vectors.txt", tmp_path / "out")
    assert sum(result.bytes_after.values()) < sum(result.bytes_before.values())
    found = vectors.load(tmp_path / "out")
    assert found.index_to_key == words
    error = np.linalg.norm(found.vectors - table) / np.linalg.norm(table)
    assert 0 < error < 0.5
    lock = json.loads((tmp_path / "out/plmcc.lock.json").read_text())
    assert list(lock["base_model"]["files"]) == ["vectors.txt"]
    done = run("nearest", tmp_path / "out", "new york", "--top", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\t")[1].strip() == found.most_similar("new york", topn=1)[0][0]
    tiny("bert").save_pretrained(tmp_path / "bert")
    apply(parse_recipe(SMALL, load_torch=True), tmp_path / "bert", tmp_path / "no vectors")
    with pytest.raises(PlmccError, match="contains no word vectors"):
        vectors.load(tmp_path / "no vectors")


def test_apply_leaves_broken_lines_out_when_asked(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL)
    file = tmp_path / "vectors.txt"
    lines = [f"w{i} {i} {-i} {i % 7} 1" for i in range(99)]
    file.write_text("\n".join([*lines[:50], "x 1 2", *lines[50:]]))
    command = ["apply", str(tmp_path / "recipe.yaml")]
    out = ["-o", str(tmp_path / "out")]
    done = run_module("plmcc.cli", [*command, str(file), *out])
    assert (done.returncode, "vectors.txt:51: error PLM301" in done.stderr) == (1, True)
    assert "add --skip-broken" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_module("plmcc.cli", [*command, str(file), *out, "--skip-broken"])
    assert done.returncode == 0, done.stderr
    assert "line 51: `x` has 2 numbers" in done.stdout
    assert len(vectors.load(tmp_path / "out")) == 99
    other = ["-o", str(tmp_path / "other")]
    done = run_module("plmcc.cli", [*command, str(tmp_path), *other, "--skip-broken"])
    assert (done.returncode, "needs a file of word vectors" in done.stderr) == (1, True)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["vectors", *arguments])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = partial(run_here, capsys, "vectors")
    file = tmp_path / "glove.txt"
    file.write_bytes(text(False))
    done = run("nearest", file, "man:king::woman:?", "--top", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("\tqueen")
    assert len(done.stdout.splitlines()) == 2
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("king queen 9\nking man 5\nking woman 1\n")
    done = here("evaluate", file, "--datasets", pairs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "50.00" in done.stdout
    file.write_bytes(text(False) + b"x 1\n")
    done = here("nearest", file, "king", "--skip-broken")
    assert (done.returncode, "note: 1 broken line" in done.stderr) == (0, True)
    done = here("nearest", file, "kin", "--skip-broken")
    assert f"{file}: error PLM301: `kin` has no vector" in done.stderr
    assert "good:better::small:?" in here("nearest", "--help").stdout  # `:woman:` is a picture
    for arguments in (("nearest", file, "king"), ("nearest", "none.txt", "x")):
        done = here(*arguments)
        assert done.returncode == 1
        assert "error PLM301" in done.stderr
        assert "Traceback" not in done.stderr
