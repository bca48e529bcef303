"""Marks that describe a config key beyond its type, where the key is defined.

A settings dataclass marks its fields by ``Annotated``::

    limit: Annotated[int | None, Ge(1), Resume.UNFINISHED, Cache.FREE] = None

and ``keys_with`` collects the keys with a mark, so that no other file lists key names.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

#: A seed that every library accepts: NumPy's legacy generator, which Lightning seeds, is limited to 32 bits.
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]


class Resume(Enum):
    """When a key may change on resume. A key without this mark never may change."""

    #: Always: it does not affect what is trained or measured.
    FREE = "free"
    #: Until the run is finished: it only affects the evaluation of the trained student or how the work is spread.
    UNFINISHED = "unfinished"


class Cache(Enum):
    """How a key of ``data`` relates to a cache of references. Without this mark it affects what the cache holds."""

    #: It affects neither a row's tokens nor the set that the row belongs to.
    FREE = "free"


class Method(Enum):
    """How a key relates to the methods that a report compares; without this or Resume.FREE it tells them apart."""

    #: Repeated on purpose (the seed), compared elsewhere (the evaluation), or without effect on what is trained.
    FREE = "free"


class Protocol(Enum):
    """How a key of ``evaluation`` relates to a published protocol."""

    #: The protocol fixes it; another value is recorded as a deviation.
    FIXED = "fixed"


def keys_with(kind: Any, mark: Enum, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields with ``mark``, nested dataclasses included.

    Args:
        kind: a dataclass, or a union, whose dataclasses count.
        mark: such as ``Resume.FREE``. A marked field covers everything below it.
        prefix: put before each key.
    """
    for dataclass in _dataclasses(kind):
        for name, hint in get_type_hints(dataclass, include_extras=True).items():
            if mark in marks(hint):
                yield prefix + name
            else:
                yield from keys_with(hint, mark, f"{prefix}{name}.")


def marks(hint: Any) -> tuple[Any, ...]:
    """Return the metadata that ``Annotated`` adds to a type."""
    return tuple(get_args(hint)[1:]) if get_origin(hint) is Annotated else ()


def _dataclasses(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return _dataclasses(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _dataclasses(part)]
    return [hint] if dataclasses.is_dataclass(hint) else []
