"""Conversations and chat templates: how long prompts are cut, and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data import AlpacaTemplate, ChatTemplate, PlainTemplate, encode_prompt, encode_prompts, encode_rows
from deltakd.data.sources.rows import Row
from tests.data.conftest import CHAT, Factory

PLAIN = PlainTemplate("{instruction}|{input}\n>", "{instruction}\n>", "\n>")
#: Reads a message as a list of parts, and writes nothing of a text.
PARTS = CHAT.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
#: Writes the beginning of a content alone.
SHORTENING = CHAT.replace("{{ m['content'] }}", "{{ m['content'][:4] }}")
#: Keeps what follows the reasoning.
THOUGHTLESS = CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")


def chat(*contents: str, system: str = "") -> tuple[dict[str, str], ...]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return tuple([{"role": "system", "content": system}] * bool(system) + turns)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Factory) -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")


def encoded(rows: list[Row], tokenizer: Any, template: Any = None, **limits: Any) -> Any:
    options = {"max_length": 400, "max_prompt_length": 300} | limits
    return encode_rows(rows, template or ChatTemplate(tokenizer), tokenizer, **options)


def test_a_long_system_prompt_is_cut_and_the_question_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, messages=chat("What is 7 + 5?", "12", system="be kind. " * 40))
    ids = encode_prompt(row, ChatTemplate(tokenizer), tokenizer, 64)
    end = "d. be kind. <|im_end|>\n<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
    assert len(ids) == 64
    assert tokenizer.decode(ids).endswith(end)


@pytest.mark.parametrize("question", ["start", "user", "im_end", "assistant", "\n", "e" * 100])
def test_a_question_that_stands_in_the_template_does_not_cost_it_its_end(
    tokenizer: PreTrainedTokenizerFast, question: str
) -> None:
    row = Row(0, messages=chat(question, "yes", system="be kind. " * 40))
    template = ChatTemplate(tokenizer)
    assert template.tail(row) == "<|im_end|>\n<|im_start|>assistant\n"
    text = tokenizer.decode(encode_prompt(row, template, tokenizer, 40))
    assert text.endswith(question[-20:] + "<|im_end|>\n<|im_start|>assistant\n")


def test_the_last_question_is_kept_and_the_last_answer_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, messages=chat("first " * 20, "one", "Who?", "two", system="s"))
    for template, end in (
        (ChatTemplate(tokenizer), "user\nWho?<|im_end|>\n<|im_start|>assistant\n"),
        (PLAIN, "one<|im_end|>Who?\n>"),
    ):
        ids, cut = encode_prompts([row, Row(1, "short")], template, tokenizer, 40)
        assert cut == 1
        assert len(ids[0]) == 40
        assert tokenizer.decode(ids[0]).endswith(end)
    assert row.references == ("two",)


@pytest.mark.parametrize("around", [None, "<s> $A"])
def test_training_cuts_as_evaluation_does_and_counts_it(make_tokenizer: Factory, around: str | None) -> None:
    tokenizer = make_tokenizer(around, chat_template="{{ bos_token }}" + CHAT, eos_token="<|im_end|>")
    rows = [
        Row(0, messages=chat("Why? " * 30, "because")),
        Row(1, messages=chat("Why?", "because", system="s " * 60)),
        Row(2, "Sum up. ", "text " * 40, ("short",)),
        Row(3, prompt="verbatim " * 20, responses=("yes",)),
        Row(4, "Why?", "", ("so",)),
    ]
    for template, counted in ((ChatTemplate(tokenizer), 4), (PLAIN, 4)):
        trained = encoded(rows, tokenizer, template, max_prompt_length=60)
        assert trained.counts["cut_prompts"] == counted
        for row, example in zip(rows, trained, strict=True):
            prompt = encode_prompt(row, template, tokenizer, 60)
            assert example.input_ids[: len(prompt)] == prompt
            assert example.labels[: len(prompt)] == [-100] * len(prompt)
            if row.prompt is None and not (around is None and template is PLAIN):
                assert prompt[0] == tokenizer.bos_token_id


def test_an_instruction_in_a_plain_template_keeps_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, "Sum up.", "text " * 100, ("short",))
    text = tokenizer.decode(encode_prompt(row, AlpacaTemplate(), tokenizer, 250))
    assert "### Instruction:\nSum up.\n\n### Input:\ntext text" in text
    assert text.endswith("\n\n### Response:\n")


def test_a_limit_without_room_for_the_templates_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, messages=chat("Why? " * 30, "because"))
    tail = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    with pytest.raises(ValueError, match=rf"max_prompt_length = {tail} leaves no room before the end of the template"):
        encode_prompt(row, ChatTemplate(tokenizer), tokenizer, tail)
    assert len(encode_prompt(row, ChatTemplate(tokenizer), tokenizer, tail + 1)) == tail + 1


def test_all_rows_of_which_the_answer_would_not_be_trained_are_named(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=SHORTENING, eos_token="<|im_end|>")
    rows = [Row(n, messages=chat("Who?", f"answer {n}"), where=f"x.jsonl:{n + 1}") for n in range(3)]
    with pytest.raises(ValueError, match=r"3 bad record\(s\)") as caught:
        encoded(rows, tokenizer)
    for n in range(3):
        expected = (
            f"row {n} (x.jsonl:{n + 1}): the template leaves out a part of the answer: 'answer {n}' is not in what"
        )
        assert expected in str(caught.value)
    assert "data.template=alpaca" in str(caught.value)


def test_a_template_that_reads_contents_as_parts_gets_parts(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=PARTS, eos_token="<|im_end|>")
    texts = make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    turns = chat("Who?", "She.", "Why?", "So.", system="Be kind.")
    parts = tuple(turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns)
    expected = encoded([Row(0, messages=turns)], texts)
    for one in (tokenizer, texts):
        for messages in (turns, parts):
            assert list(encoded([Row(0, messages=messages)], one)) == list(expected)
    assert encode_prompt(Row(0, messages=parts), ChatTemplate(tokenizer), tokenizer, 200)


def test_reasoning_that_a_template_drops_is_named(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=THOUGHTLESS, eos_token="<|im_end|>")
    row = Row(4, messages=chat("Who?", "<think>\nShe did.\n</think>\n\nAusten"))
    with pytest.raises(ValueError, match=r"row 4: the template leaves out .*'<think>' is not in .*Austen<\|im_end\|>'"):
        encoded([row], tokenizer)
    assert encoded([Row(4, messages=chat("Who?", " Austen\n"))], tokenizer).counts["rows"] == 1


def test_an_answer_that_nothing_ends_is_named(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant:{% endif %}"
    )
    assert len(encoded([Row(0, messages=chat("a", "b"))], tokenizer)) == 1
    with pytest.raises(ValueError, match=r"row 1: the template writes nothing after the answer 'b'"):
        encoded([Row(1, messages=chat("a", "b", "c", "d"))], tokenizer)


def test_prompts_that_a_template_refuses_are_named_together(make_tokenizer: Factory) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
    tokenizer = make_tokenizer(chat_template=refusing, eos_token="<|im_end|>")
    rows = [Row(n, messages=chat("a", "b", system="s" * (n % 2)), where=f"x.jsonl:{n + 1}") for n in range(4)]
    for run in (
        lambda: encode_prompts(rows, ChatTemplate(tokenizer), tokenizer, 100),
        lambda: encoded(rows, tokenizer),
    ):
        with pytest.raises(ValueError, match=r"2 bad record\(s\)") as caught:
            run()
        assert "row 1 (x.jsonl:2), row 3 (x.jsonl:4): the chat template rejects the turns system, user" in str(
            caught.value
        )
        assert "row 3 (x.jsonl:4)" in str(caught.value)


def test_an_answer_of_weight_0_is_read_and_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = chat("a", "no", "b", "yes", "c", "no")
    row = Row(0, messages=tuple(turn | {"weight": 0} if turn["content"] == "no" else turn for turn in turns))
    for template in (PLAIN, ChatTemplate(tokenizer)):
        one = encoded([row], tokenizer, template)[0]
        text = tokenizer.decode(one.input_ids)
        assert tokenizer.decode([label for label in one.labels if label != -100]) == "yes<|im_end|>"
        assert "no<|im_end|>" in text
        assert text.endswith("yes<|im_end|>")
        assert text.startswith(tokenizer.decode(encode_prompt(row, template, tokenizer, 300)))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (Row(0, messages=(*chat("a", "b"), {"role": "tool", "content": "c"})), r"the role tool in messages\[2\]"),
        (Row(0, messages=(*chat("a")[:1], {"role": "assistant", "content": "b", "reasoning_content": "c"})), "reason"),
        (Row(0, "a", responses=("b",), tools=({"name": "f"},)), "has tools"),
    ],
)
def test_a_plain_template_refuses_what_it_cannot_write(tokenizer: PreTrainedTokenizerFast, row: Row, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}.*data.template=chat"):
        encoded([row], tokenizer, PLAIN)


def test_a_chat_template_gets_the_tools(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template="{{ tools | tojson if tools else '' }}" + CHAT)
    text = ChatTemplate(tokenizer).render(Row(0, "a", tools=({"name": "f"},)))[0].text
    assert text.startswith('[{"name": "f"}]<|im_start|>')
