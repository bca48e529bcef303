"""Diversity, length and repetition of answers, counted by hand."""

from __future__ import annotations

import pytest

from deltakd.evaluation.scoring import THINK_BLOCKS
from deltakd.evaluation.text_measures import TEXT_MEASURES, distinct, repetition, text_measures, words


def record(output: str, *references: str) -> dict[str, object]:
    return {"output": output, "reference": list(references)}


def test_words() -> None:
    assert words("It's 3.5 metres, Café_1!") == ["it", "'", "s", "3", ".", "5", "metres", ",", "café_1", "!"]
    assert words(" \n") == []


def test_distinct_and_repetition_by_hand() -> None:
    answers = [["a", "b", "a", "b"], ["a", "b"], ["c"]]
    assert distinct(answers, 1) == 3 / 7
    # ab ba ab | ab: two of four; nothing crosses from one answer to the next.
    assert distinct(answers, 2) == 2 / 4
    assert distinct(answers, 4) == 1.0
    assert distinct([["a"]], 2) == 0.0
    assert repetition(["a", "b", "a", "b", "a"], 2) == 1 - 2 / 4
    assert repetition(["a"] * 10, 4) == 1 - 1 / 7
    assert repetition(["a", "b", "c"], 4) == 0.0


def test_the_summary_averages_sampling_seeds() -> None:
    first = [record("a a a a a", "x y z", "x"), record("b", "one two")]
    second = [record("c d", "x y z", "x"), record("", "one two")]
    found = text_measures({10: first, 20: second})
    assert tuple(found) == TEXT_MEASURES
    # References have (3 + 1) / 2 + 2 words; answers 6 and 2.
    assert found["length_ratio"] == pytest.approx((6 / 4 + 2 / 4) / 2)
    assert found["distinct_1"] == pytest.approx(100 * (2 / 6 + 2 / 2) / 2)
    assert found["repetition_4"] == pytest.approx(100 * ((1 - 1 / 2) / 2 + 0) / 2)
    with pytest.raises(ValueError, match="nothing to measure"):
        text_measures({10: []})


def test_what_is_not_scored_is_not_measured() -> None:
    plain, thinking = record("a b c", "x y z"), record("<think>q q q q q</think>a b c", "x y z")
    thinking["protocol"] = {"strip": THINK_BLOCKS}
    assert text_measures({10: [thinking]}) == text_measures({10: [plain]})
