"""Progress of a run: on disk for ``deltakd.runs``, and on a display that several runs may share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltakd.io.files import write_text

_TOTAL_STEPS = "total_steps"


class Display(Protocol):
    """Shows the progress of the current work, in place of a progress bar."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress.

        Args:
            what: the work, such as ``training``.
            done: how much is done.
            total: how much there is.
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


@contextmanager
def progress_bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, or report to the shared display if there is one.

    Yields a function to call with the amount done so far.
    """
    display = current_display()
    if display is not None:
        yield lambda done: display.progress(description, done, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def write_total_steps(run_dir: Path, steps: int) -> None:
    """Store the total number of optimiser steps: the config alone may not tell it."""
    write_text(run_dir / _TOTAL_STEPS, f"{steps}\n")


def read_total_steps(run_dir: Path) -> int | None:
    """Return what :func:`write_total_steps` stored; None if nothing was."""
    file = run_dir / _TOTAL_STEPS
    return int(file.read_text(encoding="utf-8")) if file.is_file() else None
