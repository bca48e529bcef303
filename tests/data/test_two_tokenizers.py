"""Rows in two tokenizers: the bytes of their tokens, and the spans of their answers."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltakd.data import PlainTemplate, collate, encode_rows, make_template
from deltakd.data.encoding.align import align, common, from_first_letter
from deltakd.data.encoding.encoded_set import Encoded
from deltakd.data.encoding.token_texts import END, TokenTexts, UnalignableError
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.data.sources.rows import Row
from deltakd.models import train_tokenizer
from deltakd.types import IGNORE_INDEX, UNALIGNED
from tests.data.test_library_tokenizers import LIBRARY, PIECES

BARE = PlainTemplate("{instruction}{input}", "{instruction}", "")
TEXTS = (
    "Hello  world, naïve café 😀 漢字\n\n  tab\tx",
    " leading and trailing ",
    "日本語のテキスト。改行\r\nと👩‍👩‍👧‍👦 family",
    "def f(x):\n    return {'a': [1, 2.5]}\n",
    "1234567890 and 3.14159",
    "Ünïcödé e\u0301 ﬁ ½",
    "\n",
    "x",
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def oracle(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """The spans of two token lists of one text as pairs of borders, by brute force."""
    borders = [{sum(map(len, tokens[:n])) for n in range(len(tokens) + 1)} for tokens in (ours, theirs)]
    both = sorted(place for place in range(sum(map(len, ours)) + 1) if place in borders[0] and place in borders[1])
    return list(itertools.pairwise(both))


def text_of(tokens: Sequence[str], spans: Sequence[int]) -> str:
    return "".join(token for token, span in zip(tokens, spans, strict=True) if span != UNALIGNED)


def check_spans(ours: Sequence[str], theirs: Sequence[str], found: tuple[list[int], list[int]]) -> None:
    """Check what holds of every alignment: equal text span by span, none empty, none out of order."""
    count = max(found[0], default=UNALIGNED) + 1
    for spans in found:
        held = [span for span in spans if span != UNALIGNED]
        assert held == sorted(held)
        assert set(held) == set(range(count))
    for span in range(count):
        texts = [
            "".join(token for token, of in zip(tokens, spans, strict=True) if of == span)
            for tokens, spans in zip((ours, theirs), found, strict=True)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("seed", range(30))
def test_spans_of_one_text_give_the_text_and_none_can_be_shorter(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab \u00e9\u00c3") for _ in range(draw.randrange(60)))
    cuts = [sorted(draw.sample(range(1, len(text)), draw.randrange(len(text)))) if text else [] for _ in range(2)]
    sides = [[text[a:b] for a, b in itertools.pairwise([0, *of, len(text)])] if text else [] for of in cuts]
    found = align(*sides)
    check_spans(*sides, found)
    assert text_of(sides[0], found[0]) == text_of(sides[1], found[1]) == text
    assert max(found[0], default=-1) + 1 == len(oracle(*sides)) if text else not found[0]


@pytest.mark.parametrize("seed", range(30))
def test_of_texts_that_differ_only_what_both_have_is_aligned(seed: int) -> None:
    draw = random.Random(seed)
    words = ["one", " ", "two", "\n", "drei", "\u00c3\u00a9", ".", "7"]
    text = [draw.choice(words) for _ in range(30)]
    other = [word for word in text if draw.random() < 0.8]
    ours, theirs = text, [letter for word in other for letter in word]
    found = align(ours, theirs)
    check_spans(ours, theirs, found)
    both = ("".join(ours), "".join(theirs))
    stretches = list(common(*both))
    assert all(both[0][a : a + n] == both[1][b : b + n] for a, b, n in stretches)
    assert all(a + n <= c and b + n <= d for (a, b, n), (c, d, _) in itertools.pairwise(stretches))


def test_a_side_that_was_cut_is_aligned_up_to_there_and_a_changed_word_alone_is_not() -> None:
    assert align(["He", "llo", " wor"], ["Hello", " wor", "ld"]) == ([0, 0, 1], [0, 1, UNALIGNED])
    assert align(["a ", "Bc", " d"], ["a", " ", "bc", " d"]) == ([0, UNALIGNED, 1], [0, 0, UNALIGNED, 1])
    assert align([" Hi", END], ["Hi", END]) == ([UNALIGNED, 0], [UNALIGNED, 0])


def test_white_space_before_an_answer_counts_only_if_both_sides_write_it() -> None:
    assert from_first_letter([" Hi", " x"], ["Hi"]) == (["Hi", " x"], ["Hi"])
    assert from_first_letter(["\n", " ", " Hi"], ["\n", "Hi"]) == (["", "", "Hi"], ["", "Hi"])
    assert from_first_letter(["\n", "Hi"], ["\n", "Hi"]) == (["\n", "Hi"], ["\n", "Hi"])
    assert from_first_letter([], ["Hi"]) == ([], ["Hi"])


def test_a_token_without_text_joins_its_neighbour() -> None:
    assert align(["", "ab", "", "c"], ["a", "b", "c"]) == ([0, 0, 0, 1], [0, 0, 1])


def library_tokenizer(name: str) -> PreTrainedTokenizerBase:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    tokenizer: PreTrainedTokenizerBase = kind(**LIBRARY[name])
    return tokenizer


@pytest.mark.parametrize("name", LIBRARY)
def test_the_bytes_of_tokens_make_the_text_again(name: str) -> None:
    tokenizer = library_tokenizer(name)
    texts, draw = TokenTexts(tokenizer, "\ue001"), random.Random(name)
    for _ in range(50):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 12)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # What the tokenizer makes of the text: some add a space before it, or normalise it.
        expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if any(max(token) > "\xff" for token in texts.of(ids) if token):
            continue  # some of these vocabularies have few letters
        written = "".join(texts.of(ids)).encode("latin-1").decode()
        assert written in (expected, " " + expected)


PAIRS = [pair for pair in itertools.combinations(LIBRARY, 2) if pair[0] != "GPT2Tokenizer"][::3]


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_of_the_librarys_tokenizers_are_aligned_by_their_answers(pair: tuple[str, str]) -> None:
    first, second = map(library_tokenizer, pair)
    draw = random.Random("".join(pair))
    rows = [
        Row(n, *("".join(draw.choice(PIECES) for _ in range(5)) for _ in range(2)), (_answer(draw),)) for n in range(20)
    ]
    both = TwoTokenizers(Coding(BARE, first, 60, 40), Coding(BARE, second, 60, 40))
    texts = [TokenTexts(tokenizer, unknown) for tokenizer, unknown in ((first, "\ue001"), (second, "\ue002"))]
    for outcome in both.encode(rows):
        assert outcome.problem is None
        if outcome.encoded is None:
            continue
        own, other = outcome.encoded, outcome.encoded.other
        assert own.spans is not None
        assert other is not None
        assert other.spans is not None
        assert all(span == UNALIGNED for span, label in zip(own.spans, own.labels, strict=True) if label < 0)
        if not outcome.cut_response and not outcome.cut_other:
            assert own.spans[-1] == other.spans[-1] >= 0, "the ends are aligned"
        sides = [side.of(row.input_ids) for side, row in zip(texts, (own, other), strict=True)]
        assert text_of(sides[0], own.spans).strip() == text_of(sides[1], other.spans).strip()


def _answer(draw: random.Random) -> str:
    return "".join(draw.choice([piece for piece in PIECES if piece != "\u0301"]) for _ in range(6)) + "a"


def real(shared_dir: Path, name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name)
    return tokenizer


def test_real_tokenizers_write_the_bytes_of_a_text_and_share_its_spans(shared_dir: Path) -> None:
    gpt2, llama = real(shared_dir, "gpt2"), real(shared_dir, "tinyllama")
    rows = [Row(n, "Say it:\n", "", (text if text.strip() else "a" + text,)) for n, text in enumerate(TEXTS)]
    texts = {gpt2: TokenTexts(gpt2, "\ue001"), llama: TokenTexts(llama, "\ue002")}
    for first, second in ((gpt2, llama), (llama, gpt2)):
        all_encoded = encode_rows(
            rows, BARE, first, max_length=300, max_prompt_length=50, teachers=Coding(BARE, second, 300, 50)
        )
        for row, encoded in zip(rows, all_encoded, strict=True):
            assert encoded.other is not None
            sides = [texts[first].of(encoded.input_ids), texts[second].of(encoded.other.input_ids)]
            answers = [
                [token for token, label in zip(side, part.labels, strict=True) if label != IGNORE_INDEX]
                for side, part in zip(sides, (encoded, encoded.other), strict=True)
            ]
            assert encoded.spans is not None
            held = text_of(sides[0], encoded.spans)
            assert held.removesuffix(END).encode("latin-1").decode() == row.responses[0]
            assert held.endswith(END)
            assert max(encoded.spans) + 1 == len(oracle(*answers))


def with_chat(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    if "im_start" in template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def test_each_side_has_its_own_chat_template_and_only_answers_and_their_ends_are_aligned(shared_dir: Path) -> None:
    gpt2 = with_chat(real(shared_dir, "gpt2"), CHAT)
    llama = with_chat(real(shared_dir, "tinyllama"), LLAMA_CHAT)
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there 😀!"})
    more = ({"role": "user", "content": "And\nthen?"}, {"role": "assistant", "content": "  Nothing — the end."})
    rows = [Row(0, "", "", (), messages=turns + more), Row(1, "Ask", "", ("An answer.",))]
    encoded = encode_rows(
        rows,
        make_template("chat", gpt2),
        gpt2,
        max_length=200,
        max_prompt_length=100,
        teachers=Coding(make_template("chat", llama), llama, 200, 100),
    )
    texts = TokenTexts(gpt2, "\ue001"), TokenTexts(llama, "\ue002")
    held = []
    for row in encoded:
        assert row.other is not None
        assert row.spans is not None
        assert row.other.spans is not None
        assert row.input_ids[-1] == gpt2.eos_token_id != row.other.input_ids[-1] == llama.eos_token_id
        sides = [text_of(side.of(of.input_ids), of.spans) for side, of in zip(texts, (row, row.other), strict=True)]
        answers = [[answer.strip() for answer in side.split(END)] for side in sides]
        assert answers[0] == answers[1]
        held.append("|".join(answers[0]).encode("latin-1").decode())
    # One template writes a space before each answer, the other keeps those of the data: both leave the words whole.
    assert held == ["Hello there 😀!|Nothing — the end.|", "An answer.|"]


def test_rows_that_were_cut_on_one_side_are_aligned_up_to_the_cut_and_counted(shared_dir: Path) -> None:
    gpt2, llama = real(shared_dir, "gpt2"), real(shared_dir, "tinyllama")
    rows = [Row(n, "Tell me.\n", "", ("word " * length + "end",)) for n, length in enumerate((3, 60))]
    encoded = encode_rows(rows, BARE, gpt2, max_length=80, max_prompt_length=20, teachers=Coding(BARE, llama, 40, 10))
    assert encoded.counts["cut_others"] == 1
    assert encoded.other is not None
    assert encoded.other.lengths.max() == 40
    cut = encoded[1]
    assert cut.spans is not None
    assert cut.other is not None
    aligned = [place for place, span in enumerate(cut.spans) if span != UNALIGNED]
    answer = [place for place, label in enumerate(cut.labels) if label != IGNORE_INDEX]
    # Every word is one token in both; the end of a row that was cut is on one side alone.
    assert aligned == answer[: len(aligned)]
    assert len(aligned) == sum(label != IGNORE_INDEX for label in cut.other.labels)
    assert encoded.aligned_fraction == (len(encoded[0].labels) - answer[0] + len(aligned)) / encoded.valid_tokens.sum()


def test_a_batch_holds_both_sides_and_the_spans_of_all_its_rows(shared_dir: Path) -> None:
    gpt2, llama = real(shared_dir, "gpt2"), real(shared_dir, "tinyllama")
    rows = [Row(n, "Ask", "", (text + "a",)) for n, text in enumerate(TEXTS)]
    encoded = encode_rows(rows, BARE, gpt2, max_length=99, max_prompt_length=20, teachers=Coding(BARE, llama, 120, 20))
    batch = collate(list(encoded), 0, 0, 1)
    assert batch.other is not None
    alignment, other = batch.other.alignment, batch.other.stream
    assert len(alignment.student_spans) == len(batch.labels_N)
    assert len(alignment.other_spans) == len(other.labels_N)
    for spans, stream in ((alignment.student_spans, batch), (alignment.other_spans, other)):
        row_of_span = {}
        for span, row in zip(spans.tolist(), stream.rows_N.tolist(), strict=True):
            assert row_of_span.setdefault(span, row) == row or span == UNALIGNED
    counts = [max(row.spans or [UNALIGNED]) + 1 for row in encoded]
    assert alignment.count == sum(counts)
    alone = collate([Encoded(row.input_ids, row.labels, row.row_id) for row in encoded], 0, 0, 1)
    assert alone.other is None
    assert torch.equal(alone.input_ids, batch.input_ids)


def test_the_tokens_of_two_real_vocabularies_are_mapped_by_their_bytes(shared_dir: Path) -> None:
    gpt2, llama = real(shared_dir, "gpt2"), real(shared_dir, "tinyllama")
    both = TwoTokenizers(Coding(BARE, gpt2, 9, 5), Coding(BARE, llama, 9, 5))
    tokens = both.token_map(50257, 32000)
    texts = TokenTexts(gpt2, "\ue001"), TokenTexts(llama, "\ue002")
    ours, theirs = (
        side.of(ids.tolist()) for side, ids in zip(texts, (tokens.student_shared, tokens.other_shared), strict=True)
    )
    assert ours == theirs
    assert len(set(tokens.student_shared.tolist())) == len(set(tokens.other_shared.tolist())) == len(ours) > 15_000
    assert tokens.student_of_other[llama.eos_token_id] == gpt2.eos_token_id
    assert tokens.other_of_student[gpt2.eos_token_id] == llama.eos_token_id
    known = {text: token for token, text, _ in texts[0].vocabulary()}
    for token in range(3, 32000, 37):
        text = texts[1].of([token])[0]
        prefixes = [text[:stop] for stop in range(len(text), 0, -1) if text[:stop] in known]
        assert int(tokens.student_of_other[token]) == (known[prefixes[0]] if prefixes else -1)


def test_the_same_tokenizer_twice_gives_the_identity() -> None:
    tokenizer = train_tokenizer(["a few words to merge, a few words"] * 3, 280)
    rows = [Row(0, "ask", "", ("a few words — 漢",))]
    coding = Coding(BARE, tokenizer, 60, 9)
    [encoded] = encode_rows(rows, BARE, tokenizer, max_length=60, max_prompt_length=9, teachers=coding)
    assert encoded.other is not None
    trained = [span for span, label in zip(encoded.spans or [], encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert trained == list(range(len(trained)))
    assert encoded.other.input_ids == encoded.input_ids
    size = len(tokenizer)
    tokens = TwoTokenizers(coding, coding).token_map(size, size)
    for ids in vars(tokens).values():
        assert torch.equal(ids, torch.arange(size))


def test_tokenizers_that_cannot_be_aligned_are_named() -> None:
    bert = transformers.BertTokenizer(vocab={"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3}, eos_token="[SEP]")
    with pytest.raises(UnalignableError, match=r"BertTokenizer.*WordPiece.*does not keep the bytes of a text"):
        TokenTexts(bert, "\ue001")
    alphabets = (("a", "b", "ab"), ("c", "d", "cd"))
    strangers = []
    for letters in alphabets:
        vocab = {piece: number for number, piece in enumerate(("</s>", "Ġ", *letters))}
        backend = Tokenizer(models.BPE(vocab, [(letters[0], letters[1])]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel()
        strangers.append(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    both = TwoTokenizers(*(Coding(BARE, tokenizer, 9, 5) for tokenizer in strangers))
    with pytest.raises(UnalignableError, match=r"share no token of more than one byte"):
        both.token_map(5, 5)


def test_rows_are_kept_for_the_next_run_by_both_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (train_tokenizer(["words to merge, words"] * 3, size) for size in (262, 270))
    rows = [Row(n, "ask", "", ("words " * n + "to",)) for n in range(4)]
    limits: dict[str, Any] = {"max_length": 60, "max_prompt_length": 9, "cache_dir": tmp_path}
    made = encode_rows(rows, BARE, first, teachers=Coding(BARE, second, 60, 9), **limits)
    alone = encode_rows(rows, BARE, first, **limits)
    assert alone.fingerprint != made.fingerprint
    assert alone.other is None
    np.testing.assert_array_equal(alone.input_ids, made.input_ids)
    monkeypatch.setattr("deltakd.data.encoding.two_tokenizers.encode_batch", None)
    again = encode_rows(rows, BARE, first, teachers=Coding(BARE, second, 60, 9), **limits)
    assert list(again) == list(made)


def test_long_texts_that_differ_early_and_late_are_aligned_between_in_time_that_grows_slowly() -> None:
    draw = random.Random(3)
    words = [f"{draw.choice('abcdef') * draw.randint(1, 5)}{number}" for number in range(300)]
    shared = [part for _ in range(6_000) for part in (" ", draw.choice(words))]
    started = time.process_time()
    spans, _ = align(["½", *shared, " ", "½", *shared[:99], "½"], ["1/2", *shared, " ", "1/2", *shared[:99], "1/2"])
    assert [place for place, span in enumerate(spans) if span == UNALIGNED] == [0, 12_002, 12_102]
    # Comparing all pairs of pieces would take four seconds.
    assert time.process_time() - started < 2
