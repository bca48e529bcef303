"""The formulas of docs/design.md#delta-kd in NumPy float64, and what the loss tests share. Nothing here calls a loss.

P is the target, Q the student; ``log_p`` and ``log_q`` are log-probs [N, V]. Where a loss detaches a weight, the oracle
takes the student that the weight is made of as ``frozen``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from deltakd.types import Loss, LossOutput

Array = np.ndarray
Logits = dict[str, Array]

ROLES = ("student", "teacher", "teacher_raw", "student_raw", "teacher_2", "teacher_raw_2")


def draw(seed: int = 0, n: int = 7, v: int = 23, scale: float = 3.0) -> tuple[dict[str, Tensor], Tensor]:
    """Random float64 logits [n, v] for every role (the student's want gradients), and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    logits = {role: scale * torch.randn(n, v, generator=generator, dtype=torch.float64) for role in ROLES}
    logits["student"].requires_grad_()
    return logits, torch.randint(0, v, (n,), generator=generator)


def arrays(logits: Mapping[str, Tensor]) -> Logits:
    return {role: z.detach().double().numpy() for role, z in logits.items()}


def gradient(loss: Loss, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Of the sum over the tokens, with respect to the student's logits."""
    (result,) = torch.autograd.grad(loss(logits, labels).per_token.sum(), logits["student"])
    return result


def term(output: LossOutput, name: str) -> Array:
    return output.parts[name].detach().numpy()


def close(actual: Tensor, expected: Array, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=rtol, atol=atol)


def numeric_gradient(function: Callable[[Array], Array], z: Array, step: float = 1e-5) -> Array:
    """Central differences of a function [N, V] -> [N] whose rows do not depend on each other."""
    columns = []
    for v in range(z.shape[1]):
        moved = np.zeros_like(z)
        moved[:, v] = step
        columns.append((function(z + moved) - function(z - moved)) / (2 * step))
    return np.stack(columns, axis=1)


# --- Probabilities


def log_softmax(z: Array) -> Array:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(z: Array, labels: Array) -> Array:
    return -log_softmax(z)[np.arange(len(labels)), labels]


def mixed(ce: Array, term: Array, ce_weight: float, tau: float = 1.0, squared: bool = False) -> Array:
    """λ · CE + (1 − λ) · term, with τ² on the term on request (docs/design.md#delta-kd)."""
    return ce_weight * ce + (1 - ce_weight) * (tau**2 if squared else 1.0) * term


# --- Divergences (docs/design.md#divergences)


def _expectation(log_p: Array, of: Array) -> Array:
    """Σ P · of, where P = 0 counts nothing."""
    p = np.exp(log_p)
    return np.where(p > 0, p * np.where(p > 0, of, 0.0), 0.0).sum(-1)


def forward_kl(log_p: Array, log_q: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return _expectation(log_p, log_p - log_q)


def reverse_kl(log_p: Array, log_q: Array) -> Array:
    return forward_kl(log_q, log_p)


def symmetric_kl(log_p: Array, log_q: Array, weight: float = 0.5) -> Array:
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def _log_mixture(weight: float, log_a: Array, log_b: Array) -> Array:
    return np.log(weight * np.exp(log_a) + (1 - weight) * np.exp(log_b))


def jsd(log_p: Array, log_q: Array, beta: float = 0.5) -> Array:
    log_m = _log_mixture(beta, log_p, log_q)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def tvd(log_p: Array, log_q: Array) -> Array:
    return 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1)


def skew_forward_kl(log_p: Array, log_q: Array, skew: float = 0.1) -> Array:
    return forward_kl(log_p, _log_mixture(skew, log_p, log_q))


def skew_reverse_kl(log_p: Array, log_q: Array, skew: float = 0.1) -> Array:
    return forward_kl(log_q, _log_mixture(1 - skew, log_p, log_q))


def adaptive_kl(log_p: Array, log_q: Array, head_mass: float = 0.5, frozen: Array | None = None) -> Array:
    p, q = np.exp(log_p), np.exp(log_q if frozen is None else frozen)
    weights = []
    for p_row, gap_row in zip(p, np.abs(p - q), strict=True):
        order = np.argsort(-p_row, kind="stable")
        head, mass = [order[0]], p_row[order[0]]
        for token in order[1:]:
            mass += p_row[token]
            if mass > head_mass:
                break
            head.append(token)
        total = gap_row.sum()
        weights.append(0.5 if total == 0 else gap_row[head].sum() / total)
    head_weight = np.array(weights)
    return head_weight * forward_kl(log_p, log_q) + (1 - head_weight) * reverse_kl(log_p, log_q)


def todi(log_p: Array, log_q: Array, frozen: Array | None = None) -> Array:
    w = 1 / (1 + np.exp(-(log_p - (log_q if frozen is None else frozen))))
    p, q = np.exp(log_p), np.exp(log_q)
    return (w * p * (log_p - log_q) + (1 - w) * q * (log_q - log_p)).sum(-1)


def alpha_beta(log_p: Array, log_q: Array, alpha: float = 0.2, beta: float = 0.7) -> Array:
    if (alpha, beta) == (1, 0):
        return forward_kl(log_p, log_q)
    if (alpha, beta) == (0, 1):
        return reverse_kl(log_p, log_q)
    if (alpha, beta) == (0, 0):
        return 0.5 * np.square(log_p - log_q).sum(-1)
    both = alpha + beta
    p, q = np.exp(log_p), np.exp(log_q)
    return -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum(-1) / (alpha * beta)


def logit_mse(log_p: Array, log_q: Array) -> Array:
    """The variance over the tokens that neither side rules out; 0 if there are none."""
    values = []
    for p, q in zip(log_p, log_q, strict=True):
        possible = np.isfinite(p) & np.isfinite(q)
        values.append(np.var(p[possible] - q[possible]) if possible.any() else 0.0)
    return np.array(values)


# --- Targets (docs/design.md#targets)


def _shift(z: Logits, to: str, origin: str, centre: str | None, clip: float | None) -> Array:
    """log p_to − log p_origin at τ = 1, centred, then clipped; 0 where one of them has no mass."""
    log_to, log_origin = log_softmax(z[to]), log_softmax(z[origin])
    with np.errstate(invalid="ignore"):
        delta = np.where(np.isneginf(log_to) | np.isneginf(log_origin), 0.0, log_to - log_origin)
    if centre is not None:
        delta = delta - (np.exp(log_softmax(z[centre])) * delta).sum(-1, keepdims=True)
    return delta if clip is None else np.clip(delta, -clip, clip)


def plausible(z: Logits, mask: float | None, mask_by: str) -> Array:
    """Where log p_ref(v) ≥ max log p_ref + log m."""
    if mask is None:
        return np.ones(z["teacher"].shape, dtype=bool)
    log_p = log_softmax(z[mask_by])
    return log_p >= log_p.max(-1, keepdims=True) + np.log(mask)


def ruled_out(z: Logits, *roles: str) -> Array:
    return np.any([np.isneginf(z[role]) for role in roles], axis=0)


def composed(
    z: Logits,
    base: str,
    shifts: list[tuple[float, str, str]],
    centre: str | None = None,
    clip: float | None = None,
    mask: float | None = None,
    mask_by: str = "teacher",
) -> Array:
    """Target logits: the base plus weight · (to − origin) for each shift, 0 where the mask says implausible."""
    total = sum(weight * _shift(z, to, origin, centre, clip) for weight, to, origin in shifts)
    target = log_softmax(z[base]) + np.where(plausible(z, mask, mask_by), total, 0.0)
    return np.where(ruled_out(z, base, *(r for _, *roles in shifts for r in roles)), -np.inf, target)


def delta_target(z: Logits, alpha: float, **treatment: object) -> Array:
    return composed(z, "teacher", [(alpha, "student_raw", "teacher_raw")], **treatment)


def shift_target(z: Logits, beta: float, **treatment: object) -> Array:
    return composed(z, "student_raw", [(beta, "teacher", "teacher_raw")], **treatment)


def bilinear_target(z: Logits, u: float, v: float, **treatment: object) -> Array:
    shifts = [(u, "student_raw", "teacher_raw"), (v, "teacher", "teacher_raw")]
    return composed(z, "teacher_raw", shifts, **treatment)


def taid_target(z: Logits, u: float) -> Array:
    return (1 - u) * z["student"] + u * z["teacher"]


def multi_teacher_target(z: Logits, weights: tuple[float, float], factor: float, **treatment: object) -> Array:
    first, second = weights
    shifts = [(factor * first, "teacher", "teacher_raw"), (factor * second, "teacher_2", "teacher_raw_2")]
    return composed(z, "student_raw", shifts, **treatment)


# --- Parallel variants (docs/design.md#parallel)


def ratio_kl(
    z: Logits,
    roles: tuple[str, str, str] = ("teacher", "teacher_raw", "student_raw"),
    tau: float = 1.0,
    centre: str | None = None,
    clip: float | None = None,
    mask: float | None = 0.1,
    mask_by: str = "teacher",
) -> Array:
    """KL( N[to / origin] ‖ N[student / over] ), both over the kept tokens alone."""
    to, origin, over = roles
    kept = plausible(z, mask, mask_by) & ~ruled_out(z, "student", *roles)
    delta = _shift(z, to, origin, centre, clip)
    log_student, log_over = log_softmax(z["student"]), log_softmax(z[over])
    values = []
    for row, keep in enumerate(kept):
        target = log_softmax(delta[row, keep] / tau)
        student = log_softmax((log_student[row, keep] - log_over[row, keep]) / tau)
        values.append((np.exp(target) * (target - student)).sum())
    return np.array(values)


def logit_variance(
    z: Logits,
    weighting: str = "teacher",
    beta: float = 1.0,
    tau: float = 1.0,
    frozen: Array | None = None,
    centre: str | None = None,
    clip: float | None = None,
    mask: float | None = None,
    mask_by: str = "teacher",
) -> Array:
    """Var_w(d / τ), d = (log π_θ − log π_s0) − β (log π_t − log π_t0); ``frozen``: student logits that weigh."""
    kept = plausible(z, mask, mask_by) & ~ruled_out(z, "teacher", "teacher_raw", "student_raw")
    delta = _shift(z, "teacher", "teacher_raw", centre, clip)
    by = {**z, "student": z["student"] if frozen is None else frozen, "uniform": np.zeros_like(z["teacher"])}[weighting]
    log_student, log_raw = log_softmax(z["student"]), log_softmax(z["student_raw"])
    kept &= np.isfinite(log_student)
    values = []
    for row, keep in enumerate(kept):
        d = (log_student[row, keep] - log_raw[row, keep] - beta * delta[row, keep]) / tau
        w = np.exp(log_softmax(by[row, keep]))
        values.append((w * d**2).sum() - (w * d).sum() ** 2)
    return np.array(values)


def signed_unsafe(z: Logits, alpha: float, tau: float = 1.0) -> Array:
    """KL(teacher ‖ π) + α [KL(raw student ‖ π) − KL(raw teacher ‖ π)]."""
    log_q = log_softmax(z["student"] / tau)
    kl = {r: forward_kl(log_softmax(z[r] / tau), log_q) for r in ("teacher", "student_raw", "teacher_raw")}
    return kl["teacher"] + alpha * (kl["student_raw"] - kl["teacher_raw"])


def signed_safe(z: Logits, alpha: float, tau: float = 1.0) -> Array:
    """KL(m ‖ π), m the positive part of the signed mass, normalised again."""
    p = {r: np.exp(log_softmax(z[r] / tau)) for r in ("teacher", "student_raw", "teacher_raw")}
    mass = np.maximum(p["teacher"] + alpha * (p["student_raw"] - p["teacher_raw"]), 0.0)
    with np.errstate(divide="ignore"):
        return forward_kl(np.log(mass / mass.sum(-1, keepdims=True)), log_softmax(z["student"] / tau))
