"""Parses records in the usual formats of instruction data into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltakd.data.sources.image_columns import IMAGE_KEYS, holds_places, with_images
from deltakd.data.sources.messages import (
    TURN_KEYS,
    check_order,
    from_json,
    holds_turns,
    parse_history,
    parse_messages,
    parse_tools,
    whole_characters,
)
from deltakd.data.sources.rows import Message, Row, is_answer

INSTRUCTION_KEYS = ("instruction", "question")
INPUT_KEYS = ("input", "context")
RESPONSE_KEYS = ("response", "output", "answer", "completion", "chosen")
SYSTEM_KEYS = ("system", "system_prompt")
MESSAGE_KEYS = ("messages", "conversations", "conversation")
#: The column names that ``data.columns`` may map.
COLUMNS = (
    "instruction",
    "input",
    "response",
    "prompt",
    "messages",
    "system",
    "history",
    "tools",
    "category",
    "task",
    "text",
)


def parse_row(record: Mapping[str, Any], where: str, id: int, need_response: bool = True) -> Row:
    """Parse a record.

    Args:
        record: one of

            * instruction | question, with input | context, a system prompt (system | system_prompt) and a ``history``
              of [question, answer] pairs;
            * prompt, which is used verbatim, and ignored beside an instruction;
            * prompt as a list of messages;
            * messages, or ShareGPT's conversations, with or without ``system``;

            with an answer in response | output | answer | completion | chosen where it is not among the messages: a
            text, a list of texts, or, after a list of messages, a list of messages; and with ``tools``, and the images
            of messages in ``images`` or ``image``.
        where: place of the record (file:line), for errors.
        id: the row's number.
        need_response: True if a record without an answer is an error.

    Returns:
        The row. With a system prompt or a history it is a conversation.

    Raises:
        ValueError: a field is missing, empty, ambiguous or of the wrong type.
    """
    category, task = _label(record, "category", where), _label(record, "task", where)
    tools = parse_tools(record.get("tools"), where)
    _refuse_disliked(record, where)
    turns = _conversation(record, where)
    if turns is not None:
        turns = _with_system(turns, _one_text(record, SYSTEM_KEYS, where), where)
        check_order(turns, where, need_response)
        return Row(id, messages=tuple(turns), where=where, tools=tools, category=category, task=task)
    instruction = _one_text(record, INSTRUCTION_KEYS, where)
    prompt = None if instruction else _one_text(record, ("prompt",), where)
    if not instruction and not prompt:
        raise ValueError(_missing(record, where, "instruction", (*INSTRUCTION_KEYS, "prompt", *MESSAGE_KEYS)))
    responses = _responses(record, where)
    if need_response and not responses:
        raise ValueError(_missing(record, where, "response", (*RESPONSE_KEYS, *MESSAGE_KEYS)))
    if prompt:
        return Row(id, responses=responses, prompt=prompt, where=where, category=category, task=task)
    text = _one_text(record, INPUT_KEYS, where)
    system = _one_text(record, SYSTEM_KEYS, where)
    history = parse_history(record["history"], where) if record.get("history") else []
    if system or history:
        turns = _told(instruction, text, system, history, responses, where)
        return Row(id, messages=tuple(turns), where=where, tools=tools, category=category, task=task)
    return Row(id, instruction, text, responses, where=where, tools=tools, category=category, task=task)


def _label(record: Mapping[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return whole_characters(value, where, key) if isinstance(value, str) and value else None


def unread_keys(record: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record, and of its messages (``messages[].key``), with content that is never read."""
    turns = _turn_keys(record)
    if turns:
        read = {*turns, *SYSTEM_KEYS, "tools"}
        if any(record.get(key) for key in IMAGE_KEYS) and any(
            holds_places(from_json(record.get(key))) for key in turns
        ):
            read |= {*IMAGE_KEYS}
    elif any(record.get(key) for key in INSTRUCTION_KEYS):
        read = {*INSTRUCTION_KEYS, *INPUT_KEYS, *RESPONSE_KEYS, *SYSTEM_KEYS, "prompt", "history", "tools"}
    else:
        read = {*RESPONSE_KEYS, "prompt"}
    held = [(key, turn) for key in turns if isinstance(record.get(key), list) for turn in record[key]]
    inner = [f"{key}[].{name}" for key, turn in held if isinstance(turn, dict) for name in _filled(turn)]
    inner = [name for name in dict.fromkeys(inner) if name.partition("[].")[2] not in TURN_KEYS]
    return [key for key in _filled(record) if key not in read] + inner


def _turn_keys(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that hold a record's turns; () if it has no turns."""
    whole = tuple(key for key in MESSAGE_KEYS if record.get(key) is not None)
    if whole:
        return whole
    apart = holds_turns(record.get("prompt")) or holds_turns(record.get("chosen"))
    return ("prompt", *RESPONSE_KEYS) if apart else ()


def _conversation(record: Mapping[str, Any], where: str) -> list[Message] | None:
    """Return the turns of a record, or None if it has none."""
    keys = _turn_keys(record)
    if not keys:
        return None
    _refuse_both(record, keys, where)
    if keys[0] in MESSAGE_KEYS:
        found = {key: with_images(record, from_json(record[key]), where) for key in keys}
        turns: list[Message] = _only({key: parse_messages(value, where, key) for key, value in found.items()}, where)
        return turns
    prompt, answers = record.get("prompt"), _answer_turns(record, where)
    if holds_turns(prompt):
        # Data with a separate prompt expects only the completion to be trained, not the answers before it.
        prompt = with_images(record, from_json(prompt), where)
        asked = [turn | {"weight": 0} if is_answer(turn) else turn for turn in parse_messages(prompt, where, "prompt")]
        return asked + answers
    first = next((turn["content"] for turn in answers if turn["role"] == "user"), None)
    if first is None or prompt not in (None, "", first):
        raise ValueError(
            f"{where}: prompt is {'a string' if prompt else 'missing'}, and its answer a list of messages that does "
            f"not begin with it; write both as strings, or both as lists of messages"
        )
    return answers


def _answer_turns(record: Mapping[str, Any], where: str) -> list[Message]:
    given: dict[str, list[Message]] = {}
    for key in RESPONSE_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.strip() and not holds_turns(value):
            value = [{"role": "assistant", "content": value}]
        if value not in (None, "", []) and (not isinstance(value, str) or value.strip()):
            given[key] = parse_messages(value, where, key)
    return _only(given, where) or []


def _told(
    instruction: str, text: str, system: str, history: list[Message], responses: Sequence[str], where: str
) -> list[Message]:
    if len(responses) > 1:
        raise ValueError(f"{where}: a row with a system prompt or a history can have one answer, not {len(responses)}")
    question = "\n\n".join(part for part in (instruction, text) if part.strip())
    turns = [*history, {"role": "user", "content": question}]
    turns += [{"role": "assistant", "content": answer} for answer in responses]
    return _with_system(turns, system, where)


def _with_system(turns: list[Message], system: str, where: str) -> list[Message]:
    if not system:
        return turns
    if turns[0]["role"] == "system":
        if turns[0]["content"] != system:
            raise ValueError(f"{where}: system and the system turn differ; keep one of them")
        return turns
    return [{"role": "system", "content": system}, *turns]


def _refuse_disliked(record: Mapping[str, Any], where: str) -> None:
    if record.get("completion") is not None and record.get("label") is False:
        raise ValueError(
            f"{where}: label is false, so the completion is one to avoid; keep the others: append #label=True to the "
            f"name of the source"
        )
    if isinstance(record.get("chosen"), str) and not any(record.get(key) for key in (*INSTRUCTION_KEYS, "prompt")):
        raise ValueError(
            f"{where}: chosen is a string without a prompt, so question and answer can't be separated; give prompt and "
            f"chosen, or chosen as a list of messages"
        )


def _filled(record: Mapping[str, Any]) -> list[str]:
    """Return the keys with content (0 and False count), except those meant only for people."""
    about = ("category", "task", "row_id")
    return [key for key in record if key not in about and record[key] not in (None, "", [], {})]


def _missing(record: Mapping[str, Any], where: str, what: str, allowed: Sequence[str]) -> str:
    found = ", ".join(sorted(map(str, record))) or "none"
    empty = [key for key in allowed if key in record]
    state = f"{what} is empty" if empty else f"no {what}"
    hint = "" if empty else f"; or name its column: data.columns={{{what}: ...}}"
    if what == "instruction" and "text" in record:
        hint += "; or train on the texts as they are: data=text"
    return f"{where}: {state}; keys found: {found}; give a non-empty one of: {', '.join(allowed)}{hint}"


def _one_text(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """Return the one non-blank text among ``keys``, or "" if there is none."""
    texts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} must be a string, got {type(text).__name__}")
        whole_characters(text, where, key)
    return _only({key: text for key, text in texts.items() if text.strip()}, where) or ""


def _only(values: Mapping[str, Any], where: str) -> Any:
    distinct = list(values.values())
    if any(value != distinct[0] for value in distinct):
        keys = " and ".join(values)
        raise ValueError(f"{where}: {keys} differ, but they mean the same field; keep one")
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


def _refuse_both(record: Mapping[str, Any], turns: Sequence[str], where: str) -> None:
    others = [key for key in INSTRUCTION_KEYS if record.get(key)]
    if others:
        held = next(key for key in turns if record.get(key))
        raise ValueError(f"{where}: both {held} and {others[0]} are given; keep one of them")
