"""Shift preservation: how much of the teacher's shift the student shows per token (docs/design.md#evaluation)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW

#: A shift counts as zero if its standard deviation is at most this many rounding errors of the logits.
_ROUNDINGS = 8.0
#: Rows of logits whose intermediate results, in float64, stay in a core's cache.
BLOCK_ROWS = 16


def shift_correlation(logits: Mapping[str, Tensor], rounding: float) -> Tensor:
    """Return the [N] Pearson correlations of both shifts over the vocabulary, weighted by the teacher's probabilities.

    The shifts are those of the teacher's fine-tuning, log π_t^ft − log π_t^raw, and of the student's training,
    log π_θ − log π_s^raw. They are computed from logits, since a constant added to all logits of a model changes no
    correlation. A token that any model rules out (a bias of −∞) has no shift and is left out.

    Args:
        logits: role -> [N, V] float64 of all four ROLES; −∞ rules a token out.
        rounding: relative error of a logit.

    Returns:
        float64; NaN where a shift has no variance beyond rounding.
    """
    blocks = range(0, max(1, len(logits[STUDENT])), BLOCK_ROWS)
    parts = [{role: z_NV[at : at + BLOCK_ROWS] for role, z_NV in logits.items()} for at in blocks]
    return torch.cat([_correlation(part, rounding) for part in parts])


def _correlation(logits: Mapping[str, Tensor], rounding: float) -> Tensor:
    lowest = {role: z_NV.amin(-1) for role, z_NV in logits.items()}
    teacher_NV = logits[TEACHER]
    if any(torch.isneginf(lowest_N).any() for lowest_N in lowest.values()):
        left_out_NV = torch.stack([torch.isneginf(z_NV) for z_NV in logits.values()]).any(0)
        logits = {role: z_NV.masked_fill(left_out_NV, 0.0) for role, z_NV in logits.items()}
        teacher_NV = logits[TEACHER].masked_fill(left_out_NV, -math.inf)
        lowest = {role: z_NV.amin(-1) for role, z_NV in logits.items()}
    weight_NV = (teacher_NV - teacher_NV.amax(-1, keepdim=True)).exp_()
    weight_NV /= weight_NV.sum(-1, keepdim=True)
    # Errors of variance s² have a weighted variance of s² · (1 − Σ w²), which is small where the teacher is certain.
    spread_N = torch.linalg.vecdot(weight_NV, 1.0 - weight_NV).sqrt()
    centred, weighted, deviation, defined = {}, {}, {}, []
    for name, (tuned, raw) in {STUDENT: (STUDENT, STUDENT_RAW), TEACHER: (TEACHER, TEACHER_RAW)}.items():
        shift_NV = logits[tuned] - logits[raw]
        shift_NV -= torch.linalg.vecdot(weight_NV, shift_NV)[:, None]
        centred[name], weighted[name] = shift_NV, weight_NV * shift_NV
        deviation[name] = torch.linalg.vecdot(weighted[name], shift_NV).sqrt()
        # Rounding errors grow with the logits, which may be far larger than their differences.
        size_N = 1.0 + sum(torch.maximum(logits[role].amax(-1), -lowest[role]) for role in (tuned, raw))
        if (deviation[name] <= _ROUNDINGS * rounding * size_N * spread_N).any():
            # The largest logit is a cheap bound and nearly always enough; here the weighted norm is needed.
            size_N = 1.0 + sum(torch.linalg.vecdot(weight_NV * logits[r], logits[r]).sqrt() for r in (tuned, raw))
        defined.append(deviation[name] > _ROUNDINGS * rounding * size_N * spread_N)
    covariance_N = torch.linalg.vecdot(weighted[STUDENT], centred[TEACHER])
    correlation_N = covariance_N / (deviation[STUDENT] * deviation[TEACHER])
    return torch.where(defined[0] & defined[1], correlation_N.clamp(-1.0, 1.0), torch.nan)
