"""The console that commands print their tables to."""

from __future__ import annotations

import os

from rich.console import Console

#: Columns where the output goes to a pipe or a file; Rich takes 80 there, which cuts wide tables.
FILE_COLUMNS = 200


def make_console(quiet: bool = False) -> Console:
    """Return a console of the terminal's width; of ``FILE_COLUMNS`` (or ``COLUMNS``) where there is no terminal.

    Args:
        quiet: print nothing, for processes other than the main one.
    """
    console = Console(quiet=quiet)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(quiet=quiet, width=FILE_COLUMNS)
