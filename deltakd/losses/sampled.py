"""What losses of sampled tokens share: checks, log-probs of labels, the policy gradient, the mixture with CE."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from deltakd.losses.divergences import kl
from deltakd.types import TEACHER, HeadLogits, at_least_float32


def check_numbers(ce_weight: float, ratio_clip: float | None, **bounds: float | None) -> None:
    """Raise a ValueError that names every number out of range.

    Args:
        ce_weight: λ.
        ratio_clip: ε of PPO, or None.
        bounds: by key of the loss: bounds in nats, or None.
    """
    problems = []
    if not 0 <= ce_weight <= 1:
        problems.append(f"loss.ce_weight is {ce_weight}; it must be between 0 (no labels) and 1 (labels only)")
    problems += [
        f"loss.{key} is {bound}; it must be a finite number above 0, or null"
        for key, bound in bounds.items()
        if bound is not None and not 0 < bound < math.inf
    ]
    if ratio_clip is not None and not 0 < ratio_clip < 1:
        problems.append(f"loss.ratio_clip is {ratio_clip}; it must be above 0 and below 1, or null")
    if problems:
        raise ValueError("; ".join(problems))


def of_labels(values_NV: Tensor, labels: Tensor) -> Tensor:
    """Return the labels' values: [N]."""
    return values_NV.gather(-1, labels[:, None]).squeeze(-1)


def with_gain(value_N: Tensor, gain_N: Tensor) -> Tensor:
    """[N] the value, with the gradient of −gain added: a surrogate's own value is meaningless."""
    return value_N - (gain_N - gain_N.detach())


def with_labels(term_N: Tensor, log_pi_N: Tensor, ce_weight: float) -> Tensor:
    """[N] λ · CE + (1 − λ) · term; CE is left out at λ = 0."""
    per_token_N = (1 - ce_weight) * term_N
    return per_token_N - ce_weight * log_pi_N if ce_weight > 0 else per_token_N


def sampled_log_probs(logits: Mapping[str, Tensor]) -> Tensor | None:
    """Return the labels' log-probs when an earlier student sampled them, [N] nats, if known."""
    return logits.facts.sampled_log_probs if isinstance(logits, HeadLogits) else None


def policy_gain(
    advantage_N: Tensor, log_pi_N: Tensor, sampled_log_probs_N: Tensor | None, ratio_clip: float | None
) -> Tensor:
    """[N] the quantity that a policy gradient maximises: A · log π, or PPO's clipped A · π / π_sampled."""
    if sampled_log_probs_N is None:
        return advantage_N * log_pi_N
    ratio_N = (log_pi_N - sampled_log_probs_N).exp()
    gain_N = advantage_N * ratio_N
    if ratio_clip is None:
        return gain_N
    return torch.minimum(gain_N, advantage_N * ratio_N.clamp(1 - ratio_clip, 1 + ratio_clip))


@torch.no_grad()
def watched(logits: Mapping[str, Tensor], log_student_NV: Tensor, requires: Collection[str]) -> dict[str, Tensor]:
    """Return what is worth watching on the student's own responses, exact over the vocabulary, [N] nats each.

    Args:
        logits: role -> [N, V].
        log_student_NV: the student's log-probs, detached.
        requires: the references that the loss reads.

    Returns:
        ``entropy`` of the student, and ``teacher_kl``, KL(π_θ ‖ teacher), where the teacher is read and is not itself
        what the loss aims at.
    """
    parts = {"entropy": -mean_under(log_student_NV, log_student_NV)}
    if TEACHER in requires and len(requires) > 1:
        parts["teacher_kl"] = kl(log_student_NV, at_least_float32(logits[TEACHER]).log_softmax(-1))
    return parts


def mean_under(log_student_NV: Tensor, values_NV: Tensor) -> Tensor:
    """E_θ[values], [N]; a token that the student rules out has no weight, whatever its value."""
    q_NV = log_student_NV.exp()
    return (q_NV * values_NV.masked_fill(q_NV == 0, 0.0)).sum(-1)
