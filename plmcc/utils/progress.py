"""A progress bar on stderr, through rich; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """`with Progress("codes") as bar: bar.step("encode", 0.5)`: one line, one bar for each
    phase."""

    def __init__(self, title: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=sys.stderr)
        self._title = title
        self._bar = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._phase = self._bar.add_task(title, total=1.0)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def step(self, phase: str, fraction: float) -> None:
        """Show how far a phase is; `fraction` runs from 0 to 1."""
        self._bar.update(self._phase, description=f"{self._title}: {phase}", completed=fraction)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
