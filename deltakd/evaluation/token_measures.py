"""Measures of next-token distributions on teacher-forced responses, defined once for summary and report.

Likelihood, calibration, and distance to a teacher; the correlation of shifts is in ``shift``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deltakd.evaluation.shift import BLOCK_ROWS, shift_correlation
from deltakd.types import ROLES, STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head, in_float64

#: Number of equal-width confidence bins, as in the paper on expected calibration error.
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class TokenMeasures:
    """Measures of N response tokens; all [N] float64, on the heads' device (on the CPU for MPS).

    Args:
        nll: −log π_θ of the label, nats.
        confidence: π_θ of the student's most probable token.
        correct: 1 if the label is a most probable token of the student, else 0.
        kl_teacher: KL(p_t ‖ π_θ), nats; infinite if the student rules out a token that the teacher does not. None
            without a teacher.
        top1_agreement: 1 if the teacher's most probable token is a most probable one of the student, else 0; None
            without a teacher.
        correlation: of both shifts, see ``shift_correlation``; None without all four models.
        kl_raw_student: KL(p_s^raw ‖ π_θ), nats: how far training moved the student; None without a raw student.
        kl_raw: KL(p_t ‖ π_s^raw), nats: the student's starting point. None, like the next two, unless asked for.
        student_shift: log π_θ − log π_s^raw of the label, nats.
        teacher_shift: log π_t^ft − log π_t^raw of the label, nats.
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor
    kl_teacher: Tensor | None = None
    top1_agreement: Tensor | None = None
    correlation: Tensor | None = None
    kl_raw_student: Tensor | None = None
    kl_raw: Tensor | None = None
    student_shift: Tensor | None = None
    teacher_shift: Tensor | None = None


@torch.no_grad()
def token_measures(
    heads: Mapping[str, Head], labels: Tensor, chunk_size: int = 256, *, with_shifts: bool = False
) -> TokenMeasures:
    """Measure all that the given heads allow, exactly over the whole vocabulary.

    Logits are computed in at least float32, one chunk of tokens at a time; everything else is float64.

    Args:
        heads: head of ``student`` and, if available, of ``teacher``, ``teacher_raw`` and ``student_raw``, over the same
            N tokens and the same vocabulary.
        labels: [N] int64.
        chunk_size: tokens in a chunk; each head has this many rows of logits in memory at a time.
        with_shifts: also measure ``kl_raw``, ``student_shift`` and ``teacher_shift``; needs all four heads.

    Raises:
        ValueError: a required head is missing, heads disagree in N or V, or the chunk size is below 1.
    """
    _check(heads, labels, chunk_size, ROLES if with_shifts else (STUDENT,))
    prepared = {role: head.prepared() for role, head in heads.items()}
    blocks = []
    for start in range(0, max(1, len(labels)), chunk_size):
        chunk = {role: head.rows(start, start + chunk_size).logits() for role, head in prepared.items()}
        labels_N = labels[start : start + chunk_size]
        for at in range(0, max(1, len(labels_N)), BLOCK_ROWS):
            rows = slice(at, at + BLOCK_ROWS)
            blocks.append(_block({role: z_NV[rows] for role, z_NV in chunk.items()}, labels_N[rows], with_shifts))
    there = [field.name for field in fields(TokenMeasures) if getattr(blocks[0], field.name) is not None]
    return TokenMeasures(**{name: torch.cat([getattr(block, name) for block in blocks]) for name in there})


@torch.no_grad()
def top_candidates(head: Head, count: int, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens.

    Args:
        head: head of N tokens.
        count: K, capped at V.
        chunk_size: tokens in a chunk.

    Returns:
        [N, K] int64 ids, most probable first, and [N, K] their probabilities.
    """
    prepared = head.prepared()
    count = min(count, head.weight.shape[0])
    chunks = [
        in_float64(prepared.rows(at, at + chunk_size).logits()).softmax(-1).topk(count)
        for at in range(0, max(1, len(head)), chunk_size)
    ]
    return torch.cat([c.indices for c in chunks]), torch.cat([c.values for c in chunks])


def _check(heads: Mapping[str, Head], labels: Tensor, chunk_size: int, needed: tuple[str, ...]) -> None:
    if any(role not in heads for role in needed):
        given = ", ".join(heads) or "none"
        if needed == (STUDENT,):
            raise ValueError(f"the measures need a head of the student; given: {given}")
        raise ValueError(f"shifts need a head of each of {', '.join(needed)}; given: {given}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    shapes = {role: (len(head), head.weight.shape[0]) for role, head in heads.items()}
    if len(set(shapes.values())) != 1 or shapes[STUDENT][0] != len(labels):
        raise ValueError(
            f"heads of (tokens, vocabulary) {shapes} with {len(labels)} labels; give all of them for the same tokens, "
            "cut to the vocabulary that they share"
        )


def _block(logits: Mapping[str, Tensor], labels_N: Tensor, with_shifts: bool) -> TokenMeasures:
    wide = {role: in_float64(logits_NV) for role, logits_NV in logits.items()}
    labels_N1 = labels_N.to(wide[STUDENT].device)[:, None]
    student_NV = wide[STUDENT].log_softmax(-1)
    highest_N = student_NV.amax(-1)
    at_label_N = student_NV.gather(-1, labels_N1).squeeze(-1)
    measures = {"nll": -at_label_N, "confidence": highest_N.exp(), "correct": (at_label_N == highest_N).double()}
    if TEACHER in wide:
        # Not two argmaxes and a comparison: one argmax costs as much as five sums.
        at_favourite_N = student_NV.gather(-1, wide[TEACHER].max(-1, keepdim=True).indices).squeeze(-1)
        measures["top1_agreement"] = (at_favourite_N == highest_N).double()
        teacher_NV = wide[TEACHER].log_softmax(-1)
        measures["kl_teacher"] = _forward_kl(teacher_NV, student_NV)
    if STUDENT_RAW in wide:
        measures["kl_raw_student"] = _forward_kl(wide[STUDENT_RAW].log_softmax(-1), student_NV)
    if all(role in wide for role in ROLES):
        measures["correlation"] = shift_correlation(wide, torch.finfo(logits[STUDENT].dtype).eps)
    if with_shifts:
        log_probs = {TEACHER: teacher_NV} | {role: wide[role].log_softmax(-1) for role in (STUDENT_RAW, TEACHER_RAW)}
        of_label = {role: log_NV.gather(-1, labels_N1).squeeze(-1) for role, log_NV in log_probs.items()}
        measures["kl_raw"] = _forward_kl(teacher_NV, log_probs[STUDENT_RAW])
        measures["student_shift"] = at_label_N - of_label[STUDENT_RAW]
        measures["teacher_shift"] = of_label[TEACHER] - of_label[TEACHER_RAW]
    return TokenMeasures(**measures)


def _forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Return [N] KL(p ‖ q) in nats from log-probabilities [N, V]; infinite where q rules out what p does not."""
    p_NV = log_p_NV.exp()
    return torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(-1)


def calibration_bins(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """Return [3, CALIBRATION_BINS] float64: number of tokens, sum of confidence and sum of correctness per bin.

    Bin m of M holds confidences in ((m − 1)/M, m/M]. The results of disjoint sets of tokens add up.
    """
    bin_N = (confidence_N * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    values_3N = torch.stack([torch.ones_like(confidence_N), confidence_N, correct_N]).double()
    return torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=bin_N.device).index_add_(1, bin_N, values_3N)


def expected_calibration_error(bins_3M: Tensor) -> float:
    """Return ECE = Σ_m |B_m| / N · |acc(B_m) − conf(B_m)| (Guo et al., arXiv 1706.04599, eq. 3), from 0 to 1.

    The N predictions are the student's next tokens at the positions of the response, with its end (EOS) and without the
    prompt. conf is the mean probability of the most probable token, acc the share of them that match the reference.
    NaN without tokens.

    Args:
        bins_3M: result of ``calibration_bins``.
    """
    tokens_M, confidence_M, correct_M = bins_3M
    total = float(tokens_M.sum())
    return float((correct_M - confidence_M).abs().sum()) / total if total else math.nan
