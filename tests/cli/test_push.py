"""`plmcc push`, against a server of this process that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

import plmcc
from plmcc.cli.app import app
from plmcc.diagnostics import PlmccError
from plmcc.recipe.load import parse_recipe
from support.tiny_models import tiny
from support.tokenizers import words

RECIPE = "plmcc: 1\npasses: [compositional_codes: {codebooks: 4, codewords: 8, rounds: 0}]\n"


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload of small files."""

    created: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        """Create a repository, choose how files are sent, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers.get("Authorization") != "Bearer right":
            self._answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            named = [{"path": f["path"], "uploadMode": "regular"} for f in asked]
            self._answer({"files": [one | {"shouldIgnore": False} for one in named]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files.update(one["value"]["path"] for one in lines if one["key"] == "file")
            url = f"http://{self.headers['Host']}/me/small/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._answer({})

    def do_GET(self) -> None:
        """Say that there is nothing yet."""
        self._answer({"siblings": [], "id": "me/small", "sha": "0" * 40})

    def _answer(self, values: dict[str, Any], code: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    tiny("bert").save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    plmcc.apply(parse_recipe(RECIPE, load_torch=True), folder / "model", folder / "small")
    return folder / "small"


def push(endpoint: str, folder: Path, *arguments: str, token: str = "right") -> Any:
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "plmcc.cli", "push", str(folder), *arguments]
    environment = os.environ | settings
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_verified_artifact_is_uploaded_whole(endpoint: str, small: Path) -> None:
    done = push(endpoint, small, "me/small", "--private")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    (created,) = Hub.created
    assert created["name"] == "small"
    assert created.get("private") or created.get("visibility") == "private"
    assert Hub.files == {str(f.relative_to(small)) for f in small.rglob("*") if f.is_file()}


def test_a_changed_artifact_is_not_uploaded(endpoint: str, small: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in small.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "config.json").write_text((small / "config.json").read_text() + " ")
    before = len(Hub.created)
    done = push(endpoint, copied, "me/other")
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(Hub.created) == before


def test_a_refused_upload_is_one_paragraph(endpoint: str, small: Path) -> None:
    done = push(endpoint, small, "me/small", token="wrong")
    assert done.returncode == 1
    assert "the upload failed" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_are_checked_first(small: Path, tmp_path: Path) -> None:
    for given, said in (
        ([str(small), "a/b/c"], "OWNER/NAME"),
        ([str(tmp_path / "nowhere"), "me/small"], "does not exist"),
    ):
        done = CliRunner().invoke(app, ["push", *given])
        assert isinstance(done.exception, PlmccError)
        assert said in done.exception.render()
