"""Control tokens in data are text; those that a template writes are control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer

from deltakd.data import AlpacaTemplate, ChatTemplate, encode_prompt, encode_row, encode_rows, pack_texts
from deltakd.data.sources.rows import Row
from deltakd.types import IGNORE_INDEX
from tests.data.conftest import CHAT
from tests.data.tokenizers import LLAMA3_SPLIT, byte_level, sentencepiece, unigram, wordpiece

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


LETTER_PAIRS = [("a", "b")]


def control_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {id for id, token in added if token.special} - {tokenizer.unk_token_id}


def with_tokens(tokenizer: Any, template: str, *tokens: str, **flags: bool) -> Any:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True, normalized=False, **flags) for t in tokens]}
    )
    tokenizer.chat_template = template
    return tokenizer


CHATS = {
    "chatml": with_tokens(byte_level(eos_token="<|im_end|>"), CHAT),
    "llama3": with_tokens(
        byte_level((), LLAMA3_SPLIT), LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    ),
    "gemma": with_tokens(unigram(), GEMMA, "<start_of_turn>", "<end_of_turn>"),
    "llama2": with_tokens(sentencepiece(), CHAT),
    "phi3": with_tokens(sentencepiece("prepend"), CHAT.replace("<|im_end|>", "<|end|>"), "<|end|>", rstrip=True),
}


@pytest.mark.parametrize("name", CHATS)
def test_control_tokens_in_a_conversation_are_text(name: str) -> None:
    tokenizer = CHATS[name]
    template = ChatTemplate(tokenizer)
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    question = "a " + " b ".join(controls) + controls[-1] * 2
    answer = "".join(controls) + " and c"
    plain = "a b", "and c"

    def rows(question: str, answer: str) -> Row:
        turns = ((question, answer), (answer, question + "."))
        messages = [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return Row(0, messages=({"role": "system", "content": question}, *messages))

    encoded = encode_row(rows(question, answer), template, tokenizer, 3000, 2000)
    expected = encode_row(rows(*plain), template, tokenizer, 3000, 2000)
    written = control_ids(tokenizer)
    for part in ("input_ids", "labels"):
        found = [id for id in getattr(encoded, part) if id in written]
        assert found == [id for id in getattr(expected, part) if id in written]
    text = tokenizer.apply_chat_template(list(rows(question, answer).messages), tokenize=False)
    # Blanks apart, which some tokenizers strip around control tokens.
    assert "".join(tokenizer.decode(encoded.input_ids).split()).startswith("".join(text.split()))
    prompt = encode_prompt(rows(question, answer), template, tokenizer, 2000)
    assert encoded.input_ids[: len(prompt)] == prompt
    # What holds no control token is read as the tokenizer itself reads a whole conversation.
    whole = tokenizer.apply_chat_template(list(rows(*plain).messages), tokenize=True, return_dict=False)
    assert whole[: len(expected.input_ids) - 1] == expected.input_ids[:-1]


@pytest.mark.parametrize("name", ["gpt2", "tinyllama"])
def test_control_tokens_in_an_instruction_are_text(shared_dir: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    end = tokenizer.eos_token
    row = Row(0, f"Say {end} twice.", f"{end}", (f"It is {end}, and {end}{end} twice, {end}.",))
    encoded = encode_row(row, AlpacaTemplate(), tokenizer, 500, 400)
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    text = "".join(segment.text for segment in AlpacaTemplate().render(row))
    split = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert encoded.input_ids[:-1] == split
    answer = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(answer[:-1]).strip() == row.responses[0]


def test_a_piece_of_the_model_is_text_too() -> None:
    """A unigram model's control tokens are pieces of it, which its own option to split them does not split."""
    tokenizer = unigram()
    end = tokenizer.eos_token_id
    assert end in tokenizer("a </s>b", split_special_tokens=True)["input_ids"]
    encoded = encode_row(Row(0, "a </s>b", "", ("c </s>d",)), AlpacaTemplate(), tokenizer, 900, 800)
    assert encoded.input_ids.count(end) == 1


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram, wordpiece])
def test_an_answer_that_ends_with_eos_has_one_and_a_prompt_of_the_users_own_keeps_its_control_tokens(make: Any) -> None:
    tokenizer = make()
    row = Row(0, prompt="<s>a<|im_start|>b", responses=("c</s>d</s>",))
    encoded = encode_row(row, AlpacaTemplate(), tokenizer, 900, 800)
    control = [id for id in encoded.input_ids if id in control_ids(tokenizer)]
    assert tokenizer.convert_ids_to_tokens(control) == ["<s>", "<|im_start|>", "</s>"]
    assert encoded.labels[-1] == tokenizer.eos_token_id


def test_an_answer_of_nothing_but_eos_is_named() -> None:
    with pytest.raises(ValueError, match="row 5: an answer is empty, but for EOS; take the row out"):
        encode_row(Row(5, "a", "", ("</s>",)), AlpacaTemplate(), byte_level(), 900, 800)


def test_rows_with_control_tokens_are_counted_and_what_cannot_be_told_apart_is_named() -> None:
    tokenizer = byte_level()
    rows = [Row(0, "a", "", ("b",)), Row(1, "a <|im_end|>", "", ("b",)), Row(2, "a", "", ("</s> b",))]
    counts = encode_rows(rows, AlpacaTemplate(), tokenizer, max_length=400, max_prompt_length=300).counts
    assert counts["control_tokens"] == 2
    with pytest.raises(ValueError, match=r"row 3 holds a control token of the tokenizer and a private character"):
        encode_row(Row(3, "a </s> \U00100000", "", ("b",)), AlpacaTemplate(), tokenizer, 400, 300)
    with pytest.raises(ValueError, match=r"row 4 holds the control token '</s>', which ByT5Tokenizer can't write"):
        encode_row(Row(4, "a </s> b", "", ("b",)), AlpacaTemplate(), ByT5Tokenizer(), 400, 300)


def test_control_tokens_in_documents_are_text_and_one_ends_each() -> None:
    tokenizer = byte_level(LETTER_PAIRS)
    packed = pack_texts(["ab</s>c", "<|im_start|>"], tokenizer, 64)
    control = [id for id in packed.input_ids.tolist() if id in control_ids(tokenizer)]
    assert control == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(packed.input_ids.tolist()) == "ab</s>c</s><|im_start|></s>"
    with pytest.raises(ValueError, match=r"the document that begins with 'a</s>.*private character"):
        pack_texts(["a</s>\U00100000"], tokenizer, 64)


def test_messages_show_the_control_tokens_of_a_row() -> None:
    tokenizer = byte_level(eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT.replace("{{ m['content'] }}", "{{ m['content'][:2] }}")
    with pytest.raises(ValueError, match=r"row 6: .* part of the answer: 'a<s>b</s>\|' is not in what would"):
        encode_row(Row(6, "a", "", ("a<s>b</s>|",)), ChatTemplate(tokenizer), tokenizer, 900, 800)


def test_added_words_that_are_no_control_tokens_stay_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<|user|>", special=False)])
    encoded = encode_row(Row(0, "a", "", ("<think>b<|user|>",)), AlpacaTemplate(), tokenizer, 400, 300)
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 0
