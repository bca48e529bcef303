"""Groups of tokens: their bins, classes, means and standard errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deltakd.evaluation.token_groups import (
    CLASSES,
    END,
    MEASURES,
    NUMBER,
    POSITIONS,
    PUNCTUATION,
    WHITESPACE,
    WORD_CONTINUATION,
    WORD_START,
    Estimate,
    Preservation,
    ViewedRow,
    ViewedToken,
    position_bin,
    summarise,
    summarise_tokens,
    token_class,
)


def test_position_bins() -> None:
    edges = {0: "0", 1: "1", 2: "2-3", 3: "2-3", 4: "4-7", 7: "4-7", 8: "8-15", 31: "16-31", 32: "32-63", 63: "32-63"}
    assert {position: position_bin(position) for position in edges} == edges
    assert {position_bin(position) for position in (64, 65, 128, 5000)} == {"64+"}
    assert {position_bin(position) for position in range(100)} == set(POSITIONS)


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        (" cat", "the", WORD_START),
        ("cat", "\n", WORD_START),
        ("cat", "(", WORD_START),
        ("Cat", "", WORD_START),
        ("s", "cat", WORD_CONTINUATION),
        ("'t", "don", WORD_CONTINUATION),
        ("'cat", " ", WORD_START),
        ("\ufffd", "caf", WORD_CONTINUATION),
        ("th", "20", WORD_CONTINUATION),
        (" 2024", "in", NUMBER),
        ("5", "3", NUMBER),
        ("1,234.5", " ", NUMBER),
        (".", "end", PUNCTUATION),
        (" (", "end", PUNCTUATION),
        ("\n\n", ".", WHITESPACE),
        (" ", "a", WHITESPACE),
        ("", "a", WHITESPACE),
    ],
)
def test_classes_of_tokens(text: str, before: str, expected: str) -> None:
    assert token_class(text, before, special=False) == expected
    assert token_class(text, before, special=True) == END


def test_means_and_their_errors_against_the_jackknife_over_rows() -> None:
    """Rows of unequal length whose tokens are alike within a row: rows, not tokens, are what was drawn."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 9, 400)
    rows = np.repeat(np.arange(400), lengths)
    nll = draw.normal(3, 1, 400)[rows] + draw.normal(0, 0.1, len(rows))
    values = dict.fromkeys(MEASURES, nll)
    estimate = summarise(values, rows).measures["nll"]
    assert estimate.mean == pytest.approx(nll.mean())
    without = np.array([nll[rows != row].mean() for row in range(400)])
    jackknife = math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    assert estimate.stderr == pytest.approx(jackknife, rel=0.02)


def test_undefined_correlations_are_counted_and_left_out() -> None:
    correlation = np.array([np.nan, 0.5, 0.7, np.nan])
    values = {name: np.ones(4) for name in MEASURES} | {"correlation": correlation}
    values["kl_teacher"] = np.array([1.0, np.inf, 1.0, 1.0])
    group = summarise(values, np.array([0, 0, 1, 2]))
    assert (group.tokens, group.rows, group.undefined) == (4, 3, 2)
    assert group.measures["correlation"].mean == pytest.approx(0.6)
    assert group.measures["kl_teacher"] == Estimate(None, None)
    nothing = summarise({name: v[:1] for name, v in values.items()}, np.array([0]))
    assert nothing.measures["correlation"] == Estimate(None, None)
    assert nothing.measures["nll"] == Estimate(1.0, None)


def test_groups_by_name_in_order_and_back_from_json() -> None:
    values = {name: np.arange(4.0) for name in MEASURES}
    rows = np.array([0, 0, 1, 1])
    groups = summarise_tokens(values, rows, [NUMBER, WORD_START, NUMBER, WORD_START], CLASSES)
    assert list(groups) == [WORD_START, NUMBER]
    assert groups[NUMBER].measures["nll"].mean == 1.0
    token = ViewedToken(" a", 0.5, None, None, {"student": [(" a", 0.5), ("b", 0.25)]})
    figures = Preservation(
        measured_on={"rows": "x"},
        overall=summarise(values, rows),
        by_class=groups,
        token_view=[ViewedRow(3, "prompt", [token])],
    )
    assert Preservation.from_json(json.loads(json.dumps(figures.to_json()))) == figures
    for wrong in ({}, [], {**figures.to_json(), "overall": {"tokens": 1}}):
        with pytest.raises(ValueError, match="not a record of shift preservation"):
            Preservation.from_json(wrong)  # type: ignore[arg-type]
