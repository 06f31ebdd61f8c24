"""Data that would take all memory, wait for ever, or end the process."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plmcc.data import sound
from plmcc.data.rows import load_rows, read_text, rows_by_file
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import load_recipe
from plmcc.vectors import load as load_vectors

pytestmark = pytest.mark.attack
DEEP = 50_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_deep_json_is_refused_before_it_ends_the_process(name: str, tmp_path: Path) -> None:
    text = '{"text": "w1"}\n{"text": ' + "[" * DEEP + "]" * DEEP + "}\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    code = "import sys; from plmcc.data.rows import load_rows; load_rows(sys.argv[1])"
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "it ended by a signal"
    assert "nested more than 200 levels deep" in done.stderr


def test_brackets_in_strings_are_no_levels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "[" * 1000}, {"text": '"' + "{" * 1000}, {"text": "\\[" * 300}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert load_rows(str(file)).texts() == [row["text"] for row in rows]
    hidden = json.dumps({"text": "]" * 1000})[:-1] + ', "x": ' + "[" * 300 + "]" * 300 + "}"
    file.write_text(hidden + "\n")
    with pytest.raises(PlmccError, match=r"rows.jsonl:1: error PLM301: .*200 levels"):
        load_rows(str(file))


@pytest.mark.parametrize("name", ["rows.txt.gz", "vectors.txt.gz", "rows.csv.gz"])
def test_a_file_that_unpacks_without_bound(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound, "_FREE", 2**20)
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"w " * 2**22))
    readers = (lambda: load_rows(str(file)), lambda: read_text(file), lambda: load_vectors(file))
    for read in readers:
        with pytest.raises(PlmccError, match="more than 200 times its size"):
            read()


def test_text_that_packs_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "_FREE", 2**10)
    file = tmp_path / "rows.txt.gz"
    lines = [f"a line with the number {number}" for number in range(5000)]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert load_rows(str(file)).texts() == lines


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_no_files(kind: str, tmp_path: Path) -> None:
    for name in ("rows.txt", "recipe.yaml", "vectors.txt"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(PlmccError, match="not a regular file"):
        load_rows(str(tmp_path / "rows.txt"))
    with pytest.raises(PlmccError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(PlmccError):
        load_vectors(tmp_path / "vectors.txt")


def test_the_rows_of_each_file_are_counted(tmp_path: Path) -> None:
    for name, count in (("data1.txt", 3), ("data[1].txt", 2), ("$HOME.txt", 4)):
        (tmp_path / name).write_text("w1 w2\n" * count)
    found = rows_by_file(str(tmp_path / "*.txt"))
    assert {Path(file).name: n for file, n in found.items()} == {
        "$HOME.txt": 4,
        "data1.txt": 3,
        "data[1].txt": 2,
    }
    assert len(load_rows(str(tmp_path / "*.txt"))) == 9
