"""Progress of a run: on disk for ``deltakd.runs``, and on a display that several runs may share."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deltakd.io.files import write_text

log = logging.getLogger(__name__)

_TOTAL_STEPS = "total_steps"
#: Maximum characters of a bar's name, and room for its note: ``loss 0.2391  11,036 tokens/s``.
_NAME, _NOTE = 20, 29
#: Seconds between two drawings in a notebook, and the width of its bar.
_REDRAWN, _CELLS = 0.5, 30
#: Minimum seconds between two log lines, and the maximum if there is any progress.
_LOGGED = (5.0, 60.0)


class Display(Protocol):
    """Shows the progress of the current work, in place of a progress bar."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress.

        Args:
            what: the work, such as ``training``.
            done: the amount done.
            total: the total amount.
            note: extra text.
        """


_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Send all progress inside the context to ``display`` instead of bars."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def current_display() -> Display | None:
    """Return the display to report to; None: draw a bar."""
    return _display.get()


class Advance(Protocol):
    """Shows the progress of the work."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show progress; ``note`` is extra text, such as a loss; two spaces part its parts."""


@contextmanager
def progress_bar(description: str, total: int, shown: bool, *, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show progress: on the shared display, as a bar on a terminal, or in a notebook, else as lines of the log.

    Args:
        description: the work, for the reader.
        total: the total amount.
        shown: False: show nothing, except on a shared display.
        done: the amount done before.
        unit: the unit of counting, such as ``step``, for log lines.
    """
    display = current_display()
    if display is not None:
        yield lambda done, note="": display.progress(description, done, total, note)
        return
    console = Console()
    if not shown:
        yield lambda done, note="": None
    elif console.is_jupyter:
        yield _in_notebook(description, total)
    elif console.is_terminal:
        with _bar(console, description, total, done) as advance:
            yield advance
    else:
        yield _in_log(description, total, unit)


@contextmanager
def _bar(console: Console, description: str, total: int, done: int) -> Iterator[Advance]:
    """Draw a bar on one line of the terminal, however narrow."""
    name = description if len(description) <= _NAME else f"{description[: _NAME - 1]}…"
    # The line: name, bar, counts, time left and note, with a space between them.
    rest = len(name) + 2 * len(str(total)) + 1 + len("0:00:00") + _NOTE + 4
    columns = (
        TextColumn("{task.description}"),
        BarColumn(max(6, min(40, console.width - rest))),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", style="progress.download"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    for column in columns:
        column.get_table_column().no_wrap = True
    out, err = sys.stdout, sys.stderr
    with Progress(*columns, console=console) as progress:
        # Rich has replaced these streams with its own, so that log lines go above the bar.
        logging_to = {id(out): sys.stdout, id(err): sys.stderr}
        streams = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        before = [(handler, handler.stream) for handler in streams if id(handler.stream) in logging_to]
        for handler, stream in before:
            handler.setStream(logging_to[id(stream)])
        try:
            task = progress.add_task(name, total=total, completed=done, note="")
            yield lambda done, note="": progress.update(task, completed=done, note=note)
        finally:
            for handler, stream in before:
                handler.setStream(stream)


def _in_notebook(description: str, total: int) -> Advance:
    """Show a line below the cell that is written again as the work goes on; needs no widgets."""
    from IPython.display import display

    started = last = time.monotonic()
    handle = display({"text/plain": f"{description}: 0/{total}"}, raw=True, display_id=True)

    def advance(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _REDRAWN and done < total:
            return
        last = now
        filled = _CELLS * done // max(total, 1)
        bar = "━" * filled + "─" * (_CELLS - filled)
        left = (
            f"{_clock((now - started) / max(done, 1) * (total - done))} left" if done < total else _clock(now - started)
        )
        line = "  ".join(part for part in (description, bar, f"{done}/{total}", left, note) if part)
        handle.update({"text/plain": line}, raw=True)

    return advance


def _in_log(description: str, total: int, unit: str) -> Advance:
    """Log a line for each tenth of the work, at least one per minute; nothing if the work takes seconds."""
    started = last = time.monotonic()
    first: int | None = None
    tenth, counted = -1, f"{unit} " if unit else ""

    def advance(done: int, note: str = "") -> None:
        nonlocal last, tenth, first
        if first is None:
            first, tenth = done, 10 * done // max(total, 1)
        now, reached = time.monotonic(), 10 * done // max(total, 1)
        quiet = now - last
        if quiet < _LOGGED[0] or (reached == tenth and quiet < _LOGGED[1]):
            return
        last, tenth = now, reached
        speed = (done - first) / (now - started)
        parts = [f"{counted}{done:,} of {total:,}", *note.split("  ")]
        parts += [f"{_clock((total - done) / speed)} left"] if speed > 0 and done < total else []
        log.info("%s: %s", description, ", ".join(part for part in parts if part))

    return advance


def in_minutes(minutes: float) -> str:
    """Return ``about 3 minutes``, in words if it is one or less."""
    if minutes < 0.5:
        return "less than a minute"
    return "about 1 minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def write_total_steps(run_dir: Path, steps: int) -> None:
    """Store the total number of optimiser steps, which may not follow from the config."""
    write_text(run_dir / _TOTAL_STEPS, f"{steps}\n")


def read_total_steps(run_dir: Path) -> int | None:
    """Return the number stored by :func:`write_total_steps`; None if there is none."""
    file = run_dir / _TOTAL_STEPS
    return int(file.read_text(encoding="utf-8")) if file.is_file() else None
