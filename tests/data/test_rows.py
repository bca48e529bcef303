from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from deltakd.data.sources.parsing import parse_row, unread_keys
from deltakd.data.sources.rows import Row, row_record, with_answer

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
WRONG = ANSWER | {"weight": 0}
SYSTEM = {"role": "system", "content": "s"}
C = {"role": "assistant", "content": "c"}
#: A function, a call of it as OpenAI writes it (arguments are a text), and in the form of a row.
SUM = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
ASKED_CALL = {"id": "1", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
CALL = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "sum"}


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            Row(3, "a", "b", ("c",), category="d"),
        ),
        ({"question": "a", "answer": "c"}, Row(3, "a", "", ("c",))),
        ({"question": "a", "answer": "c", "category": 0, "task": 7}, Row(3, "a", "", ("c",), category="0", task="7")),
        ({"question": "a", "answer": "c", "category": True, "task": ["x"]}, Row(3, "a", "", ("c",))),
        ({"instruction": "a", "input": "", "output": ["c", "d", " "]}, Row(3, "a", "", ("c", "d"))),
        ({"prompt": "P:", "output": "c"}, Row(3, responses=("c",), prompt="P:")),
        ({"prompt": "P:", "instruction": "a", "output": "c"}, Row(3, "a", "", ("c",))),
        ({"prompt": "P:", "completion": "c"}, Row(3, responses=("c",), prompt="P:")),
        ({"prompt": "P:", "chosen": "c", "rejected": "d"}, Row(3, responses=("c",), prompt="P:")),
        ({"prompt": [USER], "completion": [ANSWER]}, Row(3, messages=(USER, ANSWER))),
        ({"prompt": [USER, ANSWER, USER], "completion": "c"}, Row(3, messages=(USER, WRONG, USER, C))),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, C]}, Row(3, messages=(USER, ANSWER))),
        ({"system_prompt": "s", "question": "hi", "response": "yo"}, Row(3, messages=(SYSTEM, USER, ANSWER))),
        (
            {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["hi", "yo"]]},
            Row(3, messages=(SYSTEM, USER, ANSWER, {"role": "user", "content": "a\n\nb"}, C)),
        ),
        ({"instruction": "a", "output": "c", "system": "", "history": []}, Row(3, "a", "", ("c",))),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "s"},
            Row(3, messages=(SYSTEM, USER, ANSWER)),
        ),
        ({"messages": json.dumps([USER, ANSWER])}, Row(3, messages=(USER, ANSWER))),
        ({"prompt": "x", "messages": [USER, ANSWER]}, Row(3, messages=(USER, ANSWER))),
        ({"instruction": "a", "response": "c", "answer": "c", "output": None}, Row(3, "a", "", ("c",))),
    ],
)
def test_accepted_records(record: dict, row: Row) -> None:
    assert parse_row(record, "f:4", 3, True) == row
    assert parse_row(row_record(row), "f:4", 3, True) == row
    assert row_record(row)["row_id"] == 3


def test_a_row_with_another_answer() -> None:
    assert with_answer(Row(0, "a", "b", ("c", "d")), "e") == Row(0, "a", "b", ("e",))
    assert with_answer(Row(0, prompt="P:", responses=("c",)), "e") == Row(0, prompt="P:", responses=("e",))
    new = {"role": "assistant", "content": "new"}
    talk = Row(0, messages=(USER, ANSWER, USER, ANSWER, USER))
    assert with_answer(talk, "new").messages == (USER, ANSWER, USER, new)
    assert with_answer(Row(0, messages=(USER,)), "new").messages == (USER, new)
    thought = ANSWER | {"reasoning_content": "think", "tool_calls": [CALL]}
    held = Row(0, messages=(USER, thought, USER))
    assert with_answer(held, held.references[0]).messages == (USER, thought)
    assert with_answer(held, "new").messages == (USER, new)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            r"f:4: no instruction; keys found: text; give a non-empty one of: instruction, question, prompt",
        ),
        ({"instruction": " ", "output": "c"}, r"f:4: instruction is empty"),
        (
            {"instruction": "a"},
            r"f:4: no response; keys found: instruction; .* response, output, answer, completion, chosen, messages",
        ),
        ({"instruction": "a", "output": []}, r"f:4: response is empty"),
        ({"instruction": "a", "output": {"x": 1}}, r"f:4: output must be a string or a list of strings, got dict"),
        ({"instruction": 5, "output": "c"}, r"f:4: instruction must be a string, got int"),
        ({"instruction": "a", "question": "b", "output": "c"}, r"f:4: instruction and question differ"),
        ({"instruction": "a", "output": "c", "answer": "d"}, r"f:4: output and answer differ"),
        ({"instruction": "a", "messages": [USER, ANSWER]}, r"f:4: both messages and instruction are given"),
        ({"messages": []}, r"messages must be a non-empty list"),
        ({"messages": [USER]}, r"f:4: messages have no assistant turn; roles found: user"),
        ({"messages": [ANSWER]}, r"no user turn"),
        ({"messages": [ANSWER, USER, ANSWER]}, r"the first assistant turn comes before the first user turn"),
        ({"messages": [{"role": "sage", "content": "x"}]}, r"role 'sage'; allowed: system, developer, user"),
        ({"messages": [USER, WRONG]}, r"f:4: all assistant turns have weight 0"),
        ({"prompt": [USER, ANSWER]}, r"f:4: all assistant turns have weight 0, as those of a prompt have"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, r"messages\[1\] has weight 0.5; allowed: 0 .*, 1"),
        (
            {"messages": [USER, {"role": "tool", "content": [{"type": "video"}]}]},
            r"part of type .video.; text and image are read",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": [{"type": "image", "image": "a.png"}]}]},
            r"only user turns may",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, r"messages\[1\]: a tool call must be"),
        ({"messages": [USER, ANSWER], "tools": "sum"}, r"f:4: tools must be a list of JSON objects, got 'sum'"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "t"}, r"system and the system turn differ"),
        ({"conversations": [{"from": "function_call", "value": "sum"}]}, r"\(function_call\) must hold a call as JSON"),
        (
            {"conversations": [{"from": "human"}]},
            r"conversations\[0\] must be {role, content} with text, got content None",
        ),
        ({"instruction": "a", "output": "c", "history": ["x"]}, r"history\[0\] must be a pair .*, got 'x'"),
        ({"instruction": "a", "output": ["c", "d"], "system": "s"}, r"system prompt or a history can have one answer"),
        ({"prompt": "a", "completion": "c", "label": False}, r"one to avoid; keep the others: append #label=True"),
        ({"prompt": "other", "chosen": [USER, ANSWER]}, r"prompt is a string, and its answer a list of messages"),
        ({"chosen": "Human: hi Assistant: yo", "rejected": "x"}, r"chosen is a string without a prompt"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\] \(assistant\) is empty"),
    ],
)
def test_refused_records(record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(record, "f:4", 3, True)


def test_a_conversation_keeps_tools_reasoning_and_weights() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [ASKED_CALL], "reasoning": "think", "weight": 0}
    said = ANSWER | {"weight": 1, "tool_calls": None}
    row = parse_row({"messages": [USER, call, RESULT, said], "tools": json.dumps([SUM])}, "f:4", 3)
    kept = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "think", "weight": 0}
    assert row == Row(3, messages=(USER, kept, RESULT, ANSWER), tools=(SUM,))
    assert parse_row(row_record(row), "f:4", 3) == row
    assert json.loads(json.dumps(asdict(row)))["messages"] == [USER, kept, RESULT, ANSWER]
    assert row.question.splitlines()[2] == '{"name": "sum", "arguments": {"of": [1, 2]}}'


def test_a_call_of_sharegpt_is_a_tool_call() -> None:
    turns = [("human", "hi"), ("function_call", '{"name": "sum", "arguments": {"of": [1, 2]}}'), ("observation", "3")]
    record = {"conversations": [{"from": role, "value": text} for role, text in [*turns, ("gpt", "yo")]]}
    call = {"role": "assistant", "content": "", "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}]}
    assert parse_row(record, "f:4", 3).messages == (USER, call, {"role": "tool", "content": "3"}, ANSWER)


def test_the_last_answer_is_the_last_turn_that_is_trained() -> None:
    row = Row(0, messages=(USER, C, USER, ANSWER, USER, WRONG))
    assert row.references == ("yo",)
    assert row.asked == (USER, C, USER)


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "h", "image": None}, "i"]
    row = parse_row({"messages": [{"role": "user", "content": parts}, ANSWER]}, "f:4", 3)
    assert row.asked[0]["content"] == [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert row.question == "hi"


def test_response_may_be_missing_for_generation() -> None:
    assert parse_row({"instruction": "a"}, "f:1", 0, need_response=False).references == ()
    assert parse_row({"messages": [USER]}, "f:1", 0, need_response=False).question == "hi"


def test_last_assistant_turn_is_the_reference() -> None:
    later = {"role": "assistant", "content": "bye"}
    assert Row(0, messages=(USER, ANSWER, USER, later)).references == ("bye",)


def test_row_as_text() -> None:
    assert Row(0, "a", "b", ("c", "d")).text == "a\nb\nc"
    assert Row(0, prompt="P:", responses=("c",)).text == "P:c"
    assert Row(0, messages=(USER, ANSWER)).text == "hi\nyo"


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        ({"messages": [USER, ANSWER | {"x": 1}], "output": "c", "tools": [SUM]}, ["output", "messages[].x"]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [C], "context": "d"}, ["rejected", "context"]),
        ({"prompt": "P:", "completion": "c", "system": "s"}, ["system"]),
        ({"instruction": "a", "output": "c", "system": "s", "history": [["a", "b"]], "score": 0}, ["score"]),
    ],
)
def test_keys_that_nobody_reads(record: dict, unread: list[str]) -> None:
    assert unread_keys(record) == unread


@pytest.mark.parametrize(
    "record",
    [
        {"images": ["a.png"], "messages": [{"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": "what?"}]}]},
        {"images": [{"bytes": None, "path": "a.png"}], "messages": [{"role": "user", "content": "<image>\nwhat?"}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file://a.png"}}, {"type": "text", "text": "what?"}]}]},
    ],
)  # fmt: skip
def test_images_come_in_the_turns_or_in_a_column(record: dict[str, Any]) -> None:
    key = "conversations" if "conversations" in record else "messages"
    record = record | {key: [*record[key], {"role": "assistant", "content": "red"}]}
    [asked, _] = parse_row(record, "", 0).messages or ()
    assert asked["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    assert unread_keys(record) == []


def test_images_of_a_column_need_as_many_places() -> None:
    turns = [{"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": "red"}]
    with pytest.raises(ValueError, match="images holds 1 images, and the turns have 2 places"):
        parse_row({"images": ["a.png"], "messages": turns}, "", 0)
    blind = {"images": ["a.png"], "messages": [{"role": "user", "content": "what?"}, turns[1]]}
    assert parse_row(blind, "", 0).images == ()
    assert unread_keys(blind) == ["images"]
    assert parse_row({"messages": turns}, "", 0).question == "<image> and <image>?"
