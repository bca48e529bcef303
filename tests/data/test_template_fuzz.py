"""Rows of anything, through templates of every family: right or named, and what is trained follows its prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deltakd.data import ChatTemplate, encode_prompts
from deltakd.data.encoding.encode import encode_batch
from deltakd.data.encoding.examples import examples
from deltakd.data.sources.rows import Row, RowError, is_answer
from deltakd.types import IGNORE_INDEX
from tests.data.template_families import FAMILIES

WORDS = ("a", "Hi", "\n", "  ", ":", "é", "的", "12", "<think>", "</think>", "{{", "%}", "'s", "\n\n", "e\u0301", "🙂")


def draw_text(draw: random.Random, controls: list[str]) -> str:
    words = [*WORDS, *draw.sample(controls, min(3, len(controls)))]
    text = "".join(draw.choices(words, k=draw.randint(1, 7)))
    return text if text.strip() else "x" + text


def draw_row(draw: random.Random, number: int, controls: list[str]) -> Row:
    if draw.random() < 0.3:
        return Row(number, draw_text(draw, controls), "", (draw_text(draw, controls),))
    turns: list[dict[str, Any]] = []
    if draw.random() < 0.3:
        turns.append({"role": "system", "content": draw_text(draw, controls)})
    for _ in range(draw.randint(1, 3)):
        turns.append({"role": "user", "content": draw_text(draw, controls)})
        turns.append({"role": "assistant", "content": draw_text(draw, controls)})
        if draw.random() < 0.2:
            turns[-1]["reasoning_content"] = draw_text(draw, controls)
        if draw.random() < 0.2:
            turns[-1]["weight"] = draw.choice((0, 1))
        if draw.random() < 0.1:
            call = {"name": "f", "arguments": {"x": draw_text(draw, controls), "n": 3}}
            turns[-1]["tool_calls"] = [{"type": "function", "function": call}]
    return Row(number, messages=tuple(turns), tools=({"name": "f"},) if draw.random() < 0.1 else None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rows_of_anything_are_right_or_named(family: Any) -> None:
    draw = random.Random(family.name)
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    controls = [token.content for token in tokenizer.added_tokens_decoder.values()]
    rows = [draw_row(draw, number, controls) for number in range(12)]
    rows += [example for row in rows for example in examples(row, split_turns=True)]
    right = []
    for row, outcome in zip(rows, encode_batch(rows, template, tokenizer, 4000, 3000), strict=True):
        if outcome.problem is None:
            right.append((row, outcome.encoded))
        else:
            assert isinstance(outcome.problem, RowError)
            assert str(outcome.problem).startswith(f"row {row.id}")
            assert "\\U0010" not in str(outcome.problem)
    prompts, cut = encode_prompts([row for row, _ in right], template, tokenizer, 3000)
    assert not cut
    for (row, encoded), prompt in zip(right, prompts, strict=True):
        assert encoded is not None
        ids, labels = encoded.input_ids, encoded.labels
        starts = [n for n in range(1, len(ids)) if labels[n] != IGNORE_INDEX and labels[n - 1] == IGNORE_INDEX]
        assert len(starts) == (1 if row.messages is None else sum(map(is_answer, row.messages)))
        assert ids[: starts[-1]] == prompt
        assert labels[-1] == ids[-1] == tokenizer.eos_token_id
