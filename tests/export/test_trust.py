"""Compiled programs of somebody else are not run unasked, and no directory of a model is one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import plmcc
from plmcc.artifact.lock import digest
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.export import manifest as exports
from plmcc.export.manifest import MANIFEST, Manifest, is_export

pytestmark = pytest.mark.attack


def foreign(folder: Path, **changes: Any) -> Path:
    """An export that somebody else has made: consistent in itself, its program a trap."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encode.pt2").write_bytes(b"native code")
    values: dict[str, Any] = asdict(
        Manifest(
            kind="translation",
            target="aoti",
            name="model",
            architecture="MarianMTModel",
            source={},
            inputs=[{"name": "input_ids", "dtype": "int64", "shape": ["b", "l"], "values": 9}],
            outputs=[],
            dimensions={"batch": [1, None], "length": [1, 9]},
            int8=False,
            device="cpu",
            cpu=torch.backends.cpu.get_cpu_capability(),
            versions={"torch": torch.__version__},
            files={"encode.pt2": digest(folder / "encode.pt2")},
            translation={"shapes": [], "steps": [], "search": {}},
        )
    )
    values |= {"plmcc_export": exports.FORMAT} | changes
    (folder / MANIFEST).write_text(json.dumps(values))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "_REMEMBERED", str(tmp_path / "home"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that are opened, none of which is run."""
    found: list[str] = []

    def search(folder: Path, known: Any) -> object:
        found.append(str(folder))
        return object()

    monkeypatch.setattr("plmcc.export.exported.ExportedSearch", search)
    return found


def test_programs_from_elsewhere_are_run_only_when_trusted(
    tmp_path: Path, opened: list[str]
) -> None:
    folder = foreign(tmp_path / "export")
    with pytest.raises(
        PlmccError, match="native code, and were not compiled here by you"
    ) as caught:
        plmcc.Exported(folder)
    assert "--trust-programs" in str(caught.value)
    assert not opened
    plmcc.Exported(folder, trust_programs=True)
    assert opened == [str(folder)]
    done = CliRunner().invoke(app, ["translate", str(folder)], input="w1\n")
    assert done.exit_code != 0
    assert "not compiled here by you" in str(done.exception)
    assert opened == [str(folder)]


def test_what_this_user_has_written_is_run(tmp_path: Path, opened: list[str]) -> None:
    folder = foreign(tmp_path / "export")
    Manifest.read(folder).write(folder)
    plmcc.Exported(folder)
    assert opened
    (folder / "encode.pt2").write_bytes(b"something else")
    with pytest.raises(PlmccError, match="the file was changed"):
        plmcc.Exported(folder)


@pytest.mark.parametrize("files", [{}, None])
def test_a_program_that_nothing_names_is_refused(
    tmp_path: Path, files: Any, opened: list[str]
) -> None:
    """Without its digest a program could be any."""
    folder = foreign(tmp_path / "export", files=files)
    with pytest.raises(PlmccError, match="the manifest does not name this program"):
        plmcc.Exported(folder, trust_programs=True)
    folder = foreign(tmp_path / "other")
    (folder / "inside").mkdir()
    (folder / "inside/more.so").write_bytes(b"x")
    with pytest.raises(PlmccError, match="does not name this program"):
        plmcc.Exported(folder, trust_programs=True)
    assert not opened


WRONG: dict[str, Any] = {
    "inputs as a number": {"inputs": 5},
    "no inputs": {"inputs": []},
    "inputs without names": {"inputs": [{"values": 9}]},
    "no versions": {"versions": {}},
    "versions as a list": {"versions": ["2"]},
    "no length": {"dimensions": {}},
    "a length with three ends": {"dimensions": {"length": [1, 2, 3]}},
    "a file outside": {"files": {"../encode.pt2": "0"}},
    "an absolute file": {"files": {"/etc/passwd": "0"}},
    "digests as a list": {"files": ["encode.pt2"]},
    "a kind that is none": {"kind": "pipeline"},
    "no search": {"translation": None},
    "a step that is a path": {"translation": {"shapes": [], "search": {}, "steps": ["/../../x"]}},
    "shapes of three": {"translation": {"shapes": [[1, 2, 3]], "search": {}, "steps": []}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_makes_no_sense_is_a_sentence(
    name: str, tmp_path: Path, opened: list[str]
) -> None:
    folder = foreign(tmp_path / "export", **WRONG[name])
    with pytest.raises(PlmccError, match="makes no sense"):
        plmcc.Exported(folder, trust_programs=True)
    assert not opened


def test_settings_of_a_search_that_make_no_sense_are_a_sentence(tmp_path: Path) -> None:
    values = {"shapes": [], "steps": [], "search": {"eos": 5}}
    folder = foreign(tmp_path / "export", translation=values)
    with pytest.raises(PlmccError, match="the settings of the search make no sense"):
        plmcc.Exported(folder, trust_programs=True)


def test_a_directory_of_a_model_is_no_export(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "export")
    assert is_export(folder)
    (folder / "config.json").write_text("{}")
    assert not is_export(folder)


def test_a_home_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(exports, "_REMEMBERED", str(tmp_path / "file/exports"))
    folder = foreign(tmp_path / "export")
    Manifest.read(folder).write(folder)
    with pytest.raises(PlmccError, match="not compiled here"):
        plmcc.Exported(folder)
