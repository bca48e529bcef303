"""Spread over training seeds, and sound tests of differences between methods (docs/design.md#evaluation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

#: What varies, in resamples or in standard errors; only prompts if there is a single seed.
SEEDS_AND_PROMPTS = "training seeds and prompts"
SEEDS = "training seeds"
PROMPTS = "prompts"

#: Resamples drawn at a time, so that counts [resamples, prompts] take at most tens of MiB.
_AT_ONCE = 2048


@dataclass(frozen=True)
class Spread:
    """A method's score.

    Args:
        mean: over training seeds and prompts.
        stderr: standard error of the mean; None for a single value.
        seeds: number of training seeds.
        over: what varies for ``stderr``: ``training seeds``, or ``prompts`` if there is one seed.
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
        low, high: 95 % bootstrap interval.
        p: two-sided p-value of the same bootstrap for a difference of 0: below 0.05 if the interval excludes 0.
        p_holm: ``p`` corrected for all methods compared (Holm 1979).
        over: what was resampled: ``training seeds and prompts``, or ``prompts`` if one of the two has a single training
            seed, in which case nothing is known of other seeds.
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
    scores: Mapping[str, NDArray[np.float64]],
    seeds: Mapping[str, list[int]],
    baseline: str,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Compare every other method with the baseline by a paired bootstrap over prompts and training seeds.

    Each resample draws prompts with replacement, the same for all methods, and training seeds with replacement: paired
    if both methods have the same seeds (a seed fixes the order of the data for both), else for each method
    independently. The deviations of both draws from the observed difference are added. If one of the two methods has a
    single seed, only prompts are drawn.

    Percentiles of few resampled values are too close to their mean: with five seeds, "95 %" intervals would cover the
    truth in some 83 % of cases. Deviations are therefore expanded by √(n / (n − 1)) · t_{n−1} / z, at the
    desired quantile (expanded percentile interval: Hesterberg, The American Statistician 69, 2015,
    doi 10.1080/00031305.2015.1089789). Variation between pairs of prompt and seed, such as sampling noise, enters both
    draws: if it outweighs all else, intervals are up to √2 too wide, never too narrow.

    Args:
        scores: method -> [S, R] score of each training seed and prompt, averaged over sampling seeds; S may differ
            between methods, the R prompts are the same in the same order.
        seeds: method -> its S training seeds, in the order of the scores' rows.
        baseline: the method that the others are compared with.
        resamples: number of resamples.
        seed: seed of the draws; results (except ``p_holm``) do not depend on the other methods.

    Returns:
        One difference for each other method, in the order given.

    Raises:
        ValueError: names every method whose prompts or seeds do not fit, or an unknown baseline; or too few resamples.
    """
    _check(scores, seeds, baseline, resamples)
    methods = [method for method in scores if method != baseline]
    if not methods:
        return []
    differences_KR = np.stack([scores[method].mean(axis=0) - scores[baseline].mean(axis=0) for method in methods])
    by_prompts_KB = _resampled_prompts(differences_KR, resamples, seed)
    found = []
    for method, difference_R, by_prompts_B in zip(methods, differences_KR, by_prompts_KB, strict=True):
        several = min(len(scores[method]), len(scores[baseline])) > 1
        parts = [(by_prompts_B, len(difference_R))]
        if several:
            draw = np.random.Generator(np.random.PCG64([seed, 1]))
            for means_S in _sides(scores, seeds, method, baseline):
                parts.append((_resampled_seeds(means_S, resamples, draw), len(means_S)))
        resampled = _Resampled(float(difference_R.mean()), parts)
        low, high = resampled.interval(0.05)
        p = resampled.p_value()
        over = SEEDS_AND_PROMPTS if several else PROMPTS
        found.append(Difference(method, baseline, resampled.observed, low, high, p, p, over))
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


def _check(
    scores: Mapping[str, NDArray[np.float64]], seeds: Mapping[str, list[int]], baseline: str, resamples: int
) -> None:
    if baseline not in scores:
        raise ValueError(f"the baseline {baseline!r} is not among the methods {', '.join(scores)}; give one of them")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; an interval of 95 % needs at least 100")
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
        raise ValueError(f"each row of scores needs a training seed of its own: {named}")


def _sides(
    scores: Mapping[str, NDArray[np.float64]], seeds: Mapping[str, list[int]], method: str, baseline: str
) -> list[NDArray[np.float64]]:
    """Return [S] means over prompts whose means sum to the difference: one of paired seeds, or one per method."""
    ours_S, theirs_S = (scores[name].mean(axis=1)[np.argsort(seeds[name])] for name in (method, baseline))
    if sorted(seeds[method]) == sorted(seeds[baseline]):
        return [ours_S - theirs_S]
    return [ours_S, -theirs_S]


def _resampled_prompts(differences_KR: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return [K, B] deviations of the mean over resampled prompts from the mean over all; same draws for all K."""
    draw = np.random.Generator(np.random.PCG64([seed, 0]))
    prompts = differences_KR.shape[1]
    centred_RK = (differences_KR - differences_KR.mean(axis=1, keepdims=True)).T
    parts = []
    for start in range(0, resamples, _AT_ONCE):
        counts_BR = draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=min(_AT_ONCE, resamples - start))
        parts.append(counts_BR @ centred_RK / prompts)
    return np.concatenate(parts).T


def _resampled_seeds(means_S: NDArray[np.float64], resamples: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """Return [B] deviations of the mean over resampled seeds from the mean over all."""
    size = len(means_S)
    return draw.multinomial(size, np.full(size, 1 / size), size=resamples) @ (means_S - means_S.mean()) / size


@dataclass(frozen=True)
class _Resampled:
    """A difference and its bootstrap: independent deviations, [B] each, with the sample size of each."""

    observed: float
    parts: list[tuple[NDArray[np.float64], int]]

    def interval(self, level: float) -> tuple[float, float]:
        """Return the expanded percentile interval that covers 1 − level."""
        total_B = sum((_expansion(size, level) * part_B for part_B, size in self.parts), np.array(self.observed))
        low, high = np.quantile(total_B, [level / 2, 1 - level / 2])
        return float(low), float(high)

    def p_value(self) -> float:
        """Return the largest level whose interval contains 0, found by bisection; never below what B can resolve."""
        inside, outside = 2.0 / (len(self.parts[0][0]) + 1), 0.999
        if self._has_zero(outside):
            return 1.0
        if not self._has_zero(inside):
            return inside
        while outside - inside > 1e-3 * inside:
            middle = math.sqrt(inside * outside)
            inside, outside = (middle, outside) if self._has_zero(middle) else (inside, middle)
        return inside

    def _has_zero(self, level: float) -> bool:
        low, high = self.interval(level)
        return low <= 0.0 <= high


def _expansion(size: int, level: float) -> float:
    """Return √(n / (n − 1)) · t / z, the factor by which percentiles of the mean of n drawn values are too close."""
    if size == 1:
        return 0.0
    tail = 1 - level / 2
    return math.sqrt(size / (size - 1)) * float(special.stdtrit(size - 1, tail) / special.ndtri(tail))
