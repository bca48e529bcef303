"""How messages and tables list things, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice


def listed(items: Iterable[object], most: int = 8) -> str:
    """Return the items with commas between them; dots stand for those after the first ``most``."""
    first = list(islice(items, most + 1))
    return ", ".join(map(str, first[:most])) + (", ..." if len(first) > most else "")


def natural(text: object) -> list[tuple[float, str]]:
    """Return a sort key that puts run 10 after run 9, and 1.5 after 1.25."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(text))
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]
