"""Problems of a config, collected while its groups are built."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import final


@final
class Problems(list[str]):
    """Sentences that open with the key they are about, such as ``optim.lr is 0; it must be ...``.

    A value of the wrong type is omitted, so that the rest of its group can still be checked. Further problems of that
    group would be misleading; ``told`` omits them.

    Args:
        copies: keys with values copied from other keys.
    """

    def __init__(self, copies: Collection[str] = ()) -> None:
        super().__init__()
        self._copies = copies
        self._refused: frozenset[str] = frozenset()
        self._of_types: frozenset[str] = frozenset()

    def close_types(self) -> None:
        """End the type check: values named so far were omitted. A copied one is reported where it was given."""
        self._refused = frozenset(map(_key, self))
        given = {_value(problem) for problem in self if _key(problem) not in self._copies}
        self[:] = [p for p in self if _key(p) not in self._copies or _value(p) not in given]
        self._of_types = frozenset(self)

    def told(self) -> list[str]:
        """Return each problem once, without mere consequences of an omitted value."""
        return [p for p in dict.fromkeys(self) if p in self._of_types or not _names_any(p, self._refused)]


def _key(problem: str) -> str:
    return problem.partition(" ")[0]


def _value(problem: str) -> str:
    return problem.partition(" is ")[2].partition(";")[0]


def _names_any(problem: str, keys: Iterable[str]) -> bool:
    # A key without a dot, such as `name`, is also a word.
    return any("." in key and re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) for key in keys)
