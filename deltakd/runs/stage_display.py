"""How a study shows its stages: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, final

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deltakd.callbacks import Stopped
from deltakd.runs.progress import shown_on

_STYLES = {"running": "bold", "waiting": "dim", "stopped": "yellow", "failed": "red"}


class Stages(Protocol):
    """What a study tells of its stages."""

    def start(self, name: str) -> None:
        """A stage begins."""

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        """A stage is done.

        Args:
            name: of the stage.
            outcome: the objective or another result, in a few words.
            seconds: what it took.
            before: whether an earlier start of the study did it.
        """


@final
class PlainStages:
    """Two lines a stage.

    Args:
        console: where they go.
        names: of all stages, in order.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console = console
        self._numbers = {name: f"[{i}/{len(names)}] {name}" for i, name in enumerate(names, 1)}

    def start(self, name: str) -> None:
        """See :class:`Stages`."""
        self.console.print(f"{self._numbers[name]} ...", markup=False)

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        """See :class:`Stages`."""
        done = "finished before" if before else f"{outcome}, {seconds:.0f} s"
        self.console.print(f"{self._numbers[name]}: {done}", markup=False)


@dataclass
class _Row:
    """A stage as the table shows it; times are of the table's clock, in seconds."""

    expected: float | None
    state: str = "waiting"
    what: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    started: float = 0.0
    seconds: float | None = None
    #: When the current work was first heard of, and how much of it was done then.
    heard: float = 0.0
    done_then: int = 0

    def left(self, now: float) -> float | None:
        """Seconds that the current work still takes at its speed so far."""
        if self.state != "running" or self.done <= self.done_then:
            return None
        return (now - self.heard) / (self.done - self.done_then) * (self.total - self.done)


@final
class StageTable:
    """The stages as a table that is drawn anew whenever it is looked at.

    Args:
        title: of the table.
        minutes: stage -> minutes that it is expected to take, or None; in order.
        clock: seconds.
    """

    def __init__(
        self, title: str, minutes: Mapping[str, float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.clock = clock
        self._rows = {name: _Row(expected) for name, expected in minutes.items()}
        self._current: _Row | None = None

    def start(self, name: str) -> None:
        """See :class:`Stages`."""
        self._current = self._rows[name]
        self._current.state, self._current.what, self._current.started = "running", "loading", self.clock()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """See :class:`deltakd.runs.progress.Display`."""
        row = self._current
        if row is None:
            return
        if row.what != what:
            row.what, row.heard, row.done_then = what, self.clock(), done
        row.done, row.total, row.note = done, total, note

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        """See :class:`Stages`."""
        row = self._rows[name]
        row.state, row.note, row.seconds = "finished before" if before else "finished", outcome, seconds
        self._current = None

    def end(self, state: str) -> None:
        """The stage that is running ends without a result."""
        if self._current is not None:
            self._current.state, self._current.seconds = state, self.clock() - self._current.started

    def __rich__(self) -> Table:
        """The table as it is now."""
        now = self.clock()
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("stage", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
        table.add_column("left", justify="right", no_wrap=True)
        table.add_column("minutes", justify="right", no_wrap=True)
        table.add_column("result", overflow="ellipsis", no_wrap=True)
        for name, row in self._rows.items():
            shown = row.what if row.state == "running" else row.state
            progress = f"{row.done}/{row.total}" if row.total and row.state in ("running", "stopped", "failed") else ""
            left = row.left(now)
            table.add_row(
                name,
                shown,
                progress,
                "" if left is None else _clock_time(left),
                _minutes(row, now),
                row.note,
                style=_STYLES.get(row.state),
            )
        return table


def _minutes(row: _Row, now: float) -> str:
    if row.seconds is not None:
        return f"{row.seconds / 60:.1f}"
    if row.state == "running":
        return f"{(now - row.started) / 60:.1f}"
    return "" if row.expected is None else f"~{row.expected:g}"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def stages_on(console: Console, title: str, minutes: Mapping[str, float | None]) -> Iterator[Stages]:
    """Show the stages of a study while they run.

    Args:
        console: on a terminal it shows one table, and what the stages' own bars would show goes into it.
        title: the study.
        minutes: stage -> expected minutes, in order.
    """
    if not console.is_terminal:
        yield PlainStages(console, list(minutes))
        return
    table = StageTable(title, minutes)
    with Live(table, console=console, refresh_per_second=4), shown_on(table):
        try:
            yield table
        except BaseException as error:
            table.end("stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed")
            raise
