"""The first training row in the log, and templates whose line breaks are none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltakd.data.encoding.encode import encode_row
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.preview import BRACKETS, COLOUR, IDS_LIMIT, TEXT_LIMIT, preview_row
from deltakd.data.encoding.template_problems import template_problems
from deltakd.data.encoding.templates import AlpacaTemplate, PlainTemplate
from deltakd.data.sources.rows import Row
from tests.data.conftest import Factory

ROW = Row(id=0, instruction="Name a\nthing", responses=("a café 😀",))
PLAIN = PlainTemplate("{instruction} {input}:", "{instruction}:", ":")


def encoded(row: Row, make_tokenizer: Factory, max_length: int = 4000) -> Encoded:
    made = encode_row(row, PLAIN, make_tokenizer("<s> $A"), max_length, max_length - 1)
    assert made is not None
    return made


def test_the_trained_part_stands_between_marks_and_line_breaks_are_visible(make_tokenizer: Factory) -> None:
    row = encoded(ROW, make_tokenizer)
    shown = preview_row(row, make_tokenizer(), ids=False, marks=BRACKETS)
    assert shown == "<s>Name a\\nthing:⟦a café 😀</s>⟧"
    assert preview_row(row, make_tokenizer(), ids=False, marks=COLOUR).count("\x1b[") == 2


def test_a_backslash_of_the_data_differs_from_a_line_break(make_tokenizer: Factory) -> None:
    row = encoded(replace(ROW, instruction="\\n\n\x07\u00a0"), make_tokenizer)
    shown = preview_row(row, make_tokenizer(), ids=False, marks=BRACKETS)
    assert shown.startswith("<s>\\\\n\\n\\x07\\xa0:")


def test_ids_show_each_token_with_its_id(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer()
    row = encoded(Row(id=0, instruction="a b", responses=("c",)), make_tokenizer)
    shown = preview_row(row, tokenizer, ids=True, marks=BRACKETS)
    known = tokenizer.get_vocab()
    assert shown == (
        f"<s>(1) a({known['a']}) ␣({known['Ġ']}) b({known['b']}) :({known[':']}) ⟦c({known['c']}) </s>(2)⟧"
    )


@pytest.mark.parametrize(("ids", "unit", "limit"), [(False, "characters", TEXT_LIMIT), (True, "tokens", IDS_LIMIT)])
def test_the_middle_of_a_long_answer_is_left_out_and_counted(
    make_tokenizer: Factory, ids: bool, unit: str, limit: int
) -> None:
    row = encoded(Row(id=0, instruction="q", responses=("b" * 995,)), make_tokenizer)
    shown = preview_row(row, make_tokenizer(), ids=ids, marks=BRACKETS)
    # A byte is a token; the end-of-sequence token is one token of four characters.
    length = 996 if ids else 999
    assert f" … {length - limit} more {unit} … " in shown
    assert shown.startswith("<s>(1) q(" if ids else "<s>q:⟦b")
    assert shown.endswith("⟧")


def test_of_a_long_conversation_the_first_and_last_turns_are_shown(make_tokenizer: Factory) -> None:
    turns = [{"role": role, "content": f"{role[0]}{n}"} for n in range(9) for role in ("user", "assistant")]
    shown = preview_row(
        encoded(Row(id=0, messages=tuple(turns)), make_tokenizer), make_tokenizer(), ids=False, marks=BRACKETS
    )
    assert shown == "<s>u0:⟦a0</s>⟧u1: … 12 more stretches … ⟦a7</s>⟧u8:⟦a8</s>⟧"


def test_nothing_predicts_the_first_token_so_it_is_not_marked(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("abc").input_ids
    assert preview_row(Encoded(ids, list(ids), 0), tokenizer, ids=False, marks=BRACKETS) == "a⟦bc⟧"


def test_a_backslash_and_an_n_are_no_line_break() -> None:
    template = {"with_input": "{instruction}\\n{input}\n", "without_input": "{instruction}\n", "tail": "\\n"}
    problems = template_problems("data.template", template)
    assert [problem.partition(" ")[0] for problem in problems] == ["data.template.with_input", "data.template.tail"]
    assert 'in YAML in double quotes, tail: "...\\n..."' in problems[1]
    assert template_problems("data.template", "alpaca") == []
    plain = AlpacaTemplate()
    texts = {"with_input": plain.with_input, "without_input": plain.without_input, "tail": plain.tail_text}
    assert not template_problems("t", texts)
