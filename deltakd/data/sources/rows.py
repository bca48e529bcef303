"""A row of instruction data, and how to parse one from a record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

INSTRUCTION_KEYS = ("instruction", "question")
INPUT_KEYS = ("input", "context")
RESPONSE_KEYS = ("response", "output", "answer")
MESSAGE_ROLES = ("system", "user", "assistant")

_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One example: a task and its reference answers.

    Args:
        id: the row's number in its data set (0-based line number, counted over all sources).
        instruction: what is asked.
        input: what the instruction is about; may be empty.
        responses: the reference answers, best first; may be empty.
        prompt: a prompt to use verbatim, instead of instruction and input.
        messages: a conversation of {role, content} turns, instead of instruction, input and responses.
        category: the kind of task, if the data set gives one.
        where: the row's place (file:line), for error messages; no part of the row.
    """

    id: int
    instruction: str = ""
    input: str = ""
    responses: tuple[str, ...] = ()
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    category: str | None = None
    where: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """The row's number and, where it is known, its place, for error messages."""
        return f"row {self.id}" + (f" ({self.where})" if self.where else "")

    @property
    def question(self) -> str:
        """The instruction, the prompt, or a conversation's turns before its last answer, whichever the row has."""
        if self.messages is not None:
            return "\n\n".join(m["content"] for m in self.asked)
        return self.instruction if self.prompt is None else self.prompt

    @property
    def asked(self) -> tuple[dict[str, str], ...]:
        """Of a conversation, the turns before its last answer; all turns where there is none."""
        return before_last_answer(self.messages or ())

    @property
    def references(self) -> tuple[str, ...]:
        """The answers to score against; in a conversation, the last assistant turn."""
        if self.messages is None:
            return self.responses
        answers = [m["content"] for m in self.messages if m["role"] == "assistant"]
        return tuple(answers[-1:])

    @property
    def text(self) -> str:
        """The row as plain text (instruction, input, first response), for pre-training."""
        if self.messages is not None:
            return "\n".join(m["content"] for m in self.messages)
        if self.prompt is not None:
            return self.prompt + "".join(self.responses[:1])
        return "\n".join(part for part in (self.instruction, self.input, *self.responses[:1]) if part)


class RowError(ValueError):
    """A row that its template can't write out as it must be; says which, where it stands, and what to do."""


def before_last_answer(messages: Sequence[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """Return the turns before the last assistant turn; all turns where there is none."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return tuple(messages[: answers[-1]] if answers else messages)


def with_answer(row: Row, answer: str) -> Row:
    """Return the row with this answer as its only one.

    In a conversation, it replaces the last assistant turn; earlier turns stay, later ones are dropped.
    """
    if row.messages is None:
        return replace(row, responses=(answer,))
    return replace(row, messages=(*row.asked, {"role": "assistant", "content": answer}))


def row_record(row: Row) -> dict[str, Any]:
    """Return a record that ``parse_row`` turns back into this row.

    Its ``row_id`` is for people: readers number the lines of the file themselves.
    """
    record: dict[str, Any] = {"row_id": row.id}
    if row.category is not None:
        record["category"] = row.category
    if row.messages is not None:
        return record | {"messages": list(row.messages)}
    asked = {"instruction": row.instruction, "input": row.input} if row.prompt is None else {"prompt": row.prompt}
    return record | asked | {"output": row.responses[0] if len(row.responses) == 1 else list(row.responses)}


def parse_row(record: Mapping[str, Any], where: str, id: int, need_response: bool = True) -> Row:
    """Parse a record.

    Args:
        record: with instruction | question or prompt (verbatim; ignored beside an instruction), input | context, and
            response | output | answer (a string or a list of strings); or with messages.
        where: place of the record (file:line), for errors.
        id: the row's number.
        need_response: True if a record without an answer is an error.

    Raises:
        ValueError: a field is missing, empty, ambiguous or of the wrong type.
    """
    category = record.get("category")
    category = whole_characters(category, where, "category") if isinstance(category, str) else None
    if record.get("messages") is not None:
        _refuse_both(record, where)
        messages = _messages(record["messages"], where, need_response)
        return Row(id, messages=messages, category=category, where=where)
    instruction = _one_text(record, INSTRUCTION_KEYS, where)
    prompt = None if instruction else _one_text(record, ("prompt",), where)
    if not instruction and not prompt:
        raise ValueError(_missing(record, where, "instruction", (*INSTRUCTION_KEYS, "prompt", "messages")))
    responses = _responses(record, where)
    if need_response and not responses:
        raise ValueError(_missing(record, where, "response", (*RESPONSE_KEYS, "messages")))
    text = _one_text(record, INPUT_KEYS, where) if prompt is None else ""
    return Row(id, instruction, text, responses, prompt or None, None, category, where)


def unread_keys(record: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record, and of its messages (``messages[].key``), that hold something nobody reads."""
    if record.get("messages") is not None:
        found = [f"messages[].{key}" for turn in record["messages"] for key in _filled(turn)]
        known = ("messages", "messages[].role", "messages[].content")
        return [key for key in dict.fromkeys([*_filled(record), *found]) if key not in known]
    read = {*INSTRUCTION_KEYS, *RESPONSE_KEYS, "prompt"}
    if any(record.get(key) for key in INSTRUCTION_KEYS):
        read |= {*INPUT_KEYS}
    return [key for key in _filled(record) if key not in read]


def _filled(record: Mapping[str, Any]) -> list[str]:
    """Keys that hold something (0 and False are something), without those that are for people alone."""
    return [key for key in record if key not in ("category", "row_id") and record[key] not in (None, "", [], {})]


def _missing(record: Mapping[str, Any], where: str, what: str, allowed: Sequence[str]) -> str:
    found = ", ".join(sorted(map(str, record))) or "none"
    empty = [key for key in allowed if key in record]
    state = f"{what} is empty" if empty else f"no {what}"
    return f"{where}: {state}; keys found: {found}; give a non-empty one of: {', '.join(allowed)}"


def _one_text(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """Return the one non-blank text among ``keys``, or "" if there is none."""
    texts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} must be a string, got {type(text).__name__}")
        whole_characters(text, where, key)
    return _only({key: text for key, text in texts.items() if text.strip()}, where) or ""


def whole_characters(text: str, where: str, key: str) -> str:
    """Return the text.

    Raises:
        ValueError: it holds half of a surrogate pair, as a cut emoji leaves it: no tokenizer takes that.
    """
    half = _HALF.search(text)
    if half is not None:
        raise ValueError(f"{where}: {key} holds {half[0]!a}, half of a character; mend or remove the text")
    return text


def _only(values: Mapping[str, Any], where: str) -> Any:
    distinct = list(values.values())
    if any(value != distinct[0] for value in distinct):
        keys = " and ".join(values)
        raise ValueError(f"{where}: {keys} differ, and only one of them can be meant; remove the others")
    return distinct[0] if distinct else None


def _responses(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given: dict[str, tuple[str, ...]] = {}
    for key in RESPONSE_KEYS:
        value = record.get(key)
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            kind = type(value).__name__
            raise ValueError(f"{where}: {key} must be a string or a list of strings, got {kind}")
        given[key] = tuple(whole_characters(text, where, key) for text in texts if text.strip())
    return _only({key: texts for key, texts in given.items() if texts}, where) or ()


def _refuse_both(record: Mapping[str, Any], where: str) -> None:
    others = [key for key in INSTRUCTION_KEYS if record.get(key)]
    if others:
        raise ValueError(f"{where}: both messages and {others[0]} are given; keep one of them")


def _messages(value: Any, where: str, need_response: bool) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: messages must be a non-empty list of {{role, content}}, got {value!r:.80}")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise ValueError(f"{where}: messages[{number}] must be {{role, content}} with text, got {turn!r:.80}")
        if turn.get("role") not in MESSAGE_ROLES:
            allowed = ", ".join(MESSAGE_ROLES)
            raise ValueError(f"{where}: messages[{number}] has role {turn.get('role')!r}; allowed: {allowed}")
        if turn["role"] != "system" and not turn["content"].strip():
            raise ValueError(f"{where}: messages[{number}] ({turn['role']}) is empty")
        whole_characters(turn["content"], where, f"messages[{number}]")
        turns.append({"role": turn["role"], "content": turn["content"]})
    _check_order(turns, where, need_response)
    return tuple(turns)


def _check_order(turns: Sequence[Mapping[str, str]], where: str, need_response: bool) -> None:
    roles = [turn["role"] for turn in turns]
    if "user" not in roles:
        raise ValueError(f"{where}: messages have no user turn; roles found: {', '.join(roles)}")
    if "assistant" in roles and roles.index("assistant") < roles.index("user"):
        raise ValueError(f"{where}: the first assistant turn stands before the first user turn; remove it")
    if need_response and "assistant" not in roles:
        raise ValueError(f"{where}: messages have no assistant turn; roles found: {', '.join(roles)}")
