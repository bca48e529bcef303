"""The examples made from a row: one per response, or one per turn if turns are split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from deltakd.data.sources.rows import Row, is_answer


def examples(row: Row, split_turns: bool = False) -> Iterator[Row]:
    """Yield the rows to encode separately; all keep this row's id.

    A row with several responses becomes one row per response. With ``split_turns``, a conversation becomes one row per
    answer. Each ends with its answer; the answers before it are context and not trained.
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
    """Return the row with only the conversation's last answer trained."""
    answers = [number for number, message in enumerate(row.messages or ()) if is_answer(message)]
    read = set(answers[:-1])
    if row.messages is None or not read:
        return row
    turns = [turn | {"weight": 0} if number in read else turn for number, turn in enumerate(row.messages)]
    return replace(row, messages=tuple(turns))
