"""Spread, t-intervals and Holm's correction: known cases, and coverage and errors in synthetic worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from deltakd.results.statistics import PROMPTS, SEEDS, SEEDS_AND_PROMPTS, Difference, compare, holm, spread

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


def rates(sizes: dict[str, int], paired: bool, by_seed: float, by_prompt: float, worlds: int) -> tuple[float, float]:
    """The shares of worlds in which the interval holds the truth, and in which p is at most 0.01."""
    draw = np.random.default_rng(7)
    held = small = 0
    for _ in range(worlds):
        found = compare(world(draw, sizes, 60, by_seed, by_prompt), numbered(sizes, paired), "sft")[0]
        held += found.low <= 0 <= found.high
        small += found.p <= 0.01
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    return held / worlds, small / worlds


#: Seeds of both sides, whether they are the same, standard deviations between seeds and between prompts.
WORLDS = [
    ({"sft": 3, "kd": 3}, True, 2.0, 0.0),
    ({"sft": 5, "kd": 5}, True, 2.0, 5.0),
    ({"sft": 5, "kd": 3}, False, 2.0, 5.0),
    ({"sft": 2, "kd": 2}, True, 0.5, 5.0),
    ({"sft": 1, "kd": 1}, True, 0.0, 5.0),
]


@pytest.mark.parametrize(("sizes", "paired", "by_seed", "by_prompt"), WORLDS)
def test_intervals_hold_the_truth_as_often_as_they_say(
    sizes: dict[str, int], paired: bool, by_seed: float, by_prompt: float
) -> None:
    held, small = rates(sizes, paired, by_seed, by_prompt, 400)
    # Three standard errors of 400 worlds.
    assert held >= 0.95 - 0.033
    assert small <= 0.01 + 0.015


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "paired", "by_seed", "by_prompt"), WORLDS)
def test_coverage_in_many_worlds(sizes: dict[str, int], paired: bool, by_seed: float, by_prompt: float) -> None:
    held, small = rates(sizes, paired, by_seed, by_prompt, 10_000)
    assert 0.95 - 0.0066 <= held <= 0.997
    assert small <= 0.01 + 0.003


def nulls(draw: np.random.Generator, methods: int, seeds: int, by_prompt: float = 0.0) -> list[Difference]:
    """Methods without a difference to the baseline, where training seeds dominate unless ``by_prompt`` is large."""
    names = ["sft", *(f"method_{k}" for k in range(methods))]
    scores = world(draw, dict.fromkeys(names, seeds), 30, 3.0, by_prompt)
    return compare(scores, {name: list(range(seeds)) for name in names}, "sft")


def test_family_wise_error_with_three_seeds() -> None:
    """Eight methods without a difference: Holm's p is below 0.05 in some column in at most 5 % (0.11 by bootstrap)."""
    draw = np.random.default_rng(11)
    worlds = 300
    wrong = sum(min(d.p_holm for d in nulls(draw, 8, 3)) < 0.05 for _ in range(worlds))
    assert wrong / worlds <= 0.05 + 0.038


@pytest.mark.slow
@pytest.mark.parametrize("by_prompt", [0.0, 10.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_errors_are_kept_at_every_level(seeds: int, by_prompt: float) -> None:
    """Family-wise errors of eight methods, and the share of p-values up to 0.001 (2.3 times nominal by bootstrap)."""
    draw = np.random.default_rng(12)
    worlds = 3000
    found = [nulls(draw, 8, seeds, by_prompt) for _ in range(worlds)]
    assert sum(min(d.p_holm for d in each) < 0.05 for each in found) / worlds <= 0.05 + 0.012
    # The methods of a world share a baseline, so that their errors come together.
    assert np.mean([[d.p <= 0.001 for d in each] for each in found]) <= 0.001 + 0.0008


@pytest.mark.slow
def test_skewed_scores_of_prompts() -> None:
    """Exact match, 0 or 1, right in 4 % of 200 prompts: means over prompts are close enough to normal."""
    draw = np.random.default_rng(13)
    worlds, held = 3000, 0
    for _ in range(worlds):
        scores = {name: 100.0 * (draw.random((1, 200)) < 0.04) for name in ("sft", "kd")}
        found = compare(scores, {"sft": [0], "kd": [0]}, "sft")[0]
        held += found.low <= 0 <= found.high
    assert held / worlds >= 0.94


def test_the_interval_by_hand() -> None:
    """Each part of the variance at the quantile of its own degrees of freedom."""
    draw = np.random.default_rng(3)
    scores = {"sft": draw.normal(30, 5, (4, 40)), "kd": draw.normal(31, 5, (4, 40))}
    found = compare(scores, {name: [1, 2, 3, 4] for name in scores}, "sft")[0]
    difference_SR = scores["kd"] - scores["sft"]
    by_seed, by_prompt = difference_SR.mean(1), difference_SR.mean(0)
    for level, half in ((0.05, found.high - found.mean), (found.p, abs(found.mean))):
        parts = [(stats.t.ppf(1 - level / 2, len(x) - 1) * stats.sem(x)) ** 2 for x in (by_seed, by_prompt)]
        assert half == pytest.approx(math.sqrt(sum(parts)), rel=1e-6)


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
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue), rel=1e-6)

    gain_R = draw.normal(1, 6, 400)
    single = {"sft": np.zeros((1, 400)), "kd": gain_R[None]}
    found = compare(single, {"sft": [1], "kd": [2]}, "sft")[0]
    expected = stats.ttest_1samp(gain_R, 0.0)
    assert found.over == PROMPTS
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue), rel=1e-6)

    alone = {"sft": np.zeros((2, 3)), "kd": np.ones((2, 3))}
    found = compare(alone, {"sft": [0, 1], "kd": [0, 1]}, "sft")[0]
    assert (found.low, found.high) == (1, 1)
    assert found.p < 1e-9


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
