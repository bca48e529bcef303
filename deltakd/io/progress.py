"""How far a run is: on disk for lists of runs, and on a display that several runs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from deltakd.io.run_directory import write_text

_TOTAL_STEPS = "total_steps"


class Display(Protocol):
    """What shows the progress of the work going on, in place of a bar of its own."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show it.

        Args:
            what: the work, such as ``training``.
            done: how much of it is done.
            total: how much there is.
            note: a few words more.
        """


_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Let all work inside report to ``display`` instead of drawing bars."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def current_display() -> Display | None:
    """Where to report; None: draw a bar."""
    return _display.get()


def write_total_steps(run_dir: Path, steps: int) -> None:
    """Keep how many optimiser steps the whole run has: a run that is under way knows it, its config may not."""
    write_text(run_dir / _TOTAL_STEPS, f"{steps}\n")


def read_total_steps(run_dir: Path) -> int | None:
    """What :func:`write_total_steps` kept; None where there is nothing."""
    file = run_dir / _TOTAL_STEPS
    return int(file.read_text(encoding="utf-8")) if file.is_file() else None
