"""Forward KL to a target that is linear in the logits, by hand: value and gradient of a chunk in two tensors.

This covers ``sft``, ``kd``, ``delta_kd``, ``delta_shift``, ``delta_bilinear``, ``delta_multi_teacher`` and ``taid``
(the untreated ones). The definitions are in ``deltakd/losses``: ``Distillation`` of a ``ShiftedTarget`` under
``ForwardKL``, and ``SupervisedFineTuning``; ``tests/kernels/test_chunked.py`` shows that values and gradients agree.

With q = softmax(z_s / τ) and p = softmax(Σ c_r z_r / τ), the gradient of λ·CE + (1 − λ)·s·KL(p ‖ q) w.r.t. z_s is
λ (softmax(z_s) − onehot) + (1 − λ) (s / τ) (q − p) (docs/design.md#identities, number 9), so autograd has nothing to
keep. Matrix products cover a whole chunk; everything after them covers a few rows at a time, which stay in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltakd.kernels.blocks import row_blocks
from deltakd.types import Head, HeadLogits, LinearForwardKL, Loss


def fusible(loss: Loss, student: Head, references: Mapping[str, Head]) -> LinearForwardKL | None:
    """Return the form to compute by hand, or None if autograd has to differentiate the loss.

    A bias of −inf (a token that a model rules out) is left to the plain formula, which handles it.
    """
    form = loss.fused_form
    if form is None or not _linear(student):
        return None
    biases = [head.bias for head in (student, *references.values()) if head.bias is not None]
    return form if all(bool(bias.isfinite().all()) for bias in biases) else None


def _linear(head: Head) -> bool:
    """True if logits are linear in hidden states, so that the gradient is that of the matrix product."""
    return head.softcap is None


@torch.no_grad()
def fused_chunk(
    form: LinearForwardKL, student: Head, references: Mapping[str, Head], labels: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute loss and gradient of n tokens.

    Args:
        form: what to compute.
        student, references: heads over the n tokens.
        labels: [n] int64.

    Returns:
        ``loss`` and its parts, [n] nats each, and the gradient of the summed loss w.r.t. the student's logits, [n, V].
    """
    z_NV = student.logits()
    target_NV = None if form.ce_weight == 1.0 else HeadLogits(z_NV, references).combined(form.coefficients)
    blocks = [
        _block(form, z_NV[rows], None if target_NV is None else target_NV[rows], labels[rows])
        for rows in row_blocks(z_NV)
    ]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}, z_NV


def _block(form: LinearForwardKL, z_NV: Tensor, target_NV: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """Return loss and parts of a few tokens. The student's logits become the gradient; the target's are overwritten."""
    tau, ce_weight = form.temperature, form.ce_weight
    rows_N = torch.arange(len(labels), device=labels.device)
    log_q_NV = z_NV.log_softmax(-1)
    ce_N = -log_q_NV[rows_N, labels]
    values = {"loss": ce_N, "ce": ce_N}
    if target_NV is None:
        torch.exp(log_q_NV, out=z_NV)
    else:
        ce_grad_NV = None
        if tau != 1.0:
            ce_grad_NV = log_q_NV.exp_() if ce_weight else None
            log_q_NV = z_NV.div_(tau).log_softmax(-1)
            target_NV.div_(tau)
        log_p_NV = target_NV.log_softmax(-1)
        p_NV = torch.exp(log_p_NV, out=target_NV)
        kl_N = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV)) - p_NV.sum(-1)
        # As in the plain formula (losses.divergences.kl): Σ (q − p) is 0 up to the rounding of the normalisation.
        q_NV = torch.exp(log_q_NV, out=z_NV)
        kl_N += q_NV.sum(-1)
        values |= {form.name: kl_N, "loss": (1 - ce_weight) * form.scale * kl_N}
        if ce_weight > 0:
            values["loss"] = values["loss"] + ce_weight * ce_N
        factor = (1 - ce_weight) * form.scale / tau
        weight = factor + (ce_weight if tau == 1.0 else 0.0)
        if weight != 1.0:
            q_NV.mul_(weight)
        if ce_grad_NV is not None:
            q_NV.add_(ce_grad_NV, alpha=ce_weight)
        q_NV.sub_(p_NV, alpha=factor)
    z_NV[rows_N, labels] -= ce_weight
    return values


def add_head_gradients(student: Head, grad_NV: Tensor, rows: slice, grads: Mapping[str, Any]) -> None:
    """Turn a gradient w.r.t. logits [n, V] into those of ``hidden`` (at ``rows``), ``weight`` and ``bias``, in place.

    Args:
        student: the chunk's head, with weight and bias in at least float32.
        grad_NV: the gradient; changed in place if the head scales its logits.
        rows: the chunk's place among all tokens.
        grads: name -> buffer, for the gradients that are wanted.
    """
    if student.scale != 1.0:
        grad_NV.mul_(student.scale)
    if "hidden" in grads:
        torch.mm(grad_NV, student.weight, out=grads["hidden"][rows])
    if "weight" in grads:
        grads["weight"].addmm_(grad_NV.T, student.hidden.to(grad_NV.dtype))
    if "bias" in grads:
        grads["bias"].add_(grad_NV.sum(0))
