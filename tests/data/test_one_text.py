"""Prompt and answer are one text: no dummy prefix, no merge that generation would not see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from deltakd.data import AlpacaTemplate, ChatTemplate, PlainTemplate, encode_prompts, encode_row, encode_rows
from deltakd.data.encoding.encode import encode_batch
from deltakd.data.sources.rows import Row
from deltakd.types import IGNORE_INDEX
from tests.data.conftest import CHAT
from tests.data.tokenizers import LLAMA3_SPLIT, byte_level, sentencepiece, unigram, wordpiece

BARE = PlainTemplate("{instruction}{input}", "{instruction}", "")
BREAKS = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("a", "b"), (":", "Ċ"), ("Ċ", "Ġ"), ("ĠĠ", "Ċ"), ("Ã", "©")]

TOKENIZERS = {
    "gpt2 splits": byte_level(BREAKS),
    "llama3 splits": byte_level(BREAKS, LLAMA3_SPLIT),
    "llama2": sentencepiece("metaspace", [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]),
    "llama2 legacy": sentencepiece("prepend", [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]),
    "unigram": unigram([("▁a", -3.0), ("ab", -2.5), ("▁▁", -4.0)]),
    "wordpiece": wordpiece(["ab", "##ab", "##ba"]),
    "slow bytes": ByT5Tokenizer(),
}


def both(encoded: Any) -> tuple[list[int], list[int]]:
    """The ids before the first trained token, and the trained ones."""
    border = next(n for n, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoded.labels[border:] == encoded.input_ids[border:]
    return encoded.input_ids[:border], encoded.input_ids[border:]


@pytest.mark.parametrize("name", ["llama2", "llama2 legacy", "unigram"])
def test_an_answer_has_no_dummy_prefix(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    encoded = encode_row(Row(0, "b:\n", "", ("ab a",)), BARE, tokenizer, 99, 50)
    prompt, answer = both(encoded)
    assert tokenizer.convert_ids_to_tokens(answer) == ["ab", "▁a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(prompt)[1].startswith("▁")
    assert prompt + answer == [*tokenizer("b:\nab a")["input_ids"], 2]


def test_a_word_that_begins_in_the_prompt_goes_on_in_the_answer() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    _prompt, answer = both(encode_row(Row(0, "c", "", ("ab a",)), BARE, tokenizer, 99, 50))
    assert tokenizer.convert_ids_to_tokens(answer) == ["##ab", "a", "</s>"]


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "tokens"),
    [
        ("gpt2 splits", "x ", "ab", ["ab"]),
        ("gpt2 splits", "x\n", "\n\na", ["Ċ", "Ċ", "a"]),
        # Two line breaks are one token at the end of a text, and two before a letter.
        ("gpt2 splits", "x\n\n", "a", ["a"]),
        ("llama3 splits", "x:", "\na", ["Ċ", "a"]),
        ("llama2", "x ", "ab", ["ab"]),
        ("llama2 legacy", "x ", "ab", ["ab"]),
        ("unigram", "xa", "b", ["b"]),
        ("wordpiece", "xa", "b", ["b"]),
    ],
)
def test_a_merge_over_the_border_is_undone_and_counted(name: str, prompt: str, answer: str, tokens: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    row = Row(0, prompt=prompt, responses=(answer,))
    [outcome] = encode_batch([row], BARE, tokenizer, 99, 50)
    assert outcome.kept_border
    before, after = both(outcome.encoded)
    assert before == tokenizer(prompt)["input_ids"]
    assert before + after != [*tokenizer(prompt + answer)["input_ids"], 2]
    assert [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(after)] == [*tokens, "</s>"]
    counted = encode_rows([row, Row(1, "x:", "", ("a",))], BARE, tokenizer, max_length=99, max_prompt_length=50)
    assert counted.counts["kept_borders"] == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_trained_follows_what_generation_sees(name: str) -> None:
    """Each prompt's own ids begin the row, whatever prompt and answer end and begin with; the text is whole."""
    tokenizer = TOKENIZERS[name]
    draw = random.Random(0)
    pieces = ["a", "b", " ", "\n", ":", "ab", " a", "12", "é", "\n\n", "  ", "."]
    rows = [
        Row(n, prompt="x" + "".join(draw.choices(pieces, k=3)), responses=("".join(draw.choices(pieces, k=3)) + "x",))
        for n in range(300)
    ]
    prompts, _ = encode_prompts(rows, BARE, tokenizer, 50)
    kept = 0
    for row, prompt, outcome in zip(rows, prompts, encode_batch(rows, BARE, tokenizer, 99, 50), strict=True):
        assert prompt == tokenizer(row.prompt, add_special_tokens=name != "slow bytes")["input_ids"]
        assert outcome.encoded is not None
        before, after = both(outcome.encoded)
        assert before == prompt
        assert after[-1] == tokenizer.eos_token_id
        whole = tokenizer(row.prompt + row.responses[0], add_special_tokens=name != "slow bytes")["input_ids"]
        if not outcome.kept_border:
            assert before + after[:-1] == whole
        else:
            assert whole[: len(prompt)] != prompt
            kept += 1
        if name != "wordpiece":
            text = tokenizer.decode(outcome.encoded.input_ids[:-1], skip_special_tokens=True)
            assert text == row.prompt + row.responses[0]
    assert (kept == 0) == (name == "slow bytes")
    assert [encode_row(row, BARE, tokenizer, 99, 50) for row in rows[:20]] == [
        outcome.encoded for outcome in encode_batch(rows[:20], BARE, tokenizer, 99, 50)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_each_answer_of_a_conversation_follows_its_prompt(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[name]
    template: Any = PlainTemplate("{instruction}{input}>", "{instruction}>", ">")
    if kind == "chat":
        tokenizer.chat_template = CHAT
        template = ChatTemplate(tokenizer)
    draw = random.Random(1)
    pieces = ["a", "b", " ", "\n", ":", "ab", " a", "12"]
    rows = []
    for n in range(40):
        texts = ["x" + "".join(draw.choices(pieces, k=3)) + "x" * (m % 2) for m in range(6)]
        texts = [text[m % 2 :] for m, text in enumerate(texts)]
        turns = [{"role": ("user", "assistant")[m % 2], "content": text} for m, text in enumerate(texts)]
        rows.append(Row(n, messages=tuple(turns)))
    shorter = [Row(row.id, messages=row.messages[:stop]) for row in rows for stop in (2, 4, 6)]
    prompts, _ = encode_prompts(shorter, template, tokenizer, 500)
    for n, outcome in enumerate(encode_batch(rows, template, tokenizer, 900, 500)):
        assert outcome.problem is None
        assert outcome.encoded is not None
        ids, labels = outcome.encoded.input_ids, outcome.encoded.labels
        starts = [m for m in range(1, len(ids)) if labels[m] != IGNORE_INDEX and labels[m - 1] == IGNORE_INDEX]
        assert len(starts) == 3
        for start, prompt in zip(starts, prompts[3 * n : 3 * n + 3], strict=True):
            assert ids[:start] == prompt


@pytest.mark.parametrize("name", ["gpt2", "tinyllama"])
def test_real_tokenizers_read_prompt_and_answer_as_one_text(shared_dir: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    template = AlpacaTemplate()
    answers = ["Paris", " Paris", "\nParis", "1. Paris", "é", "的", "<b>", "\n\n- one"]
    rows = [Row(n, "Name it.", "word", (answer,)) for n, answer in enumerate(answers)]
    prompts, _ = encode_prompts(rows, template, tokenizer, 256)
    outcomes = encode_batch(rows, template, tokenizer, 512, 256)
    for row, prompt, outcome in zip(rows, prompts, outcomes, strict=True):
        text = template.render(row)[0].text
        assert prompt == tokenizer(text)["input_ids"]
        assert outcome.encoded is not None
        ids = outcome.encoded.input_ids
        assert ids[: len(prompt)] == prompt
        if not outcome.kept_border:
            assert ids == [*tokenizer(text + row.responses[0])["input_ids"], tokenizer.eos_token_id]
        if name == "gpt2":
            # As before: bytes have no dummy prefix, so prompt and answer apart have the same tokens as together.
            assert ids == [*prompt, *tokenizer(row.responses[0])["input_ids"], tokenizer.eos_token_id]
    kept = [row.responses[0] for row, outcome in zip(rows, outcomes, strict=True) if outcome.kept_border]
    assert kept == (["\n\n- one"] if name == "gpt2" else [])
    if name == "tinyllama":
        first = outcomes[0].encoded.input_ids[len(prompts[0])]
        assert tokenizer.convert_ids_to_tokens(first) == "Par"
