"""The pieces of text that a row becomes, and who writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from deltakd.data.sources.rows import Message, Row, before_last_answer


@dataclass(frozen=True)
class Segment:
    """A piece of a row's text, which is tokenised as a whole.

    Args:
        text: the piece.
        trained: True if the model learns to write it.
        special_tokens: let the tokenizer add its special tokens (BOS), unless the text already starts with BOS.
        closed: append EOS, trained like the piece, unless the text already ends with it.
    """

    text: str
    trained: bool
    special_tokens: bool = False
    closed: bool = False


@runtime_checkable
class Template(Protocol):
    """Renders rows. Its ``repr`` is part of the key of cached tokens, so it must include everything that matters."""

    def render(self, row: Row) -> list[Segment]:
        """Return prompt and answer pieces in turn; just the prompt if the row has no answer."""
        ...

    def tail(self, row: Row) -> str:
        """Return the end of the prompt, which must survive when a prompt is cut; "" if it is not known."""
        ...

    def keeps_end(self, row: Row) -> bool:
        """True if a prompt that is too long loses its beginning, False if it loses what is before its tail."""
        ...


def conversation(row: Row) -> list[Message]:
    """Return the row as messages, without the turns after the last answer: there is nothing to learn from them."""
    if row.messages is not None:
        messages = list(row.messages)
        asked = before_last_answer(messages)
        return messages[: len(asked) + 1]
    question = "\n\n".join(part for part in (row.instruction, row.input) if part.strip())
    answer = [{"role": "assistant", "content": text} for text in row.responses[:1]]
    return [{"role": "user", "content": question}, *answer]


def without_spaces(text: str) -> str:
    """Return the text without white space, which templates add and strip."""
    return "".join(text.split())
