"""Digests of rows' tasks, to find rows of two sets with exactly the same task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltakd.data.sources.rows import Row, message_text

#: An instruction with more different inputs than this ("Summarise this text.") means nothing without its input.
GENERIC_INPUTS = 5

#: The Alpaca frame around instruction and input, in files that hold whole prompts.
_FRAME = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:", re.DOTALL)


def normal_form(text: str) -> str:
    """Fold case and collapse white space."""
    return " ".join(text.casefold().split())


def task_texts(row: Row) -> tuple[str, str]:
    """Return instruction and input, taken out of Alpaca's frame if the row holds a whole prompt in it.

    Of a conversation, return its last question, and all turns before it, the system prompt included.
    """
    if row.messages is not None:
        last = len(row.asked)
        while last and row.asked[last - 1]["role"] == "user":
            last -= 1
        asked, before = row.asked[last:], row.asked[:last]
        return "\n\n".join(map(message_text, asked)), "\n\n".join(map(message_text, before))
    framed = None if row.prompt is None else _FRAME.search(row.prompt)
    return (framed[1], framed[2] or "") if framed else (row.question, row.input)


class Tasks(NamedTuple):
    """The tasks of rows, as 64-bit hashes of normalised texts: among a million, a collision has probability 3e-8.

    Args:
        instructions: [n] uint64, of the instructions.
        inputs: [n] uint64, of the inputs; in a conversation, of the turns before its last question.
        talks: [n] bool, True for conversations.
    """

    instructions: NDArray[np.uint64]
    inputs: NDArray[np.uint64]
    talks: NDArray[np.bool_]


def task_digests(rows: Sequence[Row]) -> Tasks:
    texts = [task_texts(row) for row in rows]
    instructions = np.frombuffer(b"".join(_digest(asked) for asked, _ in texts), np.uint64)
    inputs = np.frombuffer(b"".join(_digest(given) for _, given in texts), np.uint64)
    return Tasks(instructions, inputs, np.fromiter((row.messages is not None for row in rows), np.bool_, len(rows)))


def unlike(tasks: Tasks, banned: Tasks) -> NDArray[np.bool_]:
    """Return [n], True for the tasks that are not among ``banned``.

    Tasks are compared only by instruction, in normal form (case folded, white space collapsed), because copies of a
    data set differ in the small print of the inputs. An instruction that occurs with more than
    ``GENERIC_INPUTS`` different inputs among all these tasks is compared together with its input. In a
    conversation, all turns before the last answer are compared.
    """
    if not len(banned.talks):
        return np.ones(len(tasks.talks), np.bool_)
    both = Tasks(*(np.concatenate(pair) for pair in zip(tasks, banned, strict=True)))
    whole = both.talks | np.isin(both.instructions, generic_instructions(both))
    given = np.where(whole, both.inputs, _EMPTY)
    order = np.lexsort((given, both.instructions))
    same = (np.diff(both.instructions[order]) == 0) & (np.diff(given[order]) == 0)
    groups = np.empty(len(order), np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(~same)])[: len(order)]
    count = len(tasks.talks)
    return ~np.isin(groups[:count], groups[count:])


def generic_instructions(tasks: Tasks) -> NDArray[np.uint64]:
    """Return the instructions that occur with more than GENERIC_INPUTS different inputs."""
    order = np.lexsort((tasks.inputs, tasks.instructions))
    asked, given = tasks.instructions[order], tasks.inputs[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (asked[1:] != asked[:-1]) | (given[1:] != given[:-1])
    instructions, counts = np.unique(asked[new], return_counts=True)
    return instructions[counts > GENERIC_INPUTS]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normal_form(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


_EMPTY = np.frombuffer(_digest(""), np.uint64)[0]
