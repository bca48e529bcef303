"""Conversations whose template rewrites earlier turns, and what else turns may hold."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from deltakd.data import ChatTemplate, encode_prompts, encode_rows
from deltakd.data.encoding.chat_template import _warn_unread
from deltakd.data.sources.rows import Row
from deltakd.types import IGNORE_INDEX
from tests.data.conftest import CHAT, Factory

#: Keeps the reasoning of the last turn alone, as Qwen3 does.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*contents: str, **last: Any) -> tuple[dict[str, Any], ...]:
    found = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return (*found[:-1], found[-1] | last)


def texts(tokenizer: Any, encoded: Any) -> list[tuple[str, str]]:
    """What each example reads, and what it trains."""
    found = []
    for one in encoded:
        trained = [label for label in one.labels if label != IGNORE_INDEX]
        found.append((tokenizer.decode(one.input_ids), tokenizer.decode(trained)))
    return found


def encode(tokenizer: Any, *rows: Row, **options: Any) -> Any:
    return encode_rows(
        rows, ChatTemplate(tokenizer), tokenizer, **({"max_length": 900, "max_prompt_length": 800} | options)
    )


def test_each_answer_is_an_example_where_earlier_turns_are_rewritten(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=FORGETFUL, eos_token="<|im_end|>")
    row = Row(3, messages=turns("a", "b", "c", "d", reasoning_content="hm"))
    with pytest.raises(ValueError, match=r"row 3: the chat template writes turn 1 in another way .*data\.split_turns"):
        encode(tokenizer, row)
    first, second = texts(tokenizer, split := encode(tokenizer, row, split_turns=True))
    assert split.row_ids.tolist() == [3, 3]
    assert split.counts["rows"] == 2
    before = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert first == (f"{before}<think>\n\n</think>\n\nb<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>")
    prompt = f"{before}b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    answer = "<think>\nhm\n</think>\n\nd<|im_end|>"
    assert second == (prompt + answer, answer)
    [generated], _ = encode_prompts([row], ChatTemplate(tokenizer), tokenizer, 800)
    assert tokenizer.decode(generated) == prompt
    assert split[1].input_ids[: len(generated)] == generated


def test_split_and_whole_conversations_train_the_same_answers(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    row = Row(0, messages=turns("a", "b", "c", "d", "e", "f"))
    [(_, whole)] = texts(tokenizer, encode(tokenizer, row))
    split = texts(tokenizer, encode(tokenizer, row, split_turns=True))
    assert whole == "".join(trained for _, trained in split) == "b<|im_end|>d<|im_end|>f<|im_end|>"
    assert encode(tokenizer, row).fingerprint != encode(tokenizer, row, split_turns=True).fingerprint


def test_a_turn_of_weight_0_is_read_and_not_trained(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    messages = turns("a", "b", "c", "d", "e", "f")
    messages = tuple(turn | {"weight": 0} if turn["content"] in "bf" else turn for turn in messages)
    for split in (False, True):
        [(read, trained)] = texts(tokenizer, encode(tokenizer, Row(0, messages=messages), split_turns=split))
        assert trained == "d<|im_end|>"
        assert "assistant\nb<|im_end|>" in read


def test_tools_and_calls_are_written_and_trained(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer(chat_template=TOOLS, eos_token="<|im_end|>")
    call = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2], "why": 'a "b"'}}}
    row = Row(0, messages=turns("a", "", tool_calls=[call]), tools=({"name": "sum"},))
    [(read, trained)] = texts(tokenizer, encode(tokenizer, row))
    assert read.startswith('tools: [{"name": "sum"}]\n<|im_start|>user')
    assert trained.startswith('<call>{"name": "sum", "arguments"')
    with pytest.raises(ValueError, match=r"row 0: the template leaves out a part of tool_calls: 'sum'"):
        encode(make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>"), row)


def test_reasoning_that_is_left_out_is_named(make_tokenizer: Factory) -> None:
    row = Row(0, messages=turns("a", "b", reasoning_content="so\nfar"))
    with pytest.raises(ValueError, match="row 0: the template leaves out reasoning_content: 'so' is not in what"):
        encode(make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>"), row)


def test_a_second_block_of_reasoning_is_refused(make_tokenizer: Factory) -> None:
    block = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    adds_one = CHAT.replace("{{ m['content'] }}", block + "{{ m['content'] }}")
    tokenizer = make_tokenizer(chat_template=adds_one, eos_token="<|im_end|>")
    assert encode(tokenizer, Row(0, messages=turns("a", "b")))
    with pytest.raises(ValueError, match="row 0: the template writes a block of reasoning before an answer that has"):
        encode(tokenizer, Row(0, messages=turns("a", "<think>c</think>b")))


def test_keys_that_the_template_does_not_read_are_named_once(
    make_tokenizer: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_unread.cache_clear()
    tokenizer = make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    rows = [Row(n, messages=({"role": "user", "content": "a", "name": "Ann"}, *turns("a", "b"))) for n in range(3)]
    rows.append(Row(3, messages=turns("a", "b"), tools=({"name": "sum"},)))
    with caplog.at_level(logging.WARNING):
        encode(tokenizer, *rows)
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(", which")[0] for message in said] == [
        "the chat template does not read name",
        "the chat template does not read tools",
    ]
    caplog.clear()
    encode(make_tokenizer(chat_template=TOOLS, eos_token="<|im_end|>"), rows[3])
    assert not caplog.records


def test_what_a_generation_block_names_is_trained(make_tokenizer: Factory) -> None:
    row = Row(0, messages=turns("a", "b", "c", "d"))
    marked = make_tokenizer(chat_template=MARKED, eos_token="<|im_end|>")
    [(read, trained)] = texts(marked, encode(marked, row))
    plain = make_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    assert [(read, trained)] == texts(plain, encode(plain, row))
    assert trained == "b<|im_end|>d<|im_end|>"
    mask = marked.apply_chat_template(
        list(row.messages), return_assistant_tokens_mask=True, tokenize=True, return_dict=True
    )
    masked = [id for id, on in zip(mask["input_ids"], mask["assistant_masks"], strict=True) if on]
    assert marked.decode(masked).replace("\n", "") == trained


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"), r"'<\|im_end\|>'"),
        (MARKED.replace("{% generation %}", "So: {% generation %}"), "'So:'"),
    ],
)
def test_a_generation_block_that_leaves_out_a_part_of_the_turn_is_named(
    make_tokenizer: Factory, template: str, left_out: str
) -> None:
    tokenizer = make_tokenizer(chat_template=template, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=f"generation block leaves out {left_out} of turn 1"):
        encode(tokenizer, Row(0, messages=turns("a", "b")))
