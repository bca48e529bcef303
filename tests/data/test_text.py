from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data.encoding import packing
from deltakd.data.encoding.packing import pack_texts
from tests.data.conftest import Factory


def test_blocks_hold_the_documents_joined_by_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack_texts(["abcd", "efg", "hi"], tokenizer, 5)
    assert [tokenizer.decode(block.input_ids) for block in packed] == ["abcd</s>", "efg</s>h", "i</s>"]
    assert all(block.labels == block.input_ids for block in packed)
    assert packed.valid_tokens.tolist() == [4, 4, 1]
    assert packed.row_ids.tolist() == [0, 1, 2]


def test_a_last_block_of_one_token_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.decode(block.input_ids) for block in pack_texts(["abcde"], tokenizer, 5)] == ["abcde"]


def test_long_documents_keep_their_text(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PIECE_BLOCKS", 1)
    document = "some words\nand lines " * 50 + "x" * 100
    packed = pack_texts([document], tokenizer, 8)
    assert tokenizer.decode(packed.input_ids.tolist()).removesuffix("</s>") == document[: len(packed.input_ids)]


def test_budget_is_shared_by_all_documents(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PIECE_BLOCKS", 1)
    texts = [letter * 3000 for letter in "abcd"]
    packed = pack_texts(texts, tokenizer, 8, max_tokens=2000)
    assert len(packed.input_ids) == packed.counts["tokens"] == 2000
    written = tokenizer.decode(packed.input_ids.tolist())
    assert all(200 < written.count(letter) < 800 for letter in "abcd")
    assert pack_texts(texts, tokenizer, 8, max_tokens=2000).input_ids.tolist() == packed.input_ids.tolist()


def test_cache(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack_texts(["abcd", "efg"], tokenizer, 5, tmp_path)
    monkeypatch.setattr(packing, "TextEncoder", None)
    again = pack_texts(["abcd", "efg"], tokenizer, 5, tmp_path)
    assert list(first) == list(again)
    assert first.fingerprint == again.fingerprint


def test_refusals(tokenizer: PreTrainedTokenizerFast, make_tokenizer: Factory) -> None:
    with pytest.raises(ValueError, match="block_length = 1"):
        pack_texts(["abc"], tokenizer, 1)
    with pytest.raises(ValueError, match="max_tokens = 0; give at least 2, or null"):
        pack_texts(["abc"], tokenizer, 4, max_tokens=0)
    with pytest.raises(ValueError, match="no EOS token"):
        pack_texts(["abc"], make_tokenizer(eos_token=None), 4)
    with pytest.raises(ValueError, match=r"1 document\(s\) with 1 token\(s\)"):
        pack_texts([""], tokenizer, 4)
