from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data.encoding import chat_template
from deltakd.data.encoding.chat_template import ChatTemplate
from deltakd.data.encoding.segments import Segment
from deltakd.data.encoding.templates import AlpacaTemplate, PlainTemplate, make_template
from deltakd.data.sources.readers import read_rows
from deltakd.data.sources.records import Problems, iter_records, parse_source
from deltakd.data.sources.rows import Row
from tests.data.conftest import CHAT, Factory

PLAIN = PlainTemplate("{instruction}|{input}>", "{instruction}>", ">")


def talk(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents))


@pytest.fixture(scope="module")
def chat(make_tokenizer: Factory) -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")


@pytest.mark.parametrize("name", ["dolly/minillm_dolly_test", "dolly/minillm_dolly_dev", "minillm_eval/vicuna"])
def test_alpaca_is_minillms(shared_dir: Path, name: str) -> None:
    source = str(shared_dir / "data" / f"{name}.jsonl.gz")
    prompts = [record.value["prompt"] for record in iter_records(parse_source(source), Problems(source))]
    assert [AlpacaTemplate().render(row)[0].text for row in read_rows(source)] == prompts


def test_plain_pieces() -> None:
    assert PLAIN.render(Row(0, "a", "{b}", ("c",))) == [
        Segment("a|{b}>", trained=False, special_tokens=True),
        Segment("c", trained=True, closed=True),
    ]
    assert PLAIN.render(Row(0, "a")) == [Segment("a>", trained=False, special_tokens=True)]
    assert PLAIN.render(Row(0, prompt="verbatim {x}", responses=("c",)))[0].text == "verbatim {x}"


def test_plain_conversation() -> None:
    system = {"role": "system", "content": "s"}
    segments = PLAIN.render(Row(0, messages=(system, *talk("a", "b", "c", "d", "unanswered"))))
    assert [(s.text, s.trained) for s in segments] == [("s\n\na>", False), ("b", True), ("c>", False), ("d", True)]
    assert [s.special_tokens for s in segments] == [True, False, False, False]
    assert [s.closed for s in segments] == [False, True, False, True]
    assert [s.text for s in PLAIN.render(Row(0, messages=talk("a")))] == ["a>"]


def test_chat_trains_the_answer_and_its_end(chat: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(chat)
    prompt, answer = template.render(Row(0, "a", "b", ("c",)))
    assert prompt == Segment("<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\n", trained=False)
    assert answer == Segment("c<|im_end|>", trained=True, closed=True)
    assert template.tail(Row(0, "a", "b", ("c",))) == "<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(Row(0, "a", "b")) == [prompt]


def test_chat_conversation(chat: PreTrainedTokenizerFast) -> None:
    messages = talk("a", "b", "c", "d")
    segments = ChatTemplate(chat).render(Row(0, messages=messages))
    assert "".join(s.text for s in segments) + "\n" == chat.apply_chat_template(list(messages), tokenize=False)
    assert [s.text for s in segments if s.trained] == ["b<|im_end|>", "d<|im_end|>"]


def test_chat_refuses_a_template_whose_prompt_is_another_one_once_it_is_answered(make_tokenizer: Factory) -> None:
    counting = "{{ messages|length }}" + CHAT
    template = ChatTemplate(make_tokenizer(chat_template=counting))
    with pytest.raises(ValueError, match="row 7: what the chat template writes for turn 1 does not begin with"):
        template.render(Row(7, messages=talk("a", "b")))


def test_factory(tokenizer: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast) -> None:
    assert make_template("alpaca", tokenizer) == AlpacaTemplate()
    assert isinstance(make_template("chat", chat), ChatTemplate)
    mapping = {"with_input": "{instruction}|{input}>", "without_input": "{instruction}>", "tail": ">"}
    assert make_template(mapping, tokenizer) == PLAIN
    assert make_template(PLAIN, tokenizer) is PLAIN
    with pytest.raises(ValueError, match="unknown template 'vicuna'; allowed: alpaca, chat, or a mapping"):
        make_template("vicuna", tokenizer)
    with pytest.raises(ValueError, match=r"has the keys \['tail'\]; it needs exactly"):
        make_template({"tail": ">"}, tokenizer)
    with pytest.raises(ValueError, match="has no chat template; use template=alpaca"):
        make_template("chat", tokenizer)


@pytest.mark.parametrize(
    ("with_input", "without_input", "message"),
    [
        ("{instruction}>", "{instruction}>", "with_input must have exactly the fields {instruction} and {input}"),
        ("{instruction}{input}>", "{instruction}{x}>", r"without_input must have .* it has \{instruction\}, \{x\}"),
        ("{instruction}{input}>", "{instruction", "is not a format string"),
        ("{instruction}{input}", "{instruction}>", "with_input must end with template.tail = '>'"),
    ],
)
def test_bad_formats(with_input: str, without_input: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainTemplate(with_input, without_input, ">")


def test_repr_tells_templates_apart(chat: PreTrainedTokenizerFast, make_tokenizer: Factory) -> None:
    other = make_tokenizer(chat_template=CHAT + " ")
    assert repr(ChatTemplate(chat)) != repr(ChatTemplate(other))
    assert repr(PLAIN) != repr(AlpacaTemplate())


def test_what_a_template_refuses_is_said_with_row_and_remedy(make_tokenizer: Factory) -> None:
    refusing = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT
    )
    template = ChatTemplate(make_tokenizer(chat_template=refusing))
    system = {"role": "system", "content": "s"}
    row = Row(7, messages=(system, *talk("a", "b")), where="x.jsonl:8")
    with pytest.raises(ValueError, match="roles must alternate") as caught:
        template.render(row)
    assert str(caught.value).startswith("row 7 (x.jsonl:8): the chat template rejects the turns system, user: roles")
    assert "data.template=alpaca" in str(caught.value)


def test_a_template_with_a_clock_has_one_date_for_the_whole_run(
    make_tokenizer: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Day(date):
        day_of_month = 26

        @classmethod
        def today(cls) -> date:
            return date(2026, 11, cls.day_of_month)

    monkeypatch.setattr(chat_template, "date", Day)
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now( \"%Y\" ) }}\n{% endif %}"
    tokenizer = make_tokenizer(chat_template=clock + CHAT)
    chat_template._today.cache_clear()
    first = ChatTemplate(tokenizer)
    Day.day_of_month = 27
    later = ChatTemplate(tokenizer)
    for template in (first, later):
        assert template.render(Row(0, "a"))[0].text.startswith("26 Nov 2026 2026\n<|im_start|>user")
    assert repr(first) == repr(later)
    chat_template._today.cache_clear()
    assert repr(ChatTemplate(tokenizer)) != repr(first)
    chat_template._today.cache_clear()
    with pytest.raises(ValueError, match=r"reads the clock .* write the date into the template"):
        ChatTemplate(make_tokenizer(chat_template="{{ strftime_now(format) }}" + CHAT))
