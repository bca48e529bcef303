from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltakd.data.encoding import token_table, two_tokenizers
from deltakd.data.encoding.chat_template import ChatTemplate
from deltakd.data.encoding.encode import encode_prompt, encode_row
from deltakd.data.encoding.templates import AlpacaTemplate, PlainTemplate, make_template
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.sources.parsing import parse_row
from deltakd.data.sources.rows import Row, row_record, with_answer
from deltakd.types import IGNORE_INDEX
from tests.data.conftest import CHAT, Factory

PLAIN = PlainTemplate("{instruction}|{input}\n>", "{instruction}\n>", "\n>")
TURNS = ("q", "aa", "r", "bb")
TALK = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(TURNS))


def encode(
    row: Row, tokenizer: Any, longest: int = 100, prompt: int = 50, overlong: str = "cut", template: Any = PLAIN
):
    encoded = encode_row(row, template, tokenizer, longest, prompt, overlong)
    assert encoded is not None
    return encoded


def trained(encoded: Any) -> list[int]:
    """The trained ids, checked to stand at their own place: labels are not shifted."""
    assert all(b in (a, IGNORE_INDEX) for a, b in zip(encoded.input_ids, encoded.labels, strict=True))
    return [label for label in encoded.labels if label != IGNORE_INDEX]


def test_prompt_is_masked_and_response_and_eos_are_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Row(7, "ask", "", ("answer",)), tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<s>ask\n>answer</s>"
    assert tokenizer.decode(trained(encoded)) == "answer</s>"
    assert encoded.labels[: len("<s> ask\n>") - 3] == [IGNORE_INDEX] * 6
    assert encoded.row_id == 7


@pytest.mark.parametrize("around", [None, "$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_special_tokens(make_tokenizer: Factory, around: str | None) -> None:
    encoded = encode(Row(0, "ask", "", ("answer",)), make_tokenizer(around))
    bos = "<s>" if around and around.startswith("<s>") else ""
    assert make_tokenizer().decode(encoded.input_ids) == f"{bos}ask\n>answer</s>"


def test_eos_is_not_doubled_and_bos_neither(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Row(0, prompt="<s>ask", responses=("answer</s>",)), tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<s>ask" + "answer</s>"


def test_eos_as_pad_is_still_trained(make_tokenizer: Factory) -> None:
    encoded = encode(Row(0, "ask", "", ("answer",)), make_tokenizer(pad_token="</s>"))
    assert encoded.labels[-1] == encoded.input_ids[-1] == 2


def test_tokenizer_without_eos_is_refused(make_tokenizer: Factory) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encode(Row(0, "ask", "", ("answer",)), make_tokenizer(eos_token=None))


def test_prompt_of_generation_is_that_of_training(tokenizer: PreTrainedTokenizerFast, make_tokenizer: Factory) -> None:
    chat = make_tokenizer("<s> $A", chat_template=CHAT)
    rows = [Row(0, "a" * n, "b" * (n % 7), ("c",)) for n in (1, 30, 60)]
    rows += [Row(0, prompt="p" * n, responses=("c",)) for n in (1, 60)]
    for template, tok in ((PLAIN, tokenizer), (ChatTemplate(chat), chat)):
        for row in rows:
            prompt = encode_prompt(row, template, tok, 50)
            encoded = encode(row, tok, template=template)
            assert len(prompt) <= 50
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
            assert encoded.labels[len(prompt)] != IGNORE_INDEX


def test_an_answered_row_has_the_prompt_of_the_row_before(
    tokenizer: PreTrainedTokenizerFast, make_tokenizer: Factory
) -> None:
    chat = make_tokenizer("<s> $A", chat_template=CHAT)
    follow_up = {"role": "user", "content": "left out"}
    rows = [Row(0, "a", "b", ("c", "d")), Row(0, "a" * 60, "", ("c",)), Row(0, prompt="p", responses=("c",))]
    rows += [Row(0, messages=TALK), Row(0, messages=(*TALK, follow_up))]
    for template, tok in ((PLAIN, tokenizer), (ChatTemplate(chat), chat)):
        for row in rows:
            answered = parse_row(row_record(with_answer(row, " An answer")), "f:1", 0)
            prompt = encode_prompt(row, template, tok, 200)
            assert encode_prompt(answered, template, tok, 200) == prompt
            encoded = encode(answered, tok, 300, 200, template=template)
            assert encoded.input_ids[: len(prompt)] == prompt
            assert tok.decode(encoded.input_ids[len(prompt) :], skip_special_tokens=True) == " An answer"


def test_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Row(0, messages=TALK), tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<s>q\n>aa</s>r\n>bb</s>"
    assert tokenizer.decode(trained(encoded)) == "aa</s>bb</s>"
    assert tokenizer.decode(encode_prompt(Row(0, messages=TALK), PLAIN, tokenizer, 50)) == "<s>q\n>aa</s>r\n>"


def test_chat_conversation(make_tokenizer: Factory) -> None:
    tokenizer = make_tokenizer("<s> $A", chat_template=CHAT, eos_token="<|im_end|>")
    encoded = encode(Row(0, messages=TALK), tokenizer, 200, 100, template=ChatTemplate(tokenizer))
    assert tokenizer.decode(trained(encoded)) == "aa<|im_end|>bb<|im_end|>"
    assert tokenizer.decode(encoded.input_ids).endswith("bb<|im_end|>")
    other = make_tokenizer(chat_template=CHAT)
    ended = encode(Row(0, messages=TALK), other, 200, 100, template=ChatTemplate(other))
    assert other.decode(trained(ended)) == "aa<|im_end|>bb<|im_end|></s>"


def test_cut_prompt_keeps_head_and_tail(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Row(0, "0123456789", "", ("answer",)), tokenizer, prompt=8)
    assert tokenizer.decode(encoded.input_ids) == "<s>01234\n>answer</s>"
    with pytest.raises(ValueError, match=r"max_prompt_length = 2 leaves no room before .* of 2 tokens; raise it"):
        encode(Row(0, "0123456789", "", ("answer",)), tokenizer, prompt=2)


def test_cut_prompt_of_the_users_own_keeps_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Row(0, prompt="0123456789", responses=("answer",)), tokenizer, prompt=8)
    assert tokenizer.decode(encoded.input_ids) == "<s>3456789answer</s>"


def test_cut_response_has_no_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, "ask", "", ("answer",))
    assert tokenizer.decode(trained(encode(row, tokenizer, 13, 6))) == "answer</s>"
    assert tokenizer.decode(trained(encode(row, tokenizer, 12, 6))) == "answer"
    assert tokenizer.decode(trained(encode(row, tokenizer, 8, 6))) == "an"


def test_drop(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(0, "ask", "", ("answer",))
    assert encode_row(row, PLAIN, tokenizer, 13, 6, "drop") is not None
    assert encode_row(row, PLAIN, tokenizer, 12, 6, "drop") is None
    assert encode_row(row, PLAIN, tokenizer, 100, 5, "drop") is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((100, 100, "cut"), "data.max_prompt_length = 100 must be .* less than data.max_length = 100"),
        ((100, 50, "trim"), "data.overlong = 'trim'; allowed: cut, drop"),
    ],
)
def test_bad_limits(tokenizer: PreTrainedTokenizerFast, limits: tuple[int, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_row(Row(0, "ask", "", ("answer",)), PLAIN, tokenizer, *limits)


def test_set_counts_and_contents(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        Row(3, "ask", "", ("one", "three")),
        Row(5, "a" * 50, "", ("b",)),
        Row(8, "ask", "", ("c" * 60,)),
        Row(9, "ask", "", ("x",)),
    ]
    cut = encode_rows(rows, PLAIN, tokenizer, max_length=40, max_prompt_length=20)
    assert cut.counts == {
        "rows": 5,
        "cut_prompts": 1,
        "cut_responses": 1,
        "dropped": 0,
        "kept_borders": 0,
        "control_tokens": 0,
    }
    assert cut.row_ids.tolist() == [3, 3, 5, 8, 9]
    assert cut.valid_tokens.tolist() == [4, 6, 2, 34, 2]
    dropped = encode_rows(rows, PLAIN, tokenizer, max_length=40, max_prompt_length=20, overlong="drop")
    assert dropped.counts == {
        "rows": 5,
        "cut_prompts": 0,
        "cut_responses": 0,
        "dropped": 2,
        "kept_borders": 0,
        "control_tokens": 0,
    }
    assert dropped.row_ids.tolist() == [3, 3, 9]
    assert [encoded.input_ids for encoded in dropped] == [cut[index].input_ids for index in (0, 1, 4)]
    assert dropped[2] == encode(rows[3], tokenizer)
    assert dropped.lengths.tolist() == [len(encoded.input_ids) for encoded in dropped]


def test_first_position_is_not_a_valid_token(make_tokenizer: Factory) -> None:
    bare = PlainTemplate("{instruction}{input}", "{instruction}", "")
    encoded = encode_rows([Row(0, "a", "", ("bc",))], bare, make_tokenizer(), max_length=9, max_prompt_length=1)
    assert encoded.valid_tokens.tolist() == [3]
    flat = token_table.EncodedSet(encoded.input_ids, encoded.input_ids, encoded.offsets, encoded.row_ids)
    assert flat.valid_tokens.tolist() == [3]


def test_all_rows_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(n, "a" * 10 * n, "", ("b" * 5,)) for n in (2, 3)]
    with pytest.raises(ValueError, match="all 2 rows are longer") as caught:
        encode_rows(rows, PLAIN, tokenizer, max_length=15, max_prompt_length=10, overlong="drop")
    assert "prompts have 23 to 33 tokens (data.max_prompt_length = 10)" in str(caught.value)
    assert "29 to 39 (data.max_length = 15)" in str(caught.value)


def test_cache_spares_the_second_tokenising(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(n, "ask", "", ("b" * n,)) for n in range(1, 5)]
    limits: dict[str, Any] = {"max_length": 20, "max_prompt_length": 10, "cache_dir": tmp_path / "deep" / "cache"}
    first = encode_rows(rows, PLAIN, tokenizer, **limits)
    tokenizer("leaves padding and truncation behind", padding="max_length", truncation=True, max_length=50)
    with monkeypatch.context() as patch:
        patch.setattr(two_tokenizers, "encode_batch", None)
        again = encode_rows(rows, PLAIN, tokenizer, **limits)
    assert first.fingerprint == again.fingerprint
    assert list(first) == list(again)
    assert first.counts == again.counts
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1


def test_cache_key_tells_everything_apart(tokenizer: PreTrainedTokenizerFast, make_tokenizer: Factory) -> None:
    rows = [Row(0, "ask", "", ("answer",))]

    def key(rows: list[Row] = rows, template: Any = PLAIN, tokenizer: Any = tokenizer, **limits: Any) -> str:
        options = {"max_length": 300, "max_prompt_length": 250, "overlong": "cut"} | limits
        return encode_rows(rows, template, tokenizer, **options).fingerprint

    keys = [
        key(),
        key([Row(1, "ask", "", ("answer",))]),
        key([Row(0, "ask", "", ("answer!",))]),
        key(template=AlpacaTemplate()),
        key(tokenizer=make_tokenizer()),
        key(tokenizer=make_tokenizer("<s> $A", eos_token="<|im_end|>")),
        key(max_length=301),
        key(max_prompt_length=251),
        key(overlong="drop"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


@pytest.mark.parametrize("name", ["gpt2", "tinyllama"])
def test_real_tokenizers(shared_dir: Path, name: str) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    template = make_template("alpaca", tokenizer)
    row = Row(0, "Name the colours.", "word " * 400, ("Red, green and blue.",))
    encoded = encode(row, tokenizer, 512, 256, template=template)
    prompt = encode_prompt(row, template, tokenizer, 256)
    assert len(prompt) == 256
    assert encoded.input_ids[:256] == prompt
    assert tokenizer.decode(prompt).endswith("word\n\n### Response:\n")
    assert (prompt[0] == tokenizer.bos_token_id) == (name == "tinyllama")
    assert tokenizer.decode(trained(encoded)).strip() == f"Red, green and blue.{tokenizer.eos_token}"
    # The tail kept after cutting has the very tokens that it has in a short prompt.
    short = encode_prompt(Row(0, "Name the colours.", "word"), template, tokenizer, 256)
    assert prompt[-6:] == short[-6:]
    assert np.array(encoded.labels[256:]).tolist() == encoded.input_ids[256:]
