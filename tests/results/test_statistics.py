"""Spread, the paired bootstrap and Holm's correction: known cases, and coverage of synthetic worlds."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from deltakd.results.statistics import PROMPTS, SEEDS, SEEDS_AND_PROMPTS, compare, holm, spread

Scores = dict[str, NDArray[np.float64]]


def world(draw: np.random.Generator, sizes: dict[str, int], prompts: int, by_seed: float, by_prompt: float) -> Scores:
    """Methods of equal merit: common difficulty of prompts, and each method's own seeds, prompts and noise."""
    difficulty_R = draw.normal(40, 20, prompts)
    return {
        name: difficulty_R
        + draw.normal(0, by_seed, (seeds, 1))
        + draw.normal(0, by_prompt, prompts)
        + draw.normal(0, 2, (seeds, prompts))
        for name, seeds in sizes.items()
    }


def numbered(sizes: dict[str, int], paired: bool = True) -> dict[str, list[int]]:
    return {
        name: list(range(start, start + count))
        for (name, count), start in zip(sizes.items(), [0, 0 if paired else 100], strict=True)
    }


@pytest.mark.parametrize(
    ("sizes", "paired", "by_seed", "by_prompt"),
    [
        ({"sft": 5, "kd": 5}, True, 2.0, 5.0),
        ({"sft": 5, "kd": 3}, False, 2.0, 5.0),
        ({"sft": 1, "kd": 1}, True, 0.0, 5.0),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    sizes: dict[str, int], paired: bool, by_seed: float, by_prompt: float
) -> None:
    draw = np.random.default_rng(7)
    worlds = 200
    held = refused = 0
    for number in range(worlds):
        scores = world(draw, sizes, 60, by_seed, by_prompt)
        found = compare(scores, numbered(sizes, paired), "sft", resamples=500, seed=number)[0]
        held += found.low <= 0 <= found.high
        refused += found.p < 0.05
    # 95 % of 200, ± 2.6 standard errors; the plain percentile interval of five seeds holds it in 83 %.
    assert 0.91 <= held / worlds <= 0.99
    # The interval and the p-value are of one piece.
    assert abs(refused - (worlds - held)) <= 1


def test_a_difference_against_a_t_test() -> None:
    """Without variation between prompts it is the paired t-test over seeds; with one seed, that over prompts."""
    draw = np.random.default_rng(0)
    base_S, gain_S = draw.normal(30, 3, 6), draw.normal(1.2, 1, 6)
    scores = {"sft": np.tile(base_S[:, None], 40), "kd": np.tile((base_S + gain_S)[:, None], 40)}
    found = compare(scores, {name: [1, 2, 3, 4, 5, 6] for name in scores}, "sft")[0]
    expected = stats.ttest_1samp(gain_S, 0.0)
    assert found.over == SEEDS_AND_PROMPTS
    assert found.mean == pytest.approx(gain_S.mean())
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.15)
    assert found.p == pytest.approx(expected.pvalue, rel=0.25)

    gain_R = draw.normal(1, 6, 400)
    single = {"sft": np.zeros((1, 400)), "kd": gain_R[None]}
    found = compare(single, {"sft": [1], "kd": [2]}, "sft")[0]
    expected = stats.ttest_1samp(gain_R, 0.0)
    assert found.over == PROMPTS
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.05)
    assert found.p == pytest.approx(expected.pvalue, rel=0.1)


def test_one_seed_on_either_side_leaves_prompts_alone() -> None:
    draw = np.random.default_rng(1)
    scores = {"sft": draw.normal(30, 5, (1, 50)), "kd": draw.normal(30, 5, (4, 50))}
    assert compare(scores, {"sft": [0], "kd": [0, 1, 2, 3]}, "sft")[0].over == PROMPTS


def test_seeds_are_paired_by_number_not_by_order() -> None:
    draw = np.random.default_rng(2)
    sft = draw.normal(0, 10, (4, 1)) + draw.normal(0, 1, (4, 30))
    kd = sft + 1.0 + draw.normal(0, 0.1, (4, 30))
    straight = compare({"sft": sft, "kd": kd}, {"sft": [1, 2, 3, 4], "kd": [1, 2, 3, 4]}, "sft")[0]
    shuffled = compare({"sft": sft, "kd": kd[::-1]}, {"sft": [1, 2, 3, 4], "kd": [4, 3, 2, 1]}, "sft")[0]
    unpaired = compare({"sft": sft, "kd": kd}, {"sft": [1, 2, 3, 4], "kd": [5, 6, 7, 8]}, "sft")[0]
    assert (straight.low, straight.high, straight.p) == pytest.approx((shuffled.low, shuffled.high, shuffled.p))
    assert straight.low > 0.9
    assert unpaired.low < -5 < 5 < unpaired.high


def test_equal_methods() -> None:
    scores = {"sft": np.random.default_rng(3).normal(30, 5, (3, 40))}
    scores["same"] = scores["sft"].copy()
    found = compare(scores, {"sft": [0, 1, 2], "same": [0, 1, 2]}, "sft")[0]
    assert (found.mean, found.low, found.high, found.p, found.p_holm) == (0, 0, 0, 1, 1)


def test_deterministic_and_independent_of_the_other_methods() -> None:
    draw = np.random.default_rng(4)
    scores = {name: draw.normal(30, 5, (3, 40)) for name in ("sft", "kd", "delta_kd")}
    seeds = {name: [0, 1, 2] for name in scores}
    both = compare(scores, seeds, "sft")
    assert both == compare(scores, seeds, "sft")
    assert both != compare(scores, seeds, "sft", seed=1)
    del scores["kd"]
    alone = compare(scores, seeds, "sft")[0]
    assert (alone.low, alone.high, alone.p) == pytest.approx((both[1].low, both[1].high, both[1].p), rel=1e-9)
    assert alone.p_holm == alone.p
    assert [d.method for d in both] == ["kd", "delta_kd"]
    assert [d.p_holm for d in both] == holm([d.p for d in both])


def test_holm_by_hand() -> None:
    # Sorted: 0.01 · 4, 0.02 · 3, 0.03 · 2, 0.6 · 1; none may be below the one before.
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_spread() -> None:
    several = spread(np.array([[1.0, 3.0], [3.0, 5.0], [2.0, 7.0]]))
    assert several.mean == pytest.approx(3.5)
    assert several.stderr == pytest.approx(np.std([2.0, 4.0, 4.5], ddof=1) / math.sqrt(3))
    assert (several.seeds, several.over) == (3, SEEDS)
    one = spread(np.array([[1.0, 2.0, 6.0]]))
    assert one.stderr == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert (one.mean, one.seeds, one.over) == (3.0, 1, PROMPTS)
    assert spread(np.array([[4.0]])).stderr is None


def test_what_does_not_fit_is_refused_by_name() -> None:
    fine = np.zeros((2, 5))
    two = [0, 1]
    with pytest.raises(ValueError, match=r"unequal numbers of prompts: sft 5, kd 4"):
        compare({"sft": fine, "kd": fine[:, :4]}, {"sft": two, "kd": two}, "sft")
    with pytest.raises(ValueError, match=r"'base' is not among the methods sft"):
        compare({"sft": fine}, {"sft": two}, "base")
    with pytest.raises(ValueError, match=r"kd 2 scores, seeds \[3, 3\]"):
        compare({"sft": fine, "kd": fine}, {"sft": two, "kd": [3, 3]}, "sft")
    with pytest.raises(ValueError, match=r"kd 2 scores, seeds \[\]"):
        compare({"sft": fine, "kd": fine}, {"sft": two}, "sft")
    with pytest.raises(ValueError, match=r"scores of kd .* not all finite"):
        compare({"sft": fine, "kd": np.full((2, 5), np.nan)}, {"sft": two, "kd": two}, "sft")
    with pytest.raises(ValueError, match="one prompt"):
        compare({"sft": fine[:, :1], "kd": fine[:, :1]}, {"sft": two, "kd": two}, "sft")
    with pytest.raises(ValueError, match="resamples is 10"):
        compare({"sft": fine, "kd": fine}, {"sft": two, "kd": two}, "sft", resamples=10)


def test_ten_thousand_resamples_of_a_real_study_take_seconds() -> None:
    draw = np.random.default_rng(5)
    scores = {f"method_{k}": draw.normal(20, 20, (5, 500)) for k in range(8)}
    began = time.perf_counter()
    compare(scores, {name: [1, 2, 3, 4, 5] for name in scores}, "method_0")
    assert time.perf_counter() - began < 10
