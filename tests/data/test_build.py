from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deltakd.data.load import LoadedSets, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.sources.rows import Row
from deltakd.data.sources.tasks import GENERIC_INPUTS, task_digests, unlike

Write = Callable[[str, Any], str]
TEMPLATE = {"with_input": "{instruction}|{input}>", "without_input": "{instruction}>", "tail": ">"}


@pytest.fixture
def load(write: Write, tokenizer: PreTrainedTokenizerFast) -> Callable[..., LoadedSets]:
    source = write("train.jsonl", [{"instruction": f"Do  {n // 2}", "output": f"answer {n}"} for n in range(20)])
    options: dict[str, Any] = {"train": source, "template": TEMPLATE, "max_length": 50, "max_prompt_length": 20}
    return lambda **changes: load_instruction_sets(**options | {"tokenizer": tokenizer} | changes)


def test_held_out_rows_share_no_instruction_with_training(load: Callable[..., LoadedSets]) -> None:
    sets = load(val_size=4)
    held = {row.id // 2 for row in sets.val_rows}
    assert sets.val is not None
    assert sets.val.row_ids.tolist() == [row.id for row in sets.val_rows]
    assert len(sets.val_rows) == 4
    assert held.isdisjoint({row_id // 2 for row_id in sets.train.row_ids.tolist()})
    assert sets.counts["train_rows"] + sets.counts["val_rows"] + sets.counts["excluded"] == 20
    assert list(load(val_size=4).val_rows) == list(sets.val_rows)
    assert list(load(val_size=4, seed=1).val_rows) != list(sets.val_rows)


def test_excluded_instructions(load: Callable[..., LoadedSets], write: Write) -> None:
    test_set = write("test.jsonl", [{"instruction": "do 3\n"}, {"instruction": "DO 5", "output": "x"}])
    sets = load(exclude=[test_set], val_size=4)
    ids = {*sets.train.row_ids.tolist(), *(row.id for row in sets.val_rows)}
    assert ids.isdisjoint({6, 7, 10, 11})
    with pytest.raises(ValueError, match=r"all 20 training rows are also in data.exclude"):
        load(exclude=[write("all.jsonl", [{"instruction": f"do {n}"} for n in range(10)])])


def test_generic_instructions_are_told_apart_by_their_input() -> None:
    rows = [Row(n, "Finish this.", f"story {n}") for n in range(GENERIC_INPUTS + 1)] + [Row(90, "Who?", "a [3]")]
    banned = [Row(0, "finish  this.", "Story 2"), Row(1, "who?", "a")]
    kept = unlike(task_digests(rows), task_digests(banned))
    assert [row.id for row, keep in zip(rows, kept, strict=True) if keep] == [0, 1, 3, 4, 5]


def test_given_validation_and_limit(load: Callable[..., LoadedSets], write: Write) -> None:
    sets = load(val=write("val.jsonl", [{"instruction": "else", "output": "y"}] * 3), limit=2, val_size=7)
    assert (len(sets.train), len(sets.val_rows)) == (2, 2)
    assert load(limit=4).val is None
    with pytest.raises(ValueError, match=r"data.val_size = 20; it must be from 0 to less than the 20 training rows"):
        load(val_size=20)


def test_what_happened_is_logged_in_a_sentence(
    load: Callable[..., LoadedSets], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="deltakd.data.load"):
        sets = load(max_length=13, max_prompt_length=4)
    (record,) = caplog.records
    assert "20 examples with 180 valid tokens" in record.getMessage()
    assert "0 training rows were left out as tasks of validation rows or of data.exclude" in record.getMessage()
    assert "20 prompts and 10 responses were cut" in record.getMessage()
    assert sets.counts["train/cut_prompts"] == 20


def test_text_sets(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train, val = write("a.txt", "x" * 99), write("b.txt", "y" * 99)
    sets = load_text_sets(train, val, tokenizer, 10, 50, tmp_path / "cache", val_max_tokens=20)
    assert sets.val is not None
    assert (len(sets.train), len(sets.val), sets.val_rows) == (5, 2, [])
    assert sets.counts["train/tokens"] == 50
    assert load_text_sets(train, None, tokenizer, 10).val is None


def test_conversations_that_begin_alike_are_different_tasks(write: Write) -> None:
    def talk(n: int, **system: str) -> dict[str, Any]:
        turns = [("user", "Hi"), ("assistant", "Hello"), ("user", f"Tell me of river {n}"), ("assistant", f"It is {n}")]
        return {"messages": [{"role": role, "content": text} for role, text in [*system.items(), *turns]]}

    split = split_rows(write("a.jsonl", [talk(n) for n in range(200)]), val_size=20)
    assert (len(split.train), len(split.val), split.excluded) == (180, 20, 0)
    rows = [talk(1, system=f"You are clerk {n}") for n in range(200)]
    assert split_rows(write("b.jsonl", rows), val_size=20).excluded == 0
    assert split_rows(write("c.jsonl", [*rows, *rows]), val_size=20, seed=1).excluded > 0
