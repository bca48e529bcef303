"""How messages to the user list things."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


def listed(items: Iterable[object], most: int = 8) -> str:
    """Return the items with commas between them; dots stand for those after the first ``most``."""
    first = list(islice(items, most + 1))
    return ", ".join(map(str, first[:most])) + (", ..." if len(first) > most else "")
