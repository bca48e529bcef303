"""The console to which commands print their tables."""

from __future__ import annotations

import os

from rich.console import Console

#: Width if the output goes to a pipe or a file; Rich's 80 columns would cut wide tables.
FILE_COLUMNS = 200


def make_console(quiet: bool = False) -> Console:
    """Return a console with the terminal's width, or ``FILE_COLUMNS`` (or ``COLUMNS``) without a terminal.

    Args:
        quiet: print nothing, for processes other than the main one.
    """
    console = Console(quiet=quiet)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(quiet=quiet, width=FILE_COLUMNS)
