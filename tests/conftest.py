"""Which tests `make check`, `make test` and `make test-all` run.

`tests/durations.json` holds the seconds of slow test functions, measured by `make durations`. A
function above `_SLOW` seconds, or with a shared fixture above `_SLOW_FIXTURE`, is marked `slow`
(not in `make check`). Cases of the contract beyond `_CORE` are marked `exhaustive` (only in `make
test-all`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plmcc.artifact import verify
from support.processes import run_module

_DURATIONS = Path(__file__).with_name("durations.json")
_SLOW, _SLOW_FIXTURE = 0.5, 2.0
_CORE = ("bert", "gpt2", "llama", "t5", "marian")
"""Architectures of the slow checks of the contract in `make test`: an encoder, a decoder with
`Conv1D`, one with shared key-value heads, two encoder-decoders with other norms and positions."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by how long they take."""
    known = {"calls": {}, "setups": {}}
    if _DURATIONS.exists():
        known = json.loads(_DURATIONS.read_text(encoding="utf-8"))
    calls, setups = known["calls"], known["setups"]
    slow = {
        fixture
        for item in items
        if setups.get(_name(item), 0.0) >= _SLOW_FIXTURE
        for fixture in _shared_fixtures(item)
    }
    for item in items:
        name = _name(item)
        if calls.get(name, 0.0) >= _SLOW or slow & _shared_fixtures(item):
            item.add_marker(pytest.mark.slow)
        if name.startswith("test_contract.py") and name in calls and not _is_core(item):
            item.add_marker(pytest.mark.exhaustive)
    _longest_first(items, calls, setups)


def _longest_first(
    items: list[pytest.Item], calls: dict[str, float], setups: dict[str, float]
) -> None:
    """Order the files by their seconds: two workers that take the longest first end together."""
    seconds: Counter[str] = Counter()
    for item in items:
        name = _name(item)
        file = name.partition("::")[0]
        seconds[file] += 0 if item.get_closest_marker("exhaustive") else calls.get(name, 0.05)
    for name, value in setups.items():
        seconds[name.partition("::")[0]] += value
    items.sort(key=lambda item: -seconds[_name(item).partition("::")[0]])


def _name(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0].removeprefix("tests/")


def _shared_fixtures(item: pytest.Item) -> set[tuple[str, str]]:
    """The file and the name of each fixture that is made once for several tests."""
    known: dict[str, Any] = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    return {
        (definitions[-1].baseid, name)
        for name, definitions in known.items()
        if definitions[-1].scope in ("module", "session") and definitions[-1].baseid.endswith(".py")
    }


@pytest.fixture(scope="session", autouse=True)
def processes_are_forked() -> Iterator[None]:
    """Let a server that has imported torch start the processes which prove artifacts."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "new_process", run_module)
        yield


def _is_core(item: pytest.Item) -> bool:
    """Return whether a case of the contract is of a core architecture in float32."""
    parts = item.nodeid.partition("[")[2].rstrip("]").split("-")
    return "bfloat16" not in parts and any(part in _CORE for part in parts)
