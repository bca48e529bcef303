from __future__ import annotations

import pytest

from deltakd.data.sources.rows import Row, parse_row, row_record, with_answer

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            Row(3, "a", "b", ("c",), category="d"),
        ),
        ({"question": "a", "answer": "c"}, Row(3, "a", "", ("c",))),
        ({"instruction": "a", "input": "", "output": ["c", "d", " "]}, Row(3, "a", "", ("c", "d"))),
        ({"prompt": "P:", "output": "c"}, Row(3, responses=("c",), prompt="P:")),
        ({"prompt": "P:", "instruction": "a", "output": "c"}, Row(3, "a", "", ("c",))),
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


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            r"f:4: no instruction; keys found: text; give a non-empty one of: instruction, question, prompt",
        ),
        ({"instruction": " ", "output": "c"}, r"f:4: instruction is empty"),
        ({"instruction": "a"}, r"f:4: no response; keys found: instruction; .* response, output, answer, messages"),
        ({"instruction": "a", "output": []}, r"f:4: response is empty"),
        ({"instruction": "a", "output": {"x": 1}}, r"f:4: output must be a string or a list of strings, got dict"),
        ({"instruction": 5, "output": "c"}, r"f:4: instruction must be a string, got int"),
        ({"instruction": "a", "question": "b", "output": "c"}, r"f:4: instruction and question differ"),
        ({"instruction": "a", "output": "c", "answer": "d"}, r"f:4: output and answer differ"),
        ({"instruction": "a", "messages": [USER, ANSWER]}, r"f:4: both messages and instruction are given"),
        ({"messages": []}, r"messages must be a non-empty list"),
        ({"messages": [USER]}, r"f:4: messages have no assistant turn; roles found: user"),
        ({"messages": [ANSWER]}, r"no user turn"),
        ({"messages": [ANSWER, USER, ANSWER]}, r"the first assistant turn stands before the first user turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"role 'bot'; allowed: system, user, assistant"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\] \(assistant\) is empty"),
    ],
)
def test_refused_records(record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(record, "f:4", 3, True)


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
