"""Spread over training seeds, and sound tests of differences between methods (docs/design.md#evaluation).

What is guaranteed. A method's score varies with the training seed, with the prompts, and with their combination. If
these three are normal, then for every number of seeds from 2 and whatever the three variances are, an interval of
``compare`` holds the true difference in at least 95 % of cases, and where there is no difference a p-value is at most
x in at most a share x of cases, for every x. Holm's correction then keeps the family-wise error rate at its level,
however the methods depend on each other. Means over many prompts are close to normal whatever the scores are; that
the few seeds are is an assumption, which no number of prompts can test. With one training seed the variance between
training runs is not estimated: the interval then concerns these two trained models on new prompts, not the methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

#: Sources of variation; only prompts if there is a single seed.
SEEDS_AND_PROMPTS = "training seeds and prompts"
SEEDS = "training seeds"
PROMPTS = "prompts"

#: Smaller p-values are meaningless, and quantiles of so few degrees of freedom overflow.
_LEAST_P = 1e-15


@dataclass(frozen=True)
class Spread:
    """A method's score.

    Args:
        mean: over training seeds and prompts.
        stderr: standard error of the mean; None for a single value.
        seeds: number of training seeds.
        over: the variation behind ``stderr``: ``training seeds``, or ``prompts`` if there is one seed.
    """

    mean: float
    stderr: float | None
    seeds: int
    over: str


@dataclass(frozen=True)
class Difference:
    """A method's score minus the baseline's.

    Args:
        method, baseline: names.
        mean: mean difference, in the units of the scores.
        low, high: 95 % interval.
        p: two-sided p-value of the same interval for a difference of 0: below 0.05 if the interval excludes 0.
        p_holm: ``p`` corrected for all methods compared (Holm 1979).
        over: the variation: ``training seeds and prompts``, or ``prompts`` if one of the two has a single training
            seed, in which case nothing is known about other training runs.
    """

    method: str
    baseline: str
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    over: str


def spread(values_SR: NDArray[np.float64]) -> Spread:
    """Return mean and standard error of one method.

    Args:
        values_SR: [S, R] score of each training seed and prompt, averaged over sampling seeds.

    Raises:
        ValueError: no scores, or some that are not finite.
    """
    _check_scores("the method", values_SR)
    means_S = values_SR.mean(axis=1)
    several = len(means_S) > 1
    varied = means_S if several else values_SR[0]
    stderr = float(varied.std(ddof=1)) / math.sqrt(len(varied)) if len(varied) > 1 else None
    return Spread(float(means_S.mean()), stderr, len(means_S), SEEDS if several else PROMPTS)


def compare(
    scores: Mapping[str, NDArray[np.float64]], seeds: Mapping[str, list[int]], baseline: str
) -> list[Difference]:
    """Compare every other method with the baseline: paired by prompt, and by training seed where the seeds are equal.

    The difference of the means has a variance from the prompts, estimated by V_R = the variance over the R prompts / R,
    and one from the training seeds, V_S = the variance over S paired seeds / S; if the methods have other seeds, there
    is a V_S for each method. If one of the two has a single seed, there is no V_S. The interval at level 1 − a is

        difference ± √(Σ t²_{n − 1}(1 − a/2) · V_n)

    (Banerjee, Sankhyā 22, 1960): each part at the quantile of its own n − 1 degrees of freedom. It is the t-interval
    over seeds where these dominate, and that over prompts where they do. In between it is conservative, at every level:
    P(Z² > u) is convex in u. Sampling noise, which varies between pairs of prompt and seed, enters both parts: if it
    outweighs all else, intervals are up to √2 too wide. The p-value is the level at which the interval reaches 0.

    Args:
        scores: method -> [S, R] score of each training seed and prompt, averaged over sampling seeds; S may differ
            between methods, the R prompts are the same in the same order.
        seeds: method -> its S training seeds, in the order of the scores' rows.
        baseline: the method that the others are compared with.

    Returns:
        One difference for each other method, in the order given; all but ``p_holm`` is independent of the others.

    Raises:
        ValueError: names every method whose prompts or seeds do not fit, or an unknown baseline.
    """
    _check(scores, seeds, baseline)
    found = []
    for method, ours_SR in scores.items():
        if method == baseline:
            continue
        difference_R = ours_SR.mean(axis=0) - scores[baseline].mean(axis=0)
        several = min(len(ours_SR), len(scores[baseline])) > 1
        samples = [difference_R, *(_sides(scores, seeds, method, baseline) if several else ())]
        interval = _Interval(float(difference_R.mean()), [_part(sample) for sample in samples])
        half, p = interval.half_width(0.05), interval.p_value()
        over = SEEDS_AND_PROMPTS if several else PROMPTS
        mean = interval.centre
        found.append(Difference(method, baseline, mean, mean - half, mean + half, p, p, over))
    corrected = holm([difference.p for difference in found])
    return [replace(difference, p_holm=p) for difference, p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction (Scand. J. Statist. 6, 1979), which controls the family-wise error rate.

    The k-th smallest of m becomes max over j ≤ k of (m − j + 1) · p_j, at most 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _check_scores(name: str, values_SR: NDArray[np.float64]) -> None:
    if values_SR.ndim != 2 or values_SR.size == 0 or not np.isfinite(values_SR).all():
        raise ValueError(
            f"the scores of {name} have the shape {values_SR.shape}"
            f"{' and are not all finite' if values_SR.size else ''}; give finite numbers [training seeds, prompts]"
        )


def _check(scores: Mapping[str, NDArray[np.float64]], seeds: Mapping[str, list[int]], baseline: str) -> None:
    if baseline not in scores:
        raise ValueError(f"the baseline {baseline!r} is not among the methods {', '.join(scores)}; give one of them")
    for method, values_SR in scores.items():
        _check_scores(method, values_SR)
    prompts = {method: values_SR.shape[1] for method, values_SR in scores.items()}
    if len(set(prompts.values())) > 1:
        named = ", ".join(f"{method} {count}" for method, count in prompts.items())
        raise ValueError(
            f"methods were scored on unequal numbers of prompts: {named}; compare them on the same prompts"
        )
    if next(iter(prompts.values())) < 2:
        raise ValueError("the methods were scored on one prompt, which says nothing of others; give at least 2")
    unfit = [m for m, v in scores.items() if len(seeds.get(m, ())) != len(v) or len(set(seeds[m])) != len(v)]
    if unfit:
        named = ", ".join(f"{m} {len(scores[m])} scores, seeds {list(seeds.get(m, ()))}" for m in unfit)
        raise ValueError(f"each row of scores needs its own training seed: {named}")


def _sides(
    scores: Mapping[str, NDArray[np.float64]], seeds: Mapping[str, list[int]], method: str, baseline: str
) -> list[NDArray[np.float64]]:
    """Return [S] means over prompts whose means sum to the difference: one of paired seeds, or one per method."""
    ours_S, theirs_S = (scores[name].mean(axis=1)[np.argsort(seeds[name])] for name in (method, baseline))
    if sorted(seeds[method]) == sorted(seeds[baseline]):
        return [ours_S - theirs_S]
    return [ours_S, -theirs_S]


def _part(sample: NDArray[np.float64]) -> tuple[float, int]:
    """Return the variance of the mean of independent values, and its degrees of freedom."""
    return float(sample.var(ddof=1)) / len(sample), len(sample) - 1


@dataclass(frozen=True)
class _Interval:
    """A difference, and the independent parts of its variance: (variance, degrees of freedom) each."""

    centre: float
    parts: list[tuple[float, int]]

    def half_width(self, level: float) -> float:
        """Return half the width of the interval that covers at least 1 − level."""
        return math.sqrt(
            sum(variance * float(special.stdtrit(freedom, level / 2)) ** 2 for variance, freedom in self.parts)
        )

    def p_value(self) -> float:
        """Return the level at which the interval reaches 0, at least ``_LEAST_P``."""
        distance = abs(self.centre)
        if distance <= self.half_width(1.0):
            return 1.0
        if distance >= self.half_width(_LEAST_P):
            return _LEAST_P
        found = optimize.brentq(lambda log_p: self.half_width(math.exp(log_p)) - distance, math.log(_LEAST_P), 0.0)
        return math.exp(found)
