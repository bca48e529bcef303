"""KLs of student, linear target and their mixture, by hand: value and gradient of a chunk in two or three tensors.

This covers ``sft``, ``kd``, ``delta_kd``, ``delta_shift``, ``delta_bilinear``, ``delta_multi_teacher``, ``taid``,
``delta_gated``, and the same under reverse KL, the Jensen-Shannon and the skew divergences (the untreated ones). The
definitions are in ``deltakd/losses``: ``Distillation`` of a ``ShiftedTarget`` or a ``GatedDeltaTarget``, and
``SupervisedFineTuning``; ``tests/kernels/test_chunked.py`` shows that values and gradients agree.

With q = softmax(z_s / τ) and p = softmax(Σ c_r z_r / τ), the gradient of λ·CE + (1 − λ)·s·D w.r.t. z_s is
λ (softmax(z_s) − onehot) + (1 − λ) (s / τ) d, with d = q − p for KL(p ‖ q) (docs/design.md#identities, number 9),
d = q (log q − log p − KL(q ‖ p)) for KL(q ‖ p), and d = q (g − Σ q g) for a · KL(p ‖ m) + b · KL(q ‖ m), where
m = μ p + (1 − μ) q and g = b log(q / m) − (1 − μ) (a p + b q) / m. So autograd has nothing to keep. Matrix products
cover a whole chunk; everything after them covers a few rows at a time, which stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.kernels import gpu
from deltakd.kernels.blocks import ChunkBuffers, row_blocks
from deltakd.kernels.finite_biases import is_finite
from deltakd.kernels.head_gradients import GradientFormat
from deltakd.types import STUDENT, Gate, Head, HeadLogits, LinearKL, Loss, MixtureKL
from deltakd.types.products import Summands


def fusible(loss: Loss, student: Head, references: Mapping[str, Head]) -> LinearKL | None:
    """Return the form to compute by hand, or None if autograd has to differentiate the loss.

    A bias of −inf (a token that a model rules out) is left to the plain formula, which handles it.
    """
    form = loss.fused_form
    if form is None or not _linear(student):
        return None
    biases = [head.bias for head in (student, *references.values()) if head.bias is not None]
    return form if all(map(is_finite, biases)) else None


def triton_form(loss: Loss, student: Head, references: Mapping[str, Head]) -> LinearKL | None:
    """Return the form that ``triton_chunk`` can compute, or None."""
    form = loss.fused_form
    if form is None or not gpu.serves(student.hidden.device, *(head.dtype for head in (student, *references.values()))):
        return None
    # The target then holds the student's logits, capped.
    mixes_in_capped = student.softcap is not None and STUDENT in form.coefficients
    return None if mixes_in_capped else form


def _linear(head: Head) -> bool:
    """True if logits are linear in hidden states, so that the gradient is that of the matrix product."""
    return head.softcap is None


@torch.no_grad()
def fused_chunk(
    form: LinearKL, student: Head, references: Mapping[str, Head], labels: Tensor, buffers: ChunkBuffers
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute loss and gradient of n tokens.

    Args:
        form: what to compute.
        student, references: heads over the n tokens.
        labels: [n] int64.
        buffers: for the logits.

    Returns:
        ``loss`` and its parts, [n] nats each, and the gradient of the summed loss w.r.t. the student's logits, [n, V],
        in one of the buffers.
    """
    z_NV = student.add_logits(buffers.logits("student", student), 1.0, beta=0.0)
    target_NV = None
    if form.ce_weight != 1.0:
        alike = all(head.dtype == student.dtype for head in references.values())
        into_NV = buffers.logits("target", student) if alike else None
        target_NV = HeadLogits(z_NV, references).combined(form.coefficients, into_NV)
    gated = {}
    if target_NV is not None and form.gate is not None:
        gated[form.gate.name] = _add_gated(form.gate, form.coefficients, target_NV, references)
    blocks = [
        _block(form, z_NV[rows], None if target_NV is None else target_NV[rows], labels[rows])
        for rows in row_blocks(z_NV)
    ]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]} | gated, z_NV


@torch.no_grad()
def triton_chunk(
    form: LinearKL, student: Head, references: Mapping[str, Head], labels: Tensor, gradients: GradientFormat | None
) -> tuple[dict[str, Tensor], Summands]:
    """Do the same with Triton kernels (``deltakd.kernels.gpu``); any head may be soft-capped or rule out tokens.

    Args:
        form, student, references, labels: as for ``fused_chunk``.
        gradients: how the gradient is multiplied; None: it is not wanted.

    Returns:
        ``loss`` and its parts, [n] nats each, and the summands of the gradient w.r.t. the student's logits before
        soft-capping.
    """
    # Triton is imported where it is used: not every machine has it.
    from deltakd.kernels.gpu import linear_kl

    z_NV = student.uncapped().add_logits(None, 1.0)
    target_NV, shift_NV, gate_N = None, None, None
    values: dict[str, Tensor] = {}
    if form.ce_weight != 1.0:
        target_NV = HeadLogits(z_NV, references).combined(form.coefficients)
        if form.gate is not None:
            shift_NV, gate_N = _gated(form.gate, form.coefficients, target_NV, references)
            values[form.gate.name] = gate_N
    summands: Summands = ()
    if gradients is not None:
        # In float32 the gradient takes the place of the logits.
        in_place = gradients.dtype == z_NV.dtype
        summands = (z_NV,) if in_place else tuple(gradients.empty(z_NV) for _ in range(gradients.count))
    scale = 1.0 if gradients is None else gradients.scale
    ce_N, kl_N = linear_kl.loss_rows(form, z_NV, target_NV, labels, summands, scale, student.softcap, shift_NV, gate_N)
    return {**_mixed(form, ce_N, kl_N), **values}, summands


def _gated(
    gate: Gate, coefficients: Mapping[str, float], target_NV: Tensor, references: Mapping[str, Head]
) -> tuple[Tensor, Tensor]:
    """Return the gated logits, [n, V], and the gate, [n]; rule out in the target what any of their roles rules out."""
    from deltakd.kernels.gpu import linear_kl

    to_NV = target_NV if coefficients == {gate.to: 1.0} else references[gate.to].add_logits(None, 1.0)
    shift_NV = references[gate.origin].add_logits(None, 1.0)
    gate_N = linear_kl.gate_rows(to_NV, shift_NV, gate.nats)
    beta = gate.coefficients.get(gate.origin, 0.0)
    for role, factor in gate.coefficients.items():
        if role != gate.origin:
            references[role].add_logits(shift_NV, factor, beta)
            beta = 1.0
    if beta != 1.0:
        shift_NV.mul_(beta)
    for role in {gate.to, gate.origin, *gate.coefficients}:
        bias = references[role].bias
        if bias is not None:
            target_NV.masked_fill_(torch.isneginf(bias), -torch.inf)
    return shift_NV, gate_N


def _mixed(form: LinearKL, ce_N: Tensor, kl_N: Tensor | None) -> dict[str, Tensor]:
    """Return the loss and its parts."""
    if kl_N is None:
        return {"loss": ce_N, "ce": ce_N}
    loss_N = (1 - form.ce_weight) * form.scale * kl_N
    # λ = 0 must not multiply an infinite cross-entropy by 0.
    if form.ce_weight > 0:
        loss_N = loss_N + form.ce_weight * ce_N
    return {"loss": loss_N, "ce": ce_N, form.name: kl_N}


def _add_gated(
    gate: Gate, coefficients: Mapping[str, float], target_NV: Tensor, references: Mapping[str, Head]
) -> Tensor:
    """Add the gated logits to the target's in place; return the gate, [n]."""
    # The target may be these very logits, which then need not be computed again.
    to_NV = target_NV if coefficients == {gate.to: 1.0} else references[gate.to].logits()
    shift_NV = references[gate.origin].logits()
    gate_N = torch.empty_like(target_NV[:, 0])
    for rows in row_blocks(target_NV):
        p_NV, to_sum_N = _softmax(to_NV[rows])
        spare_NV, origin_sum_N = _softmax(shift_NV[rows])
        difference_NV = torch.sub(to_NV[rows], shift_NV[rows], out=spare_NV)
        kl_N = torch.linalg.vecdot(p_NV, difference_NV) - to_sum_N + origin_sum_N
        gate_N[rows] = kl_N.clamp_min_(0.0).div_(-gate.nats).exp_().to(gate_N.dtype)
    shift_NV.mul_(gate.coefficients.get(gate.origin, 0.0))
    for role, factor in gate.coefficients.items():
        if role != gate.origin:
            references[role].add_logits(shift_NV, factor)
    target_NV.addcmul_(shift_NV, gate_N[:, None])
    return gate_N


def _block(form: LinearKL, z_NV: Tensor, target_NV: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """Return loss and parts of a few tokens. The student's logits become the gradient; the target's are overwritten."""
    tau, ce_weight = form.temperature, form.ce_weight
    rows_N = torch.arange(len(labels), device=labels.device)
    q_NV, log_sum_N = _softmax(z_NV)
    ce_N = (log_sum_N - z_NV[rows_N, labels]).to(z_NV.dtype)
    if target_NV is None:
        z_NV.copy_(q_NV)
        values = {"loss": ce_N, "ce": ce_N}
    else:
        ce_grad_NV = None
        if tau != 1.0:
            ce_grad_NV = q_NV if ce_weight else None
            q_NV, log_sum_N = _softmax(z_NV.div_(tau))
            target_NV.div_(tau)
        factor, with_ce = (1 - ce_weight) * form.scale / tau, ce_weight if tau == 1.0 else 0.0
        if form.mixture is not None:
            kl_N = _mixture_kl(form.mixture, target_NV.log_softmax(-1), z_NV, factor, with_ce)
        else:
            divergence = _reverse_kl if form.reverse else _forward_kl
            kl_N = divergence(target_NV, z_NV, q_NV, log_sum_N, factor, with_ce)
        values = _mixed(form, ce_N, kl_N)
        if ce_grad_NV is not None:
            z_NV.add_(ce_grad_NV, alpha=ce_weight)
    z_NV[rows_N, labels] -= ce_weight
    return values


def _softmax(z_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities, and log Σ exp(z) of each row, in float64 where the device has it."""
    q_NV = z_NV.softmax(-1)
    largest_N, largest_q_N = z_NV.amax(-1), q_NV.amax(-1)
    if z_NV.device.type != "mps":
        largest_N, largest_q_N = largest_N.double(), largest_q_N.double()
    # The largest probability is 1 / Σ exp(z − max): no second pass of exponentials.
    return q_NV, largest_N - largest_q_N.log()


def _forward_kl(
    target_NV: Tensor, z_NV: Tensor, q_NV: Tensor, log_sum_N: Tensor, factor: float, ce_weight: float
) -> Tensor:
    """Return KL(p ‖ q) of p = softmax(target), [n]; ``z_NV`` becomes factor · (q − p) + ce_weight · q.

    Args:
        target_NV, z_NV, q_NV: logits of the target, logits and probabilities of the student; overwritten.
        log_sum_N: of the student's logits.
        factor, ce_weight: of the gradient.
    """
    p_NV, target_sum_N = _softmax(target_NV)
    kl_N = torch.linalg.vecdot(p_NV, target_NV.sub_(z_NV)) - target_sum_N + log_sum_N
    if factor + ce_weight != 1.0:
        q_NV.mul_(factor + ce_weight)
    torch.sub(q_NV, p_NV, alpha=factor, out=z_NV)
    return kl_N.to(z_NV.dtype)


def _reverse_kl(
    target_NV: Tensor, z_NV: Tensor, q_NV: Tensor, log_sum_N: Tensor, factor: float, ce_weight: float
) -> Tensor:
    """Return KL(q ‖ p), [n]; ``z_NV`` becomes factor · q (log q − log p − KL) + ce_weight · q, as ``_forward_kl``."""
    spare_NV, target_sum_N = _softmax(target_NV)
    difference_NV = torch.sub(z_NV, target_NV, out=spare_NV)
    inner_N = torch.linalg.vecdot(q_NV, difference_NV)
    kl_N = inner_N - log_sum_N + target_sum_N
    # log q − log p − KL is z − target minus its mean under q: the sums of exponentials drop out.
    if factor != 1.0:
        difference_NV.mul_(factor)
    difference_NV.add_(inner_N[:, None], alpha=-factor)
    if ce_weight:
        difference_NV.add_(ce_weight)
    torch.mul(q_NV, difference_NV, out=z_NV)
    return kl_N.to(z_NV.dtype)


def _mixture_kl(form: MixtureKL, log_p_NV: Tensor, z_NV: Tensor, factor: float, ce_weight: float) -> Tensor:
    """Return the divergence, [n]; ``z_NV`` becomes factor · q (g − Σ q g) + ce_weight · q."""
    a, b, share = form.of_target, form.of_student, form.share
    log_q_NV = z_NV.log_softmax(-1)
    log_m_NV = torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))
    m_N = log_m_NV.exp().sum(-1)
    q_NV = torch.exp(log_q_NV, out=z_NV)
    # Ratios to the mixture: they are bounded, however small the probabilities.
    log_p_NV, log_q_NV = log_p_NV.sub_(log_m_NV), log_q_NV.sub_(log_m_NV)
    value_N = torch.zeros_like(m_N)
    g_NV = torch.zeros_like(q_NV)
    if a > 0:
        ratio_NV = log_p_NV.exp()
        p_NV = ratio_NV * log_m_NV.exp()
        value_N += a * (torch.linalg.vecdot(p_NV, log_p_NV) - p_NV.sum(-1) + m_N)
        g_NV.sub_(ratio_NV, alpha=(1 - share) * a)
    if b > 0:
        value_N += b * (torch.linalg.vecdot(q_NV, log_q_NV) - q_NV.sum(-1) + m_N)
        g_NV.add_(log_q_NV, alpha=b).sub_(log_q_NV.exp_(), alpha=(1 - share) * b)
    g_NV.sub_(torch.linalg.vecdot(q_NV, g_NV)[:, None])
    q_NV.mul_(g_NV.mul_(factor).add_(ce_weight))
    return value_N
