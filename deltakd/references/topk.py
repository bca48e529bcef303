"""Turns heads into buckets; tells which losses buckets can serve, and at what cost in accuracy."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels import Buckets, chunk_size_for, chunked_loss, row_blocks
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head, Loss, at_least_float32, in_float64

#: Values of K to try if the config gives none.
CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024)
#: MiB for the log-probs of a chunk of tokens.
_MEMORY_BUDGET = 256.0


@torch.no_grad()
def make_buckets(heads: Mapping[str, Head], labels: Tensor, k: int, temperature: float) -> Buckets:
    """Keep the label and the k − 1 tokens most probable under any model or the delta target at α = 1.

    Args:
        heads: role -> Head over the same N tokens.
        labels: [N] int64.
        k: tokens in each support, at most the whole vocabulary.
        temperature: τ of the log-probs.

    Returns:
        Buckets in at least float32, each support in descending order of that highest probability. The rest bucket is
        summed over its own tokens, never computed as 1 − kept.
    """
    vocabulary = next(iter(heads.values())).weight.shape[0]
    heads = {role: head.prepared() for role, head in heads.items()}
    size = chunk_size_for(_MEMORY_BUDGET, vocabulary, 4, "autograd")
    supports: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {role: [] for role in heads}
    for start in range(0, max(1, len(labels)), size):
        logits = {role: head.rows(start, start + size).logits() for role, head in heads.items()}
        chunk_labels = labels[start : start + size]
        for rows in row_blocks(next(iter(logits.values()))):
            log_probs = {role: (z_NV[rows] / temperature).log_softmax(-1) for role, z_NV in logits.items()}
            score_NV = functools.reduce(torch.maximum, [*log_probs.values(), *_delta(log_probs)])
            support_NK = score_NV.scatter(1, chunk_labels[rows, None], torch.inf).topk(min(k, vocabulary)).indices
            supports.append(support_NK)
            for role, log_p_NV in log_probs.items():
                parts[role].append(_gathered(log_p_NV, support_NK))
    return Buckets(torch.cat(supports), {role: torch.cat(found) for role, found in parts.items()}, temperature)


@torch.no_grad()
def log_probs_at(heads: Mapping[str, Head], support_NK: Tensor) -> dict[str, Tensor]:
    """Return role -> the log-probs at τ = 1 of given tokens and of the rest, [N, K + 1] on the CPU.

    Args:
        heads: role -> Head over the same N tokens.
        support_NK: token ids, distinct at each position. [N, K] is returned if they are the whole vocabulary.
    """
    found = {}
    for role, head in heads.items():
        prepared = head.prepared()
        size = chunk_size_for(_MEMORY_BUDGET, head.weight.shape[0], 1, "autograd")
        parts = []
        for start in range(0, max(1, len(support_NK)), size):
            log_p_NV = prepared.rows(start, start + size).logits().log_softmax(-1)
            parts.append(_gathered(log_p_NV, support_NK[start : start + size]).cpu())
        found[role] = torch.cat(parts)
    return found


def _gathered(log_p_NV: Tensor, support_NK: Tensor) -> Tensor:
    """Return the log-probs of a support, and of the rest unless it is the whole vocabulary; overwrites ``log_p_NV``."""
    kept_NK = log_p_NV.gather(1, support_NK)
    if support_NK.shape[1] >= log_p_NV.shape[1]:
        return kept_NK
    rest_N1 = log_p_NV.scatter_(1, support_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, rest_N1], dim=1)


def _delta(log_probs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the delta target at α = 1 (arXiv 2509.14526), [N, V] log-probs; nothing if a model of it is missing."""
    if not log_probs.keys() >= {TEACHER, STUDENT_RAW, TEACHER_RAW}:
        return []
    composed_NV = log_probs[TEACHER] + (log_probs[STUDENT_RAW] - log_probs[TEACHER_RAW])
    # A token that the raw teacher rules out has no shift.
    return [composed_NV.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).log_softmax(-1)]


def topk_problems(loss: Loss) -> list[str]:
    """Return why a loss can't be computed over buckets, one sentence per reason that the loss gives."""
    reasons = ["it compares two vocabularies"] if loss.needs_alignment else []
    return [
        f"loss: {reason}, which log-probs of a few tokens can't give; reference.store=hidden is exact for every loss"
        for reason in dict.fromkeys([*reasons, *loss.whole_vocabulary_reasons])
    ]


def sample_errors(
    loss: Loss, student: Head, heads: Mapping[str, Head], labels: Tensor, ks: Sequence[int], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Measure the errors of a top-K store on a sample, for several K.

    Errors are measured on the loss's distillation term: the cross-entropy of the labels is exact with any K, and in a
    mixture would hide the store's effect on the rest.

    Args:
        loss: the loss.
        student, heads: the heads of the student and of the references over the same N tokens.
        labels: [N] int64.
        ks: the values of K, ascending.
        dtype: of the stored log-probs; its rounding is part of the errors.

    Returns:
        For each K: ``k``; ``kept_mass`` by role, the mean probability of the support at τ; ``loss_error``, the relative
        error of the summed term; ``gradient_error``, the relative error in the 2-norm of the gradient w.r.t. the
        student's hidden states or its output embedding, whichever is larger.
    """
    loss = loss.distillation_term
    exact, exact_gradients = _loss_and_gradients(loss, student, labels, heads, None)
    buckets = make_buckets(heads, labels, max(ks), loss.temperature)
    report = []
    for k in ks:
        stored = buckets.first(k).cast(dtype)
        value, gradients = _loss_and_gradients(loss, student, labels, {}, stored)
        errors = [_relative(g, e) for g, e in zip(gradients, exact_gradients, strict=True)]
        kept = {role: in_float64(log_p[:, : stored.k]).exp().sum(-1).mean() for role, log_p in stored.log_probs.items()}
        report.append(
            {
                "k": stored.k,
                "kept_mass": {role: round(min(1.0, float(mass)), 6) for role, mass in kept.items()},
                "loss_error": float(f"{_relative(value, exact):.3g}"),
                "gradient_error": float(f"{max(errors):.3g}"),
            }
        )
    return report


def _loss_and_gradients(
    loss: Loss, student: Head, labels: Tensor, heads: Mapping[str, Head], buckets: Buckets | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight = (at_least_float32(t.detach()).requires_grad_() for t in (student.hidden, student.weight))
    leaf = replace(student, hidden=hidden, weight=weight, bias=None if student.bias is None else student.bias.detach())
    with torch.enable_grad():
        total, _ = chunked_loss(loss, {STUDENT: leaf, **heads}, labels, buckets=buckets)
        return total.detach(), torch.autograd.grad(total, [hidden, weight])


def _relative(value: Tensor, exact: Tensor) -> float:
    """Return ‖value − exact‖ / ‖exact‖; if the exact value is 0, return 1 if ``value`` differs, else 0."""
    size = float(in_float64(exact).norm())
    return float(in_float64(value - exact).norm()) / size if size else float(bool(value.any()))
