"""Removes home directories and secrets from everything that leaves this machine (W&B, model cards)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from deltakd.io.home import home_directory

#: Environment variables whose values are never written.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
#: Shorter values would match innocent text.
_SHORTEST_SECRET = 8
_HIDDEN = "***"


def redacted(value: Any) -> Any:
    """Return a copy whose texts have ``~`` for the home directory and ``***`` for secrets.

    Secrets are the values of environment variables whose names end in KEY, TOKEN, SECRET, PASSWORD or similar (if at
    least 8 characters long), and the user part of URLs.

    Args:
        value: text, or lists, tuples (returned as lists) and dicts (keys, too); other values are returned unchanged.
    """
    return _apply(value, _home_pattern(), _secrets())


def _apply(value: Any, home: re.Pattern[str] | None, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {_apply(k, home, secrets): _apply(v, home, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_apply(item, home, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, _HIDDEN)
    value = re.sub(r"(?<=://)[^/@\s]+@", f"{_HIDDEN}@", value)
    return value if home is None else home.sub("~", value)


def _home_pattern() -> re.Pattern[str] | None:
    """Return a pattern of the home directory, as written and as resolved, that matches whole path components only."""
    home = home_directory()
    if home is None:
        return None
    places = {str(place) for place in (home, home.resolve()) if place != Path(place.anchor)}
    if not places:
        return None
    names = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.compile(rf"(?<![\w.~/-])(?:{names})(?![\w.-])")


def _secrets() -> list[str]:
    found = {v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= _SHORTEST_SECRET}
    # Longest first: if one secret contains another, part of it would remain.
    return sorted(found, key=len, reverse=True)
