"""Shift preservation: how much of the teacher's shift is in the student, token by token (DESIGN 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deltakd.types import ROLES, STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head

#: A shift whose standard deviation is below so many roundings of the logits is no shift.
_ROUNDINGS = 8.0
#: Rows of logits whose intermediate results, in float64, stay in a core's cache.
BLOCK_ROWS = 16


@dataclass(frozen=True)
class TokenPreservation:
    """What was measured at N tokens; all [N] float64, on the heads' device.

    Args:
        correlation: Pearson correlation of the student's and the teacher's shift over the vocabulary, weighted by the
            teacher's probabilities; NaN where one of the shifts has no variance beyond rounding.
        kl_teacher: KL(p_t ‖ π_θ), nats.
        kl_raw: KL(p_t ‖ π_s^raw), nats: where the student came from.
        top1_agreement: 1 where student and teacher have the same most probable token, else 0.
        nll: −log π_θ of the label, nats.
        student_shift: log π_θ − log π_s^raw of the label, nats.
        teacher_shift: log π_t^ft − log π_t^raw of the label, nats.
    """

    correlation: Tensor
    kl_teacher: Tensor
    kl_raw: Tensor
    top1_agreement: Tensor
    nll: Tensor
    student_shift: Tensor
    teacher_shift: Tensor


@torch.no_grad()
def shift_preservation(heads: Mapping[str, Head], labels: Tensor, chunk_size: int = 64) -> TokenPreservation:
    """Hold the student's shift, log π_θ − log π_s^raw, against the teacher's, log π_t^ft − log π_t^raw.

    Exact over the whole vocabulary. Logits are multiplied out in at least float32, a chunk of tokens at a time, and
    all sums over the vocabulary are made in float64. A token that one of the models rules out (a bias of −∞) has no
    shift: the correlation is that of the others, under the teacher's probabilities among them. A KL is infinite where
    the teacher may say what the other model rules out.

    Args:
        heads: Head of ``student``, ``student_raw``, ``teacher`` and ``teacher_raw`` over the same N tokens and the same
            vocabulary.
        labels: [N] int64.
        chunk_size: tokens a chunk; some 12 float64 tensors of chunk_size · V exist at one time.

    Raises:
        ValueError: a role has no head, the heads disagree in N or V, or the chunk size is below 1.
    """
    _check(heads, labels, chunk_size)
    upcast = {role: heads[role].upcast() for role in ROLES}
    starts = range(0, max(1, len(labels)), chunk_size)
    chunks = [
        _chunk({role: head.rows(at, at + chunk_size) for role, head in upcast.items()}, labels[at : at + chunk_size])
        for at in starts
    ]
    names = [field.name for field in fields(TokenPreservation)]
    return TokenPreservation(**{name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names})


@torch.no_grad()
def top_candidates(head: Head, count: int, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    """The most probable tokens.

    Args:
        head: over N tokens.
        count: how many, K (at most V are given).
        chunk_size: tokens a chunk.

    Returns:
        [N, K] int64 ids, most probable first, and [N, K] their probabilities.
    """
    upcast = head.upcast()
    count = min(count, head.weight.shape[0])
    chunks = [
        upcast.rows(at, at + chunk_size).logits().double().softmax(-1).topk(count)
        for at in range(0, max(1, len(head)), chunk_size)
    ]
    return torch.cat([c.indices for c in chunks]), torch.cat([c.values for c in chunks])


def _check(heads: Mapping[str, Head], labels: Tensor, chunk_size: int) -> None:
    missing = [role for role in ROLES if role not in heads]
    if missing:
        raise ValueError(f"shift preservation needs a head of {', '.join(ROLES)}; missing: {', '.join(missing)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    shapes = {role: (len(heads[role]), heads[role].weight.shape[0]) for role in ROLES}
    if len(set(shapes.values())) != 1 or shapes[STUDENT][0] != len(labels):
        raise ValueError(
            f"heads of (tokens, vocabulary) {shapes} with {len(labels)} labels; give all of them for the same tokens, "
            "cut to the vocabulary that they share"
        )


def _chunk(heads: Mapping[str, Head], labels_N: Tensor) -> TokenPreservation:
    logits = {role: head.logits() for role, head in heads.items()}
    rounding = torch.finfo(logits[STUDENT].dtype).eps
    wide = {role: logits_NV.double() for role, logits_NV in logits.items()}
    log_probs = {role: logits_NV.log_softmax(-1) for role, logits_NV in wide.items()}
    at_label = {role: log_NV.gather(-1, labels_N[:, None]).squeeze(-1) for role, log_NV in log_probs.items()}
    agreement_N = logits[STUDENT].argmax(-1) == logits[TEACHER].argmax(-1)
    return TokenPreservation(
        correlation=shift_correlation(wide, rounding),
        kl_teacher=forward_kl(log_probs[TEACHER], log_probs[STUDENT]),
        kl_raw=forward_kl(log_probs[TEACHER], log_probs[STUDENT_RAW]),
        top1_agreement=agreement_N.double(),
        nll=-at_label[STUDENT],
        student_shift=at_label[STUDENT] - at_label[STUDENT_RAW],
        teacher_shift=at_label[TEACHER] - at_label[TEACHER_RAW],
    )


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """[N] KL(p ‖ q) in nats of log-probabilities [N, V]; infinite where p may say what q rules out."""
    p_NV = log_p_NV.exp()
    return torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(-1)


def shift_correlation(logits: Mapping[str, Tensor], rounding: float) -> Tensor:
    """[N] Pearson correlation of both shifts over the vocabulary, weighted by the teacher's probabilities.

    A constant added to all logits of a model changes no correlation, so the shifts are differences of logits.

    Args:
        logits: role -> [N, V] float64 of all four ROLES; −∞ rules a token out, which then plays no part.
        rounding: relative error of a logit.

    Returns:
        float64; NaN where one of the shifts has no variance beyond rounding.
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
    # Errors of variance s² have a weighted variance of s² · (1 − Σ w²): little where the teacher is certain.
    spread_N = torch.linalg.vecdot(weight_NV, 1.0 - weight_NV).sqrt()
    centred, weighted, deviation, defined = {}, {}, {}, []
    for name, (tuned, raw) in {STUDENT: (STUDENT, STUDENT_RAW), TEACHER: (TEACHER, TEACHER_RAW)}.items():
        shift_NV = logits[tuned] - logits[raw]
        shift_NV -= torch.linalg.vecdot(weight_NV, shift_NV)[:, None]
        centred[name], weighted[name] = shift_NV, weight_NV * shift_NV
        deviation[name] = torch.linalg.vecdot(weighted[name], shift_NV).sqrt()
        # Logits are rounded in proportion to their size, which may be far above that of their differences.
        size_N = 1.0 + sum(torch.maximum(logits[role].amax(-1), -lowest[role]) for role in (tuned, raw))
        if (deviation[name] <= _ROUNDINGS * rounding * size_N * spread_N).any():
            # The largest logit was a bound that is cheap, and nearly always enough.
            size_N = 1.0 + sum(torch.linalg.vecdot(weight_NV * logits[r], logits[r]).sqrt() for r in (tuned, raw))
        defined.append(deviation[name] > _ROUNDINGS * rounding * size_N * spread_N)
    covariance_N = torch.linalg.vecdot(weighted[STUDENT], centred[TEACHER])
    correlation_N = covariance_N / (deviation[STUDENT] * deviation[TEACHER])
    return torch.where(defined[0] & defined[1], correlation_N.clamp(-1.0, 1.0), torch.nan)
