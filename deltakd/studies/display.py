"""How a study shows its stages: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, final

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deltakd.io.errors import Stopped
from deltakd.io.progress import in_minutes, shown_on

_STYLES = {"running": "bold", "waiting": "dim", "stopped": "yellow", "failed": "red"}


class Stages(Protocol):
    """Reports a study's runs, named ``<stage>`` or ``<stage>/<what varies>``."""

    def expect(self, minutes: Mapping[str, float | None]) -> None:
        """Change the expected minutes of some waiting runs; None: unknown."""

    def start(self, name: str) -> None:
        """Report that a run starts."""

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        """Report that a run is done.

        Args:
            name: of the run.
            outcome: the objective or another result, in a few words.
            seconds: its duration.
            before: True if it finished in an earlier start of the study.
        """

    def fail(self, name: str, problem: str, seconds: float) -> None:
        """Report that a run failed while others continue.

        Args:
            name: of the run.
            problem: the reason, in one line.
            seconds: what it took.
        """


@final
class PlainStages:
    """Prints two lines per run.

    Args:
        console: where they go.
        minutes: run -> expected minutes, or None; in order.
    """

    def __init__(self, console: Console, minutes: Mapping[str, float | None]) -> None:
        self.console = console
        self._numbers = {name: f"[{i}/{len(minutes)}] {name}" for i, name in enumerate(minutes, 1)}
        self._waiting = dict(minutes)

    def expect(self, minutes: Mapping[str, float | None]) -> None:
        self._waiting |= {name: each for name, each in minutes.items() if name in self._waiting}

    def start(self, name: str) -> None:
        self._say(f"{self._numbers[name]} ...")

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        self._waiting.pop(name)
        done = "finished before" if before else f"{outcome}, {seconds:.0f} s{self._left()}"
        self._say(f"{self._numbers[name]}: {done}")

    def fail(self, name: str, problem: str, seconds: float) -> None:
        self._waiting.pop(name)
        self._say(f"{self._numbers[name]}: failed after {seconds:.0f} s: {problem}")

    def _left(self) -> str:
        known = [minutes for minutes in self._waiting.values() if minutes is not None]
        return f"; {in_minutes(sum(known))} left" if known else ""

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Row:
    """A run as the table shows it; times are of the table's clock, in seconds."""

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
        """Return the seconds left for the current work at its speed so far."""
        if self.state != "running" or self.done <= self.done_then:
            return None
        return (now - self.heard) / (self.done - self.done_then) * (self.total - self.done)


@final
class StageTable:
    """The runs as a table, drawn anew on each refresh.

    A stage of many runs is one line until its first run starts and after its last ends.

    Args:
        title: title of the table.
        minutes: run -> expected minutes, or None; in order.
        clock: seconds.
    """

    def __init__(
        self, title: str, minutes: Mapping[str, float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.clock = clock
        self._rows = {name: _Row(expected) for name, expected in minutes.items()}
        self._current: _Row | None = None

    def expect(self, minutes: Mapping[str, float | None]) -> None:
        for name, expected in minutes.items():
            self._rows[name].expected = expected

    def start(self, name: str) -> None:
        self._current = self._rows[name]
        self._current.state, self._current.what, self._current.started = "running", "loading", self.clock()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        row = self._current
        if row is None:
            return
        if row.what != what:
            row.what, row.heard, row.done_then = what, self.clock(), done
        row.done, row.total, row.note = done, total, note

    def finish(self, name: str, outcome: str, seconds: float, before: bool = False) -> None:
        row = self._rows[name]
        row.state, row.note, row.seconds = "finished before" if before else "finished", outcome, seconds
        self._current = None

    def fail(self, name: str, problem: str, seconds: float) -> None:
        row = self._rows[name]
        row.state, row.note, row.seconds = "failed", problem, seconds
        self._current = None

    def end(self, state: str) -> None:
        if self._current is not None:
            self._current.state, self._current.seconds = state, self.clock() - self._current.started
            self._current = None

    def __rich__(self) -> Table:
        """Return the table as it is now."""
        now = self.clock()
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("stage", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
        table.add_column("left", justify="right", no_wrap=True)
        table.add_column("minutes", justify="right", no_wrap=True)
        table.add_column("result", overflow="ellipsis", no_wrap=True)
        for stage, named in groupby(self._rows.items(), lambda item: item[0].split("/")[0]):
            group = dict(named)
            if _folded(group):
                table.add_row(
                    *_summed(stage, list(group.values())), style=_STYLES.get(next(iter(group.values())).state)
                )
                continue
            for name, row in group.items():
                table.add_row(*_cells(name, row, now), style=_STYLES.get(row.state))
        left = self._minutes_left(now)
        table.caption, table.caption_justify = f"{in_minutes(left)} left" if left else None, "left"
        return table

    def _minutes_left(self, now: float) -> float:
        """Return the expected minutes of the waiting runs and the current one."""
        waiting = [row.expected or 0.0 for row in self._rows.values() if row.state == "waiting"]
        row = self._current
        going_on = 0.0 if row is None else max((row.expected or 0.0) - (now - row.started) / 60, 0.0)
        return sum(waiting) + going_on


def _cells(name: str, row: _Row, now: float) -> list[str]:
    shown = row.what if row.state == "running" else row.state
    progress = f"{row.done}/{row.total}" if row.total and row.state in ("running", "stopped", "failed") else ""
    left = row.left(now)
    return [name, shown, progress, "" if left is None else _clock_time(left), _minutes(row, now), row.note]


def _folded(group: Mapping[str, _Row]) -> bool:
    """True if a stage of many runs has not begun, or is done."""
    states = {row.state for row in group.values()}
    return len(group) > 1 and (states == {"waiting"} or states <= {"finished", "finished before"})


def _summed(stage: str, rows: Sequence[_Row]) -> list[str]:
    """Return the cells of a stage of many runs in one line."""
    waiting = rows[0].state == "waiting"
    expected = [row.expected for row in rows if row.expected is not None]
    minutes = f"~{sum(expected):.3g}" if waiting and expected else ""
    if not waiting:
        minutes = f"{sum(row.seconds or 0.0 for row in rows) / 60:.1f}"
    state = rows[0].state if len({row.state for row in rows}) == 1 else "finished"
    return [f"{stage} ({len(rows)} runs)", state, "", "", minutes, ""]


def _minutes(row: _Row, now: float) -> str:
    if row.seconds is not None:
        return f"{row.seconds / 60:.1f}"
    if row.state == "running":
        return f"{(now - row.started) / 60:.1f}"
    return "" if row.expected is None else f"~{row.expected:.3g}"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def stages_on(console: Console, title: str, minutes: Mapping[str, float | None]) -> Iterator[Stages]:
    """Show the runs of a study while it runs.

    Args:
        console: on a terminal it shows one table, which includes the progress of the stages' own bars.
        title: the study.
        minutes: run -> expected minutes, in order.
    """
    if not console.is_terminal:
        yield PlainStages(console, minutes)
        return
    table = StageTable(title, minutes)
    with Live(table, console=console, refresh_per_second=4), shown_on(table):
        try:
            yield table
        except BaseException as error:
            table.end("stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed")
            raise
