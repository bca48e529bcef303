"""Whether the text that a row trains holds its answers, and the ends of them."""

from __future__ import annotations

from collections.abc import Sequence

from deltakd.data.encoding.templates import Segment
from deltakd.data.sources.rows import Row, RowError, content_text, is_answer

#: So many characters of what is missing are shown.
_SHOWN = 60


def check_trained(row: Row, segments: Sequence[Segment]) -> None:
    """Raise a RowError unless each answer stands in the segment that trains it, and something ends it.

    White space does not count: templates strip it. Templates that read a message's content as a list of parts write
    nothing of a text, and some leave out reasoning; a model would learn to say nothing, or not to think.

    Args:
        row: with its answers.
        segments: what its template has written.
    """
    trained = [segment for segment in segments if segment.trained]
    answers = _answers(row)
    if len(trained) != len(answers):
        raise RowError(f"{row.label}: {len(answers)} answers, but the template trains {len(trained)}; {_REMEDY}")
    for answer, segment in zip(answers, trained, strict=True):
        _, found, after = _dense(segment.text).rpartition(_dense(answer))
        if not found:
            raise RowError(
                f"{row.label}: the template leaves out a part of the answer: {_missing(answer, segment.text)!r} is not "
                f"in what would be trained, {segment.text[:_SHOWN]!r}; {_REMEDY}"
            )
        if not after and not segment.closed:
            raise RowError(
                f"{row.label}: the template writes nothing after the answer {answer[:_SHOWN]!r} that ends the turn, so "
                f"the model would not learn to stop there; use rows with one answer, or another template"
            )


_REMEDY = (
    "take that part out of the data (reasoning in <think>, for instance), or use another template: "
    "data.template=alpaca, one of your own, or a tokenizer whose chat template writes the whole content of a message "
    "as plain text"
)


def _answers(row: Row) -> list[str]:
    if row.messages is None:
        return list(row.responses[:1])
    return [content_text(message) for message in row.messages if is_answer(message)]


def _dense(text: str) -> str:
    return "".join(text.split())


def _missing(answer: str, text: str) -> str:
    """The first line of the answer that is not in the text; the whole answer where each line by itself is."""
    there = _dense(text)
    lines = (line for line in answer.splitlines() if _dense(line) not in there)
    return next(lines, answer).strip()[:_SHOWN]
