"""A row of instruction data: a task or a conversation, with its reference answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

#: One turn of a conversation. ``role`` is system, user, assistant or tool; ``content`` a text, or a list of parts
#: ``{"type": "text", "text": ...}`` and, in a user's turn, ``{"type": "image", "image": ...}``: the path of a file, or
#: a data URI with its bytes. It may also have ``reasoning_content`` (a text), ``tool_calls`` (a list of
#: ``{"type": "function", "function": {"name", "arguments"}}``, with an ``id`` where the data gives one),
#: ``tool_call_id``, ``name``, and ``weight``: 0 for an assistant turn that is read and not trained.
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One example: a task and its reference answers.

    Args:
        id: the row's number in its data set (0-based line number, counted over all sources).
        instruction: what is asked.
        input: what the instruction is about; may be empty.
        responses: the reference answers, best first; may be empty.
        prompt: a prompt to use verbatim, instead of instruction and input.
        messages: a conversation, instead of instruction, input and responses. It holds nothing but JSON.
        category: the kind of task, if the data set gives one.
        task: the task by which rows are scored separately, and routed to a pair of teachers (``model.routes``).
        where: the row's place (file:line), for error messages; not part of the row.
        tools: the functions that the model may call, as JSON schemas.
    """

    id: int
    instruction: str = ""
    input: str = ""
    responses: tuple[str, ...] = ()
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    category: str | None = None
    where: str = field(default="", compare=False)
    tools: tuple[dict[str, Any], ...] | None = None
    task: str | None = None

    @property
    def label(self) -> str:
        """The row's number and, if known, its place, for error messages."""
        return f"row {self.id}" + (f" ({self.where})" if self.where else "")

    @property
    def question(self) -> str:
        """The instruction, the prompt, or a conversation's turns before its last answer, whichever the row has."""
        if self.messages is not None:
            return "\n\n".join(map(message_text, self.asked))
        return self.instruction if self.prompt is None else self.prompt

    @property
    def asked(self) -> tuple[Message, ...]:
        """The turns before a conversation's last answer; all turns if it has no answer."""
        return before_last_answer(self.messages or ())

    @property
    def references(self) -> tuple[str, ...]:
        """The answers to score against; in a conversation, its last answer."""
        if self.messages is None:
            return self.responses
        answers = [message_text(message) for message in self.messages if is_answer(message)]
        return tuple(answers[-1:])

    @property
    def images(self) -> tuple[str, ...]:
        """The images of a conversation's turns before its last answer, in order."""
        return tuple(image for message in self.asked for image in message_images(message))

    @property
    def text(self) -> str:
        """The row as plain text (instruction, input, first response), for pre-training."""
        if self.messages is not None:
            return "\n".join(map(message_text, self.messages))
        if self.prompt is not None:
            return self.prompt + "".join(self.responses[:1])
        parts = (self.instruction, self.input, *self.responses[:1])
        return "\n".join(part.strip() for part in parts if part.strip())


class RowError(ValueError):
    """A row that its template can't render correctly; the message names the row, its place, and the remedy."""


def is_answer(message: Message) -> bool:
    """Return True for a turn that is trained and scored: the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def content_text(message: Message) -> str:
    """Return a turn's content as one text; parts follow each other without a space."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def message_images(message: Message) -> tuple[str, ...]:
    """Return the images of a turn, in order."""
    content = message["content"]
    return () if isinstance(content, str) else tuple(part["image"] for part in content if part["type"] == "image")


def message_text(message: Message) -> str:
    """Return a turn as plain text: names of its images, its content, then its tool calls, one line of JSON each.

    The reasoning is left out. Two turns with the same text and other images are not the same.
    """
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    images = [f"[image {image_name(image)}]" for image in message_images(message)]
    return "\n".join(part for part in (*images, content_text(message), *calls) if part)


def image_name(image: str) -> str:
    """Return the path of an image, or a digest of one that the row holds itself."""
    return hashlib.sha256(image.encode()).hexdigest()[:16] if image.startswith("data:") else image


def before_last_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the turns before the last answer; all turns if there is no answer."""
    answers = [number for number, message in enumerate(messages) if is_answer(message)]
    return tuple(messages[: answers[-1]] if answers else messages)


def with_answer(row: Row, answer: str) -> Row:
    """Return the row with this answer as its only one.

    In a conversation, it replaces the last answer; earlier turns stay, later ones are dropped. If the answer is
    unchanged, it keeps its reasoning and its calls.
    """
    if row.messages is None:
        return replace(row, responses=(answer,))
    if row.references == (answer,):
        return replace(row, messages=row.messages[: len(row.asked) + 1])
    return replace(row, messages=(*row.asked, {"role": "assistant", "content": answer}))


def row_record(row: Row) -> dict[str, Any]:
    """Return a record that ``parse_row`` turns back into this row.

    Its ``row_id`` is for people: readers number the lines of the file themselves.
    """
    record: dict[str, Any] = {"row_id": row.id}
    record |= {key: value for key in ("category", "task") if (value := getattr(row, key)) is not None}
    if row.tools is not None:
        record["tools"] = list(row.tools)
    if row.messages is not None:
        return record | {"messages": list(row.messages)}
    asked = {"instruction": row.instruction, "input": row.input} if row.prompt is None else {"prompt": row.prompt}
    return record | asked | {"output": row.responses[0] if len(row.responses) == 1 else list(row.responses)}
