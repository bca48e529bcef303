"""Check that a row's trained text contains its answers and their ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from deltakd.data.encoding.segments import Segment, without_spaces
from deltakd.data.sources.rows import Message, Row, RowError, content_text, is_answer

#: Number of characters shown of missing text.
_SHOWN = 60
#: Ends a block of reasoning.
_THOUGHT = "</think>"


def check_trained(row: Row, segments: Sequence[Segment]) -> None:
    """Raise a RowError unless each trained segment contains its answer, and something ends it.

    An answer is its content, its reasoning, and the names and arguments of its tool calls. White space does not count:
    templates strip it. Some templates leave out reasoning or calls; a model would learn not to think, or to say
    nothing.

    Args:
        row: the row, with its answers.
        segments: the row as its template renders it.
    """
    trained = [number for number, segment in enumerate(segments) if segment.trained]
    answers = _answers(row)
    if len(trained) != len(answers):
        raise RowError(f"{row.label}: {len(answers)} answers, but the template trains {len(trained)}; {_REMEDY}")
    for message, number in zip(answers, trained, strict=True):
        segment = segments[number]
        answer = content_text(message)
        # Most templates write an answer as it is.
        start = segment.text.rfind(answer) if answer else -1
        after = segment.text[start + len(answer) :].strip() if start >= 0 else _after(row, answer, segment)
        if not answer.strip() and not message.get("tool_calls"):
            raise RowError(f"{row.label}: an answer is empty, but for EOS; take the row out")
        if _THOUGHT in answer and segment.text.count(_THOUGHT) > answer.count(_THOUGHT):
            raise RowError(
                f"{row.label}: the template writes a block of reasoning before an answer that has one already, so the "
                f"model would learn two; give the reasoning as reasoning_content, or take {_THOUGHT} and what is "
                f"before it out of the answer"
            )
        if len(message) > 2:
            _check_other_keys(row, message, segment)
        if not after and not segment.closed:
            raise RowError(
                f"{row.label}: the template writes nothing after the answer {answer[:_SHOWN]!r} that ends the turn, so "
                f"the model would not learn to stop there; set data.split_turns=true, whose rows end with EOS, or use "
                f"another template"
            )


_REMEDY = (
    "take that part out of the data (reasoning in <think>, for instance), or use another template: "
    "data.template=alpaca, one of your own, or a tokenizer whose chat template writes the whole content of a message "
    "as plain text"
)


def _after(row: Row, answer: str, segment: Segment) -> str:
    """Return the text after the answer, ignoring white space."""
    there, wanted = without_spaces(segment.text), without_spaces(answer)
    if not wanted:
        return there
    _, found, after = there.rpartition(wanted)
    if not found:
        raise RowError(_left_out(row, "a part of the answer", _missing(answer, segment.text), segment))
    return after


def _check_other_keys(row: Row, message: Message, segment: Segment) -> None:
    there = without_spaces(segment.text)
    reasoning = message.get("reasoning_content") or ""
    if without_spaces(reasoning) not in there:
        raise RowError(_left_out(row, "reasoning_content", _missing(reasoning, segment.text), segment))
    for call in message.get("tool_calls") or ():
        for part in _leaves(call["function"]):
            # Templates write arguments either as JSON, whose strings have escapes, or verbatim.
            forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
            if not any(without_spaces(form) in there for form in forms):
                raise RowError(_left_out(row, "a part of tool_calls", part[:_SHOWN], segment))


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a call, without numbers and truth values, which templates spell differently."""
    if isinstance(value, str):
        try:
            held = json.loads(value) if value.lstrip()[:1] in ("{", "[") else value
        except ValueError:
            held = value
        if isinstance(held, str):
            yield held
        else:
            yield from _leaves(held)
    elif isinstance(value, dict):
        for held in value.values():
            yield from _leaves(held)
    elif isinstance(value, list):
        for held in value:
            yield from _leaves(held)


def _left_out(row: Row, what: str, missing: str, segment: Segment) -> str:
    return (
        f"{row.label}: the template leaves out {what}: {missing!r} is not in what would be trained, "
        f"{segment.text[:_SHOWN]!r}; {_REMEDY}"
    )


def _answers(row: Row) -> list[Message]:
    if row.messages is None:
        return [{"role": "assistant", "content": answer} for answer in row.responses[:1]]
    return [message for message in row.messages if is_answer(message)]


def _missing(answer: str, text: str) -> str:
    """Return the first line of the answer that is not in the text; the whole answer if every line is."""
    there = without_spaces(text)
    lines = (line for line in answer.splitlines() if without_spaces(line) not in there)
    return next(lines, answer).strip()[:_SHOWN]
