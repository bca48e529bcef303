"""Answers that a student wrote, in the tokens of teachers with another tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltakd.data import collate, make_template
from deltakd.data.encoding.answer_frame import AnswerFrame
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.segments import Segment
from deltakd.data.encoding.token_texts import END, TokenTexts
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.data.sources.rows import Row, RowError
from deltakd.rollouts.responses import prompts_of
from deltakd.types import IGNORE_INDEX, UNALIGNED
from tests.data.test_two_tokenizers import BARE, CHAT, LLAMA_CHAT, TEXTS, real, text_of, with_chat


@pytest.fixture(scope="module")
def chats(shared_dir: Path) -> dict[str, Coding]:
    """GPT-2 in ChatML, and TinyLlama in Llama 2's template."""
    gpt2, llama = with_chat(real(shared_dir, "gpt2"), CHAT), with_chat(real(shared_dir, "tinyllama"), LLAMA_CHAT)
    return {name: Coding(make_template("chat", one), one, 300, 150) for name, one in (("gpt2", gpt2), ("llama", llama))}


@pytest.fixture(scope="module")
def plain(shared_dir: Path) -> TwoTokenizers:
    """A GPT-2 student for TinyLlama teachers, without any template."""
    return TwoTokenizers(*(Coding(BARE, real(shared_dir, name), 100, 50) for name in ("gpt2", "tinyllama")))


def answer_of(row: Encoded | None) -> list[int]:
    """The trained tokens of a row."""
    assert row is not None
    return [label for label in row.labels if label != IGNORE_INDEX]


@pytest.mark.parametrize("names", [("gpt2", "llama"), ("llama", "gpt2")])
def test_a_student_that_writes_the_answer_of_the_data_trains_the_row_of_the_data(
    chats: dict[str, Coding], names: tuple[str, str]
) -> None:
    """Tokens, labels and spans of both sides, though one template writes a space before each answer."""
    both = TwoTokenizers(*(chats[name] for name in names))
    rows = [Row(n, "Why?\nSay it.", "", (text.strip() + "a",)) for n, text in enumerate(TEXTS)]
    first = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 😀!"})
    rows += [Row(99, messages=(*first, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}))]
    for outcome in both.encode(rows):
        row = outcome.encoded
        assert row is not None
        own, theirs = prompts_of(row)
        assert theirs is not None
        made, is_utf8 = both.answered(row.row_id, (own, theirs), row.input_ids[len(own) :], finished=True)
        assert is_utf8
        assert row.other is not None
        assert made.other is not None
        assert (made.input_ids, made.other.input_ids) == (row.input_ids, row.other.input_ids)
        assert made.labels == [IGNORE_INDEX] * len(own) + row.labels[len(own) :]
        if len(outcome.answers) == 1:
            assert made == row


def test_an_answer_that_was_stopped_ends_on_neither_side(plain: TwoTokenizers) -> None:
    ids = plain.student.tokenizer("Hello 😀 wor").input_ids
    end, their_end = (side.tokenizer.eos_token_id for side in (plain.student, plain.teachers))
    for finished in (True, False):
        row, _ = plain.answered(7, ([1, 2], [3, 4]), [*ids, end] if finished else ids, finished)
        theirs = answer_of(row.other)
        assert plain.teachers.tokenizer.decode(theirs, skip_special_tokens=True) == "Hello 😀 wor"
        assert (theirs[-1] == their_end) is finished
        assert row.spans is not None
        assert UNALIGNED not in row.spans[2:]


def test_bytes_that_are_no_text_are_told_and_left_unaligned(plain: TwoTokenizers) -> None:
    tokenizer = plain.student.tokenizer
    face, rest, end = tokenizer("😀").input_ids, tokenizer(" two").input_ids, tokenizer.eos_token_id
    broken = [*tokenizer("one ").input_ids, *face[:-1]]
    row, is_utf8 = plain.answered(7, ([1, 2], [3, 4]), [*broken, *rest, end], True)
    assert not is_utf8
    assert row.spans is not None
    held = text_of(TokenTexts(tokenizer, "?").of(row.input_ids), row.spans)
    assert held.startswith("one")
    assert held.endswith(" two" + END)
    assert "\ufffd" in plain.teachers.tokenizer.decode(answer_of(row.other))
    # A character that the end of the answer cuts in two is no fault.
    row, is_utf8 = plain.answered(7, ([1, 2], [3, 4]), broken, False)
    assert is_utf8
    assert plain.teachers.tokenizer.decode(answer_of(row.other)).strip() == "one"


def test_control_tokens_that_a_student_writes_have_no_text_and_those_it_spells_out_control_nothing(
    chats: dict[str, Coding],
) -> None:
    both = TwoTokenizers(chats["gpt2"], chats["llama"])
    gpt2, llama = both.student.tokenizer, both.teachers.tokenizer
    start = gpt2.convert_tokens_to_ids("<|im_start|>")
    said = gpt2("a</s>b\U00100000").input_ids
    row, _ = both.answered(7, ([1], [1]), [start, *said, gpt2.eos_token_id], True)
    theirs = answer_of(row.other)
    assert theirs.count(llama.eos_token_id) == 1
    assert llama.decode(theirs[:-1]) == "a</s>b\ufffd"
    assert row.spans is not None
    assert [span != UNALIGNED for span in row.spans[1:]].count(False) >= 1


def test_an_answer_that_the_teachers_can_hold_in_part_is_cut(plain: TwoTokenizers) -> None:
    ids = plain.student.tokenizer("word " * 90).input_ids
    row, _ = plain.answered(7, ([1, 2], [3] * 40), ids, False)
    assert row.other is not None
    assert len(row.other.input_ids) == 100
    row, _ = plain.answered(7, ([1, 2], [3] * 100), ids, False)
    assert not answer_of(row.other)
    assert collate([row], 0, 0, 1).other is not None


def test_a_template_that_refuses_a_plain_question_frames_answers_with_eos_alone() -> None:
    class Refusing:
        def render(self, row: Row) -> list[Segment]:
            raise RowError("no")

        def tail(self, row: Row) -> str:
            return ""

        def keeps_end(self, row: Row) -> bool:
            return True

    assert AnswerFrame.of(Refusing()) == ("", "", True)


def test_a_prompt_ends_before_the_last_answer_that_both_sides_hold() -> None:
    _ = IGNORE_INDEX
    other = Encoded([1, 2, 3], [_, 2, _], 0)
    row = Encoded([1, 2, 3, 4, 5], [_, _, 3, _, 5], 0, other=other)
    assert prompts_of(row) == ([1, 2], [1])
    assert prompts_of(replace(row, other=None)) == ([1, 2, 3, 4], None)
