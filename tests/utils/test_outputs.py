"""Output directories: one process at a time, and nothing that is not plmcc's is replaced."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from plmcc.diagnostics import PlmccError
from plmcc.utils import outputs
from plmcc.utils.outputs import claim, free, replace_directory

pytestmark = pytest.mark.attack

HOLDER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from plmcc.utils.outputs import claim

    with claim(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
    """
)


def holder(target: Path) -> subprocess.Popen[str]:
    """Start a process that claims a directory until its stdin is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", HOLDER, target], text=True, **pipes)  # type: ignore[call-overload]
    assert child.stdout.readline() == "held\n"
    return child  # type: ignore[no-any-return]


def written(folder: Path, **files: str) -> Path:
    """Make a directory as plmcc leaves it: files, and a lock that names them."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "plmcc.lock.json").write_text(json.dumps({"files": dict.fromkeys(files, "")}))
    return folder


def replaced(target: Path, text: str) -> None:
    with replace_directory(target) as draft:
        (draft / "weights").write_text(text)
        (draft / "plmcc.lock.json").write_text(json.dumps({"files": {"weights": ""}}))


def test_a_second_process_is_refused_before_it_deletes_anything(tmp_path: Path) -> None:
    target = tmp_path / "out"
    draft = tmp_path / ".out.unfinished-of-the-first"
    draft.mkdir()
    child = holder(target)
    draft.mkdir(exist_ok=True)
    with pytest.raises(PlmccError, match="another run is writing this"), claim(target):
        pass
    assert draft.exists()
    child.communicate("")
    with claim(target):
        assert not draft.exists()
    assert not [*tmp_path.iterdir()]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = holder(tmp_path / "out")
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()
    with claim(tmp_path / "out"):
        pass


def test_a_claim_can_be_nested_in_a_thread_and_not_in_another(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with claim(tmp_path / "out"):
                pass
        except PlmccError as problem:
            refused.append(problem)

    with claim(tmp_path / "out"), claim(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other()
    assert len(refused) == 1


def test_a_name_with_the_characters_of_a_glob_is_a_name(tmp_path: Path) -> None:
    others = [tmp_path / f".{name}.unfinished-1" for name in ("a", "ow", "ow2")]
    for folder in others:
        folder.mkdir()
    for name in ("*", "ow*", "[o]w", "o?"):
        with claim(tmp_path / name):
            assert all(folder.exists() for folder in others)


@pytest.mark.parametrize(
    "stranger", ["notes.txt", "sub/notes.txt", "link", "linked/inside", ".env"]
)
def test_only_files_that_the_lock_names_are_replaced(stranger: str, tmp_path: Path) -> None:
    out = written(tmp_path / "out", weights="1")
    (tmp_path / "elsewhere").mkdir()
    if stranger == "link":
        (out / stranger).symlink_to(tmp_path / "elsewhere")
    elif stranger == "linked/inside":
        (out / "linked").symlink_to(tmp_path / "elsewhere")
        (out / stranger).write_text("mine")
        names = {"files": {"weights": "", stranger: ""}}  # as an attacker would write it
        (out / "plmcc.lock.json").write_text(json.dumps(names))
    else:
        (out / stranger).parent.mkdir(exist_ok=True)
        (out / stranger).write_text("mine")
    with pytest.raises(PlmccError) as caught:
        free(out, overwrite=True)
    assert stranger.removesuffix("/inside") in str(caught.value)
    assert "files that plmcc has not written" in str(caught.value)
    assert free(written(tmp_path / "other", weights="1"), overwrite=True)


def test_what_comes_in_while_a_run_lasts_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run() -> None:
        with replace_directory(out, check=lambda: free(out, False)):
            out.mkdir()
            (out / "mine").write_text("mine")

    with pytest.raises(PlmccError, match="was not written by this command"):
        run()
    assert (out / "mine").read_text() == "mine"
    assert not [*tmp_path.glob(".out*")]


def test_nothing_is_renamed_over_what_has_just_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = written(tmp_path / "out", mine="mine")
    monkeypatch.setattr(outputs, "is_occupied", lambda target: False)  # as if it came in after it
    with pytest.raises(OSError, match="not empty"):
        replaced(out, "2")
    assert (out / "mine").read_text() == "mine"


@pytest.mark.parametrize("at_once", [True, False])
def test_a_directory_is_replaced(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(outputs, "_exchange", lambda one, two: False)
    out = written(tmp_path / "out", old="1")
    replaced(out, "2")
    assert sorted(file.name for file in out.iterdir()) == ["plmcc.lock.json", "weights"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", a="1"), written(tmp_path / "two", b="2")
    assert outputs._exchange(one, two)
    assert (one / "b").exists()
    assert (two / "a").exists()
    assert not outputs._exchange(one, tmp_path / "missing")


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Where directories cannot be exchanged; both had hidden names, which the next run removed."""
    out = written(tmp_path / "out", weights="old")
    draft = written(tmp_path / ".out.unfinished-abc", weights="new")
    out.rename(draft.with_name(f"{draft.name}-replaced"))
    with claim(out):
        assert (out / "weights").read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_a_directory_is_refilled_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = written(tmp_path / "out", weights="old")
    monkeypatch.chdir(out)  # cannot be renamed
    draft = written(out / ".out.unfinished-abc", weights="new", table="new")
    (out / "plmcc.lock.json").unlink()
    (draft / "table").rename(out / "table")
    with claim(out):
        assert (out / "weights").read_text() == "new"
    assert sorted(file.name for file in out.iterdir()) == ["plmcc.lock.json", "table", "weights"]
