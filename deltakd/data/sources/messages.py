"""Converts turns of a conversation to one form, from OpenAI's and ShareGPT's formats and Alpaca's histories."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from deltakd.data.sources.image_columns import IMAGE_PARTS
from deltakd.data.sources.rows import Message, is_answer, message_images

#: A role as data sets spell it -> its name in chat templates.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
#: ShareGPT's keys.
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: Keys of a turn that are read.
TURN_KEYS = (*_ROLE, *_CONTENT, *_REASONING, "tool_calls", "tool_call_id", "name", "weight")

#: Before the base64 of an image that a row holds itself.
DATA_URI = "data:image;base64,"
_DATA_URI = re.compile(r"data:image(/[\w.+-]+)?;base64,")
_HALF = re.compile("[\ud800-\udfff]")


def parse_messages(value: Any, where: str, key: str = "messages") -> list[Message]:
    """Return turns in the form of ``rows.Message``.

    Args:
        value: a non-empty list of turns, or the same as JSON text (CSV files have no lists).
        where: place of the record, for errors.
        key: the record's key for them.

    Raises:
        ValueError: a turn has an unknown role, no content, or parts that are not text.
    """
    value = from_json(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key} must be a non-empty list of {{role, content}}, got {value!r:.80}")
    return [_parse_turn(turn, f"{where}: {key}[{number}]") for number, turn in enumerate(value)]


def parse_history(value: Any, where: str) -> list[Message]:
    """Return the turns of Alpaca's ``history``, a list of [question, answer] pairs.

    Raises:
        ValueError: it is something else.
    """
    turns: list[Message] = []
    value = from_json(value)
    pairs = value if isinstance(value, list) else [value]
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(
                f"{where}: history[{number}] must be a pair of strings [question, answer], got {pair!r:.80}"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(_parse_turn({"role": role, "content": text}, f"{where}: history[{number}]"))
    return turns


def parse_tools(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Return a record's tools, or None if it has none.

    Raises:
        ValueError: they are no list of JSON objects.
    """
    value = from_json(value)
    if value in (None, "", [], {}):
        return None
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools must be a list of JSON objects, got {value!r:.80}")
    return tuple(_plain(tool, f"{where}: tools") for tool in tools)


def check_order(turns: Sequence[Message], where: str, need_response: bool) -> None:
    """Raise a ValueError if a conversation has no question, or no answer after it where one is needed."""
    roles = [turn["role"] for turn in turns]
    found = ", ".join(roles)
    if "user" not in roles:
        raise ValueError(f"{where}: messages have no user turn; roles found: {found}")
    if "assistant" in roles and roles.index("assistant") < roles.index("user"):
        raise ValueError(f"{where}: the first assistant turn comes before the first user turn; remove it")
    if need_response and "assistant" not in roles:
        raise ValueError(f"{where}: messages have no assistant turn; roles found: {found}")
    if (need_response or roles[-1] == "assistant") and not any(map(is_answer, turns)):
        raise ValueError(
            f"{where}: all assistant turns have weight 0, as those of a prompt have, and no answer follows"
        )


def whole_characters(text: str, where: str, key: str) -> str:
    """Return the text.

    Raises:
        ValueError: it holds half of a surrogate pair, as a cut emoji leaves it: no tokenizer takes that.
    """
    half = _HALF.search(text)
    if half is not None:
        raise ValueError(f"{where}: {key} holds {half[0]!a}, half of a character; fix or remove the text")
    return text


def holds_turns(value: Any) -> bool:
    """True for a list of turns, or its JSON text."""
    turns = from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return False
    return isinstance(value, list) or any(key in turns[0] for key in _ROLE)


def from_json(value: Any) -> Any:
    """Return a text parsed as JSON, if that gives a list or an object; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parse_turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} must be {{role, content}}, got {turn!r:.80}")
    given = _first(turn, _ROLE)
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"{place} has role {given!r:.80}; allowed: {', '.join(ROLES)}")
    content = _first(turn, _CONTENT)
    calls = turn.get("tool_calls") if role == "assistant" else None
    if given == "function_call":
        calls, content = _called(content, place), ""
    message: Message = {"role": role, "content": _content(content, bool(calls), place)}
    reasoning = _first(turn, _REASONING) if role == "assistant" else None
    if reasoning not in (None, ""):
        message["reasoning_content"] = _text(reasoning, place, "reasoning_content")
    if calls:
        message["tool_calls"] = _tool_calls(calls, place)
    for key in ("tool_call_id", "name"):
        if turn.get(key) not in (None, ""):
            message[key] = _text(turn[key], place, key)
    if role == "assistant" and _weight(turn.get("weight"), place) == 0:
        message["weight"] = 0
    if role != "user" and message_images(message):
        raise ValueError(f"{place} ({role}) holds an image; only user turns may")
    if role in ("user", "assistant") and not calls and not _filled(message["content"]):
        raise ValueError(f"{place} ({role}) is empty")
    return message


def _first(turn: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text(value: Any, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key} must be a string, got {value!r:.80}")
    return whole_characters(value, place, key)


def _content(value: Any, may_lack: bool, place: str) -> str | list[dict[str, str]]:
    if value is None and may_lack:
        return ""
    if isinstance(value, str):
        return whole_characters(value, place, "content")
    if not isinstance(value, list):
        raise ValueError(f"{place} must be {{role, content}} with text, got content {value!r:.80}")
    return [_part(part, place) for part in value]


def _part(part: Any, place: str) -> dict[str, str]:
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind in IMAGE_PARTS:
            return {"type": "image", "image": _image(part.get(IMAGE_PARTS[kind]), place)}
        if kind != "text":
            raise ValueError(f"{place} has a part of type {kind!r:.80}; text and image are read")
        part = part.get("text")
    return {"type": "text", "text": _text(part, place, "a part of content")}


def _image(value: Any, place: str) -> str:
    """Return an image as rows hold it: the path of a file, or a data URI."""
    if isinstance(value, dict):
        # The forms of Hugging Face data sets, and of OpenAI's messages.
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return DATA_URI + b64encode(value).decode()
    if isinstance(value, str):
        value = value.removeprefix("file://")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{place} has an image that is {value!r:.80}; give the path of a file, or the file's bytes as base64 after "
            f"{DATA_URI!r}"
        )
    if value.startswith("data:") and not _DATA_URI.match(value):
        raise ValueError(f"{place} has an image that begins with {value!r:.40}; its bytes must follow {DATA_URI!r}")
    if re.match("[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ValueError(
            f"{place} has an image at {value!r:.80}, and images are not fetched; download it, and give the path of the "
            "file"
        )
    return whole_characters(value, place, "an image")


def _filled(content: str | list[dict[str, str]]) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "image" or part["text"].strip() for part in content)


def _called(value: Any, place: str) -> list[Any]:
    """Return the calls of ShareGPT's function_call turn, whose value is JSON: {name, arguments}, or a list of them."""
    calls = from_json(value)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{place} (function_call) must hold a call as JSON, {{name, arguments}}, got {value!r:.80}")
    return calls


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    value = from_json(value)
    if not isinstance(value, list):
        raise ValueError(f"{place}: tool_calls must be a list, got {value!r:.80}")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place}: a tool call must be {{function: {{name, arguments}}}}, got {call!r:.80}")
        # OpenAI writes arguments as JSON text, chat templates want the object.
        arguments = from_json(function.get("arguments"))
        function = {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments}
        identity = {} if call.get("id") in (None, "") else {"id": _text(call["id"], place, "id of a tool call")}
        calls.append(identity | {"type": "function", "function": _plain(function, f"{place}: tool_calls")})
    return calls


def _weight(value: Any, place: str) -> int:
    if value is None or value == 1:
        return 1
    if isinstance(value, (bool, int, float)) and value == 0:
        return 0
    raise ValueError(f"{place} has weight {value!r:.80}; allowed: 0 (the turn is not trained), 1")


def _plain(value: Any, place: str) -> Any:
    """Return the value. Raise a ValueError if it contains anything that JSON can't represent."""
    if isinstance(value, dict):
        return {str(key): _plain(part, place) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, place) for part in value]
    if isinstance(value, str):
        return whole_characters(value, place, "a text")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"{place} must be JSON, got {type(value).__name__}")
