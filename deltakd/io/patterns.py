"""Regular expressions that users write."""

from __future__ import annotations

import re


def pattern_problems(key: str, pattern: str | None) -> list[str]:
    """Return the problem with a config key's pattern: one sentence, or none."""
    try:
        re.compile(pattern or "")
    except (re.error, OverflowError, RecursionError) as error:
        return [f"{key} is {pattern!r}, which is not a regular expression: {error}"]
    return []
