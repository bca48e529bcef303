"""Measures of next-token distributions on teacher-forced responses: likelihood, calibration, distance to a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deltakd.evaluation.shift import BLOCK_ROWS, forward_kl, shift_correlation
from deltakd.types import ROLES, STUDENT, TEACHER, Head

#: Equal-width bins of confidence, as in the paper of the expected calibration error.
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class TokenMeasures:
    """What was measured at N response tokens; all [N] float64, on the heads' device.

    Args:
        nll: −log π_θ of the label, nats.
        confidence: π_θ of the student's most probable token.
        correct: 1 where the label is a most probable token of the student, else 0.
        kl_teacher: KL(p_t ‖ π_θ), nats; None without a teacher.
        top1_agreement: 1 where the teacher's most probable token is a most probable one of the student, else 0;
            None without a teacher.
        correlation: of both shifts, see ``shift_correlation``; None without all four models.
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor
    kl_teacher: Tensor | None = None
    top1_agreement: Tensor | None = None
    correlation: Tensor | None = None


@torch.no_grad()
def token_measures(heads: Mapping[str, Head], labels: Tensor, chunk_size: int = 256) -> TokenMeasures:
    """Measure what the heads that are there allow, exactly over the whole vocabulary.

    Logits are multiplied out in at least float32, a chunk of tokens at a time; everything else is float64.

    Args:
        heads: head of ``student`` and, where there are any, of ``teacher``, ``teacher_raw`` and ``student_raw``, over
            the same N tokens and the same vocabulary.
        labels: [N] int64.
        chunk_size: tokens a chunk; so many rows of logits of each head exist at one time.

    Raises:
        ValueError: no head of the student, heads that disagree in N or V, or a chunk size below 1.
    """
    _check(heads, labels, chunk_size)
    upcast = {role: head.upcast() for role, head in heads.items()}
    blocks = []
    for start in range(0, max(1, len(labels)), chunk_size):
        chunk = {role: head.rows(start, start + chunk_size).logits() for role, head in upcast.items()}
        labels_N = labels[start : start + chunk_size]
        for at in range(0, max(1, len(labels_N)), BLOCK_ROWS):
            rows = slice(at, at + BLOCK_ROWS)
            blocks.append(_block({role: z_NV[rows] for role, z_NV in chunk.items()}, labels_N[rows]))
    there = [field.name for field in fields(TokenMeasures) if getattr(blocks[0], field.name) is not None]
    return TokenMeasures(**{name: torch.cat([getattr(block, name) for block in blocks]) for name in there})


def _check(heads: Mapping[str, Head], labels: Tensor, chunk_size: int) -> None:
    if STUDENT not in heads:
        raise ValueError(f"the measures need a head of the student; given: {', '.join(heads) or 'none'}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    shapes = {role: (len(head), head.weight.shape[0]) for role, head in heads.items()}
    if len(set(shapes.values())) != 1 or shapes[STUDENT][0] != len(labels):
        raise ValueError(
            f"heads of (tokens, vocabulary) {shapes} with {len(labels)} labels; give all of them for the same tokens, "
            "cut to the vocabulary that they share"
        )


def _block(logits: Mapping[str, Tensor], labels_N: Tensor) -> TokenMeasures:
    wide = {role: logits_NV.double() for role, logits_NV in logits.items()}
    student_NV = wide[STUDENT].log_softmax(-1)
    highest_N = student_NV.amax(-1)
    at_label_N = student_NV.gather(-1, labels_N[:, None]).squeeze(-1)
    measures = {"nll": -at_label_N, "confidence": highest_N.exp(), "correct": (at_label_N == highest_N).double()}
    if TEACHER in wide:
        # Not two argmax and a comparison: one of them costs as much as five sums.
        at_favourite_N = student_NV.gather(-1, wide[TEACHER].max(-1, keepdim=True).indices).squeeze(-1)
        measures["top1_agreement"] = (at_favourite_N == highest_N).double()
        measures["kl_teacher"] = forward_kl(wide[TEACHER].log_softmax(-1), student_NV)
    if all(role in wide for role in ROLES):
        measures["correlation"] = shift_correlation(wide, torch.finfo(logits[STUDENT].dtype).eps)
    return TokenMeasures(**measures)


def calibration_bins(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """[3, CALIBRATION_BINS] float64: number of tokens, sum of confidence and sum of correctness in each bin.

    Bin m of M holds confidences in ((m − 1)/M, m/M]. Bins of several parts of the tokens add up to those of all.
    """
    bin_N = (confidence_N * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    values_3N = torch.stack([torch.ones_like(confidence_N), confidence_N, correct_N]).double()
    return torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=bin_N.device).index_add_(1, bin_N, values_3N)


def expected_calibration_error(bins_3M: Tensor) -> float:
    """ECE = Σ_m |B_m| / N · |acc(B_m) − conf(B_m)| (Guo et al., arXiv 1706.04599, eq. 3), as a share from 0 to 1.

    The N predictions are the student's next tokens at the positions of the response, its end (EOS) included and the
    prompt not. conf is the mean probability of the most probable token, acc how often that token is the reference's.

    Args:
        bins_3M: of ``calibration_bins``.

    Returns:
        NaN without tokens.
    """
    tokens_M, confidence_M, correct_M = bins_3M
    total = float(tokens_M.sum())
    return float((correct_M - confidence_M).abs().sum()) / total if total else math.nan
