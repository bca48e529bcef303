"""What rows ask, as digests: which of two sets of rows have the same task, word for word."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltakd.data.sources.overlap import GENERIC_INPUTS, normal_form, task_texts
from deltakd.data.sources.rows import Row

if TYPE_CHECKING:
    pass


class Tasks(NamedTuple):
    """The tasks of rows. Of texts in normal form, 64 bits are kept: two of a million are taken for one with 3e-8.

    Args:
        instructions: [n] uint64, of the instructions.
        inputs: [n] uint64, of the inputs; in a conversation, of the turns before its last question.
        talks: [n] bool, true for conversations.
    """

    instructions: NDArray[np.uint64]
    inputs: NDArray[np.uint64]
    talks: NDArray[np.bool_]


def task_digests(rows: Sequence[Row]) -> Tasks:
    """Return what rows ask."""
    texts = [task_texts(row) for row in rows]
    instructions = np.frombuffer(b"".join(_digest(asked) for asked, _ in texts), np.uint64)
    inputs = np.frombuffer(b"".join(_digest(given) for _, given in texts), np.uint64)
    return Tasks(instructions, inputs, np.fromiter((row.messages is not None for row in rows), np.bool_, len(rows)))


def unlike(tasks: Tasks, banned: Tasks) -> NDArray[np.bool_]:
    """Return [n], true for the tasks that are not among ``banned``.

    Tasks are compared by instruction alone, in normal form (case folded, white space collapsed), because copies of a
    data set differ in the small print of the inputs. An instruction that occurs with more than
    ``overlap.GENERIC_INPUTS`` different inputs among all these tasks is compared together with its input. In a
    conversation, all turns before the last answer are compared.
    """
    if not len(banned.talks):
        return np.ones(len(tasks.talks), np.bool_)
    both = Tasks(*(np.concatenate(pair) for pair in zip(tasks, banned, strict=True)))
    pairs = _distinct_pairs(both.instructions, both.inputs)
    instructions, counts = np.unique(pairs[0], return_counts=True)
    generic = instructions[counts > GENERIC_INPUTS]
    whole = both.talks | np.isin(both.instructions, generic)
    given = np.where(whole, both.inputs, _EMPTY)
    order = np.lexsort((given, both.instructions))
    same = (np.diff(both.instructions[order]) == 0) & (np.diff(given[order]) == 0)
    groups = np.empty(len(order), np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(~same)])[: len(order)]
    count = len(tasks.talks)
    return ~np.isin(groups[:count], groups[count:])


def _distinct_pairs(one: NDArray[Any], other: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    order = np.lexsort((other, one))
    one, other = one[order], other[order]
    new = np.concatenate([np.ones(min(len(one), 1), np.bool_), (one[1:] != one[:-1]) | (other[1:] != other[:-1])])
    return one[new], other[new]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normal_form(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


_EMPTY = np.frombuffer(_digest(""), np.uint64)[0]
