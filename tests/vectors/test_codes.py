"""Binary codes of words: nearest words, NLB's file format both ways, and exports of vectors."""

from __future__ import annotations

import gzip
import itertools
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from plmcc import apply, vectors
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from plmcc.vectors.codes import Codes, holds_codes, read_codes
from plmcc.vectors.export import write_codes, write_vectors
from plmcc.vectors.keyed import Vectors
from support.plans import run_here
from support.processes import run_module

V = 300
WORDS = ["new york", "Zürich", *(f"w{i}" for i in range(V - 2))]
BITS = np.random.default_rng(0).integers(0, 2, (V, 100)).astype(bool)


def codes(bits: int = 100) -> Codes:
    return Codes.of(list(WORDS), np.packbits(BITS[:, :bits], axis=1), bits)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_module("plmcc.cli", ["vectors", *arguments])


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of word vectors by the pass that compressed them; `n bits` for binary codes."""
    folder = tmp_path_factory.mktemp("vectors")
    random = np.random.default_rng(1)
    table = random.standard_normal((V, 4)) @ random.standard_normal((4, 12))
    rows = (" ".join(map(str, row)) for row in table.astype(np.float32).tolist())
    lines = [f"{word} {row}" for word, row in zip(WORDS, rows, strict=True)]
    text = "\n".join([f"{V} 12", *lines])
    (folder / "vectors.txt").write_text(text, encoding="utf-8")
    passes = {
        "64 bits": "binary_embedding: {bits: 64, epochs: 2}",
        "100 bits": "binary_embedding: {bits: 100, epochs: 2}",
        "sums": "compositional_codes: {codebooks: 4, codewords: 8, beam: 1, rounds: 0}",
    }
    for name, text in passes.items():
        recipe = parse_recipe(f"plmcc: 1\npasses:\n  - {text}\n", load_torch=True)
        apply(recipe, folder / "vectors.txt", folder / name)
    return {name: folder / name for name in passes}


@pytest.mark.parametrize("bits", [1, 8, 63, 64, 65, 100])
def test_similarity_is_the_share_of_equal_bits(bits: int) -> None:
    found, bits_Vn = codes(bits), BITS[:, :bits]
    assert np.array_equal(found["Zürich"], bits_Vn[1])
    equal = (bits_Vn == bits_Vn[1]).mean(1)
    assert found.similarity("Zürich", "w5") == pytest.approx(equal[7])
    nearest = found.most_similar("Zürich", topn=V)
    assert {word: pytest.approx(share) for word, share in nearest} == {
        word: share for word, share in zip(WORDS, equal, strict=True) if word != "Zürich"
    }
    shares = [share for _, share in nearest]
    assert shares == sorted(shares, reverse=True)


def test_analogies_rank_as_vectors_of_signs() -> None:
    found = codes()
    signs = Vectors(list(WORDS), BITS.astype(np.float32) * 2 - 1)
    questions = np.array(list(itertools.permutations(range(5), 3)))
    for a, b, c in questions[:10]:
        words = [WORDS[b], WORDS[c]], [WORDS[a]]
        ours, theirs = found.most_similar(*words, topn=9), signs.most_similar(*words, topn=9)
        shared = {word for word, _ in ours} & {word for word, _ in theirs}
        assert ours[0][1] == pytest.approx(max(score for _, score in ours))
        assert len(shared) >= 7  # equal scores may be in another order
    total = found.distances([2, 3], [1, -1])
    expected = (BITS[2] != BITS).sum(1) - (BITS[3] != BITS).sum(1)
    assert np.array_equal(total, expected)
    answers = found.completions(questions)
    for (a, b, c), answer in zip(questions, answers, strict=True):
        assert answer not in (a, b, c)
        score = -found.distances([a, b, c], [-1, 1, 1])
        others = [i for i in range(V) if i not in (a, b, c)]
        assert score[answer] == score[others].max()


def test_the_first_bit_is_the_highest_of_the_first_integer(tmp_path: Path) -> None:
    first = (1 << 63) + (1 << 62) + 1  # bits 0, 1 and 63
    file = tmp_path / "codes.txt"
    file.write_text(f"2 128\nking {first} 1\nqueen 0 {1 << 63}\n")
    found = vectors.load(file, by="hamming")
    assert (list(found), found.bits) == (["king", "queen"], 128)
    assert np.flatnonzero(found["king"]).tolist() == [0, 1, 63, 127]
    assert np.flatnonzero(found["queen"]).tolist() == [64]
    assert found.similarity("king", "queen") == 1 - 5 / 128


@pytest.mark.parametrize("name", ["64 bits", "100 bits"])
@pytest.mark.parametrize("suffix", ["nlb", "txt", "txt.gz"])
def test_codes_go_to_a_file_and_back(
    compressed: dict[str, Path], name: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"codes.{suffix}"
    notes = write_codes(compressed[name], file)
    assert any("no multiple of 64" in note for note in notes) == (name == "100 bits")
    assert any("`new york`, `new_york`" in note for note in notes)
    kept, found = vectors.load(compressed[name], by="hamming"), read_codes(file)
    assert kept.index_to_key == WORDS
    assert found.index_to_key == ["new_york", *WORDS[1:]]
    assert found.bits == kept.bits
    assert np.array_equal(found.columns, kept.columns)
    text = gzip.decompress(file.read_bytes()) if suffix.endswith("gz") else file.read_bytes()
    header, first, *_ = text.decode().splitlines()
    assert header == f"{V} {kept.bits}"
    assert len(first.split()) == 1 + len(kept.columns)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["100 bits", "sums"])
@pytest.mark.parametrize("suffix", ["vec", "txt.gz", "bin"])
def test_vectors_go_to_a_file_and_back(
    compressed: dict[str, Path], name: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"vectors.{suffix}"
    write_vectors(compressed[name], file)
    assert not holds_codes(file)
    found = vectors.load(file)
    assert found.index_to_key == ["new_york", *WORDS[1:]]
    assert np.array_equal(found.vectors, vectors.load(compressed[name]).vectors)


FIRST = "3 100\nking 1 0\n"
WRONG: dict[str, tuple[str, str, str]] = {
    "too few": (FIRST + "x 1\ny 1 0\n", ":3", "`x` has 1 unsigned 64-bit integers, but the first"),
    "too many": (FIRST + "x 1 2 3\ny 1 0\n", ":3", "`x` has 3 unsigned 64-bit integers"),
    "negative": (
        FIRST + "x -1 0\ny 1 0\n",
        ":3",
        "a value that is not a valid unsigned 64-bit integer",
    ),
    "too large": (FIRST + f"x {1 << 64} 0\ny 1 0\n", ":3", "not a valid unsigned 64-bit integer"),
    "more bits than": (FIRST + "x 0 1\ny 1 0\n", ":3", "more bits than the 100"),
    "twice": (FIRST + "king 1 0\ny 1 0\n", ":3", "`king` appears twice"),
    "fewer words": (FIRST + "x 1 0\n", ":3", "announces 3 words, but there are 2"),
    "more words": (FIRST + "x 1 0\ny 1 0\nz 1 0\n", ":5", "announces 3 words, but there are 4"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_broken_lines_have_their_number(kind: str, tmp_path: Path) -> None:
    text, location, message = WRONG[kind]
    file = tmp_path / "codes.txt"
    file.write_text(text)
    assert holds_codes(file)
    with pytest.raises(PlmccError, match=message) as caught:
        vectors.load(file, by=None)
    assert f"{file}{location}" in str(caught.value)
    if "words" not in kind:
        found = vectors.load(file, broken="skip", by=None)
        assert list(found) == ["king", "y"]
        assert found.notes[0].startswith("1 broken line")


def test_what_is_no_file_of_codes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("2 3\nking 1 2 3\nqueen 4 5 6\n", "2 1\nking 1\nqueen 2\n", "king 1\nqueen 2\n"):
        file.write_text(text)
        assert not holds_codes(file)
        assert isinstance(vectors.load(file, by=None), Vectors)
    file.write_text("2 1\nking 0\nqueen 9223372036854775808\n")  # one bit: only if told so
    assert vectors.load(file, by="hamming").similarity("king", "queen") == 0
    for text, message in (
        ("king 1\n", "begins with the numbers of words and bits"),
        ("2 128\nking 1 2 3\n", "128 bits take 2 integers, but the first word has 3"),
        ("2 128\n", "the first word has 0"),
    ):
        file.write_text(text)
        with pytest.raises(PlmccError, match=message):
            vectors.load(file, by="hamming")


def test_bits_that_the_authors_program_has_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("2 100\nking 7\nqueen 6\n")
    found = vectors.load(file, by="hamming")
    assert found.bits == 64
    assert found.similarity("king", "queen") == 1 - 1 / 64
    assert "100 bits, and the lines hold 64" in found.notes[0]


def test_codes_have_no_vectors(compressed: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "codes.txt"
    write_codes(compressed["64 bits"], file)
    with pytest.raises(PlmccError, match="binary codes, not vectors"):
        vectors.load(file)
    with pytest.raises(PlmccError, match="one binary code per word, which `compositional"):
        write_codes(compressed["sums"], tmp_path / "none.nlb")
    with pytest.raises(PlmccError, match="which `compositional_codes` does not produce"):
        vectors.load(compressed["sums"], by="hamming")
    with pytest.raises(PlmccError, match="read as another format"):
        write_codes(compressed["64 bits"], tmp_path / "codes.bin")
    assert list(tmp_path.iterdir()) == [file]


def test_words_that_would_become_one(tmp_path: Path) -> None:
    lines = [f"w{i} {i} {-i} {i % 7} 1" for i in range(99)]
    lines[3:5] = ["new york 1 2 3 4", "new_york 1 2 3 5"]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    text = "plmcc: 1\npasses:\n  - compositional_codes: {codebooks: 4, codewords: 8}\n"
    apply(parse_recipe(text, load_torch=True), tmp_path / "vectors.txt", tmp_path / "out")
    with pytest.raises(PlmccError, match="`new york` would be written as `new_york`"):
        write_vectors(tmp_path / "out", tmp_path / "file.vec")
    assert not (tmp_path / "file.vec").exists()


def test_the_command_line(
    compressed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partial(run_here, capsys, "vectors")
    folder, file = compressed["100 bits"], tmp_path / "codes.nlb"
    done = run("export", folder, "--to", "nlb", "--output", file)
    assert (done.returncode, "note: 100 bits are no multiple" in done.stderr) == (0, True)
    answers = [here("nearest", location, "Zürich", "--top", "5") for location in (folder, file)]
    assert answers[0].stdout == answers[1].stdout.replace("new_york", "new york")
    best = vectors.load(file, by="hamming").most_similar("Zürich", topn=5)
    assert answers[1].stdout == "".join(f"{share:.4f}\t{word}\n" for word, share in best)
    done = here("nearest", folder, "Zürich", "--by", "cosine", "--top", "1")
    word, cosine = vectors.load(folder).most_similar("Zürich", topn=1)[0]
    assert done.stdout == f"{cosine:.4f}\t{word}\n"
    done = here("nearest", file, "w1:w2::w3:?", "--top", "2")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("w1 w2 9\nw1 w3 5\nw1 w4 1\n")
    done = here("evaluate", file, "--datasets", pairs)
    assert (done.returncode, "similarity" in done.stdout) == (0, True)
    for arguments, message in (
        (("export", folder, "--to", "nlb", "--output", file), "the file exists already"),
        (("export", compressed["sums"], "--to", "nlb", "-o", tmp_path / "x"), "`compositional_cod"),
        (("export", tmp_path, "--to", "word2vec", "-o", tmp_path / "x"), "no config.json"),
        (("nearest", file, "w1", "--by", "cosine"), "binary codes, not vectors"),
        (("nearest", pairs, "w1", "--by", "hamming"), "a file of binary codes begins"),
        (("nearest", file, "Zurich"), "did you mean `Zürich`"),
    ):
        done = here(*arguments)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr
