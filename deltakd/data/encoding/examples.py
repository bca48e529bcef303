"""The examples that a row makes: one a response, and one a turn where turns are split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from deltakd.data.sources.rows import Row, is_answer


def examples(row: Row, split_turns: bool = False) -> Iterator[Row]:
    """Yield the rows, all under this row's id, that are each encoded by itself.

    A row of several responses is one with each. With ``split_turns``, a conversation is one row for each of its
    answers, which ends with that answer, and reads the answers before it without training them.
    """
    if row.messages is None:
        yield from (replace(row, responses=(response,)) for response in row.responses) if row.responses[1:] else (row,)
        return
    answers = [number for number, message in enumerate(row.messages) if is_answer(message)]
    if not split_turns or len(answers) < 2:
        yield row
        return
    for number in answers:
        yield only_last_answer(replace(row, messages=row.messages[: number + 1]))


def only_last_answer(row: Row) -> Row:
    """Return the row with a conversation's last answer as the only one that is trained."""
    answers = [number for number, message in enumerate(row.messages or ()) if is_answer(message)]
    read = set(answers[:-1])
    if row.messages is None or not read:
        return row
    turns = [turn | {"weight": 0} if number in read else turn for number, turn in enumerate(row.messages)]
    return replace(row, messages=tuple(turns))
