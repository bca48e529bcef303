"""The library's own tokenizer classes, with the splits and normalizers of their families, on a small vocabulary."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers
from tokenizers import pre_tokenizers

from deltakd.data import PlainTemplate, encode_prompts
from deltakd.data.encoding.encode import encode_batch
from deltakd.data.sources.rows import Row
from deltakd.types import IGNORE_INDEX
from tests.data.tokenizers import BYTES, LETTERS

PIECES = ("a", "b", " ", "\n", ":", "ab", " a", "12", "é", "\n\n", "  ", ".", "e", "\u0301", "的", "'s", "A")
BARE = PlainTemplate("{instruction}{input}", "{instruction}", "")

BYTE_MERGES = [("Ċ", "Ċ"), ("Ġ", "a"), ("a", "b"), (":", "Ċ"), ("Ã", "©")]
BYTE_VOCAB = {
    piece: number
    for number, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, BYTE_MERGES)])
}
BLANK_MERGES = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
SPECIAL = ("<unk>", "<s>", "</s>")
BLANK_PIECES = (*SPECIAL, *BYTES, "▁", *LETTERS.replace("\n", ""), *map("".join, BLANK_MERGES))
BLANK_VOCAB = {piece: number for number, piece in enumerate(dict.fromkeys(BLANK_PIECES))}
SCORES = [(piece, 0.0) for piece in (*SPECIAL, "<pad>")] + [(letter, -9.0) for letter in ("▁", *LETTERS)]
SCORES += [("▁a", -3.0), ("ab", -2.5)]

BYTES_BPE = {"vocab": BYTE_VOCAB, "merges": BYTE_MERGES}
BLANK_BPE = {"vocab": BLANK_VOCAB, "merges": BLANK_MERGES}
LIBRARY: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": BYTES_BPE,
    "GPTNeoXTokenizer": BYTES_BPE,
    "Qwen2Tokenizer": BYTES_BPE,
    "Qwen3_5Tokenizer": BYTES_BPE,
    "CohereTokenizer": BYTES_BPE,
    "RobertaTokenizer": BYTES_BPE,
    "LlamaTokenizer": BLANK_BPE,
    "CodeLlamaTokenizer": BLANK_BPE,
    "GemmaTokenizer": BLANK_BPE,
    "T5Tokenizer": {"vocab": SCORES},
    "XGLMTokenizer": {"vocab": SCORES},
}


@pytest.mark.parametrize("name", LIBRARY)
def test_what_is_trained_follows_what_generation_sees(name: str) -> None:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    tokenizer = kind(**LIBRARY[name])
    end = tokenizer.eos_token_id

    def library(text: str) -> list[int]:
        """Its own tokens, without the EOS that some write after every text."""
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1] == end and tokenizer("x")["input_ids"][-1] == end else ids

    draw = random.Random(0)
    rows = [
        Row(n, prompt="x" + "".join(draw.choices(PIECES, k=3)), responses=("".join(draw.choices(PIECES, k=3)) + "x",))
        for n in range(200)
    ]
    prompts, _ = encode_prompts(rows, BARE, tokenizer, 90)
    kept = 0
    for row, prompt, outcome in zip(rows, prompts, encode_batch(rows, BARE, tokenizer, 200, 90), strict=True):
        assert prompt == library(row.prompt or "")
        assert outcome.encoded is not None
        ids, labels = outcome.encoded.input_ids, outcome.encoded.labels
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
        whole = library((row.prompt or "") + row.responses[0])
        if outcome.kept_border:
            assert whole[: len(prompt)] != prompt
            kept += 1
        else:
            assert ids == [*whole, end]
    assert 0 < kept < len(rows) / 2


@pytest.mark.parametrize("name", LIBRARY)
def test_eos_in_data_is_text(name: str) -> None:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this version of transformers has no {name}")
    tokenizer = kind(**LIBRARY[name])
    end = str(tokenizer.eos_token)
    row = Row(0, f"a {end} b{end}", "", (f"{end} a{end}{end}b",))
    [outcome], [plain] = (encode_batch([one], BARE, tokenizer, 200, 90) for one in (row, Row(0, "a b", "", ("ab",))))
    if name == "CodeLlamaTokenizer":
        assert "which CodeLlamaTokenizer can't write as text" in str(outcome.problem)
        return
    assert outcome.control_tokens
    assert outcome.encoded is not None
    assert plain.encoded is not None
    ids = outcome.encoded.input_ids
    assert ids.count(tokenizer.eos_token_id) == plain.encoded.input_ids.count(tokenizer.eos_token_id)
    assert ids[-1] == tokenizer.eos_token_id
    decoded = "".join(tokenizer.decode(ids).split())
    assert "".join((row.instruction + row.responses[0]).split()) in decoded or tokenizer.unk_token_id in ids
