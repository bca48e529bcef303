"""The home directory, which may not exist: containers run users that no database knows, without HOME."""

from __future__ import annotations

import os
from pathlib import Path


def home_directory() -> Path | None:
    """Return the user's home directory; None if neither HOME nor the user database has one."""
    # Not Path.home(), which raises there.
    found = os.path.expanduser("~")
    return None if found == "~" else Path(found)


def expanded(path: str | Path) -> Path:
    """Return the path with ``~`` and ``~user`` expanded.

    Raises:
        ValueError: the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path} is in a home directory, and this process has none (HOME is not set); give the whole path"
        ) from None
