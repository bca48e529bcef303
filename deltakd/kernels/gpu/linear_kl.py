"""Losses and gradients of ``LinearKL`` from logits, in two passes over memory: one program per row, tiles of columns.

A KL to the mixture of both (``MixtureKL``) takes a third pass between them: what its gradient subtracts is a mean under
the student of a function of normalised probabilities, which, unlike a KL's, cannot be rescaled as the sums grow.

Per logit the loss kernel reads the student's and the target's 4 bytes twice, and writes 2 bytes of gradient (4 in
float32 or as two summands): 18 bytes, 26 with a gate or a mixture, 10 for cross-entropy alone. It computes 4
exponentials and about 40 other operations. For 8,192 tokens of a vocabulary of 128,256 these are 19 GB and 50 GFLOP:
6.3 ms of memory traffic at 3 TB/s, beside 1.2 ms of exponentials at an H100's 16 per cycle and multiprocessor. So
memory bounds it.

The gate kernel reads two references' 4 bytes once: 8.4 GB, 2.8 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltakd.types import LinearKL, MixtureKL

_BLOCK = 4096
#: Warps per row.
WARPS = 8
#: The kernel's names of divergences.
_CE, _FORWARD, _REVERSE, _MIXTURE = 0, 1, 2, 3


@triton.jit
def _capped(z, softcap, HAS_CAP: tl.constexpr):
    """softcap · tanh(z / softcap), from exp: exact enough in float32, and finite for every z."""
    if HAS_CAP:
        return softcap * (1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0))
    return z


@triton.jit
def loaded(row, at, columns, padded):
    """A tile of a row; −inf beyond its end. Without ``padded``, a multiple of 16, wide loads would end at odd ends."""
    x = tl.load(row + at, mask=at < padded, other=float("-inf"))
    return tl.where(at < columns, x, float("-inf"))


@triton.jit
def _target(target, shift, gate, at, columns, padded, HAS_GATE: tl.constexpr):
    """A tile of the target's logits; a token that it rules out stays ruled out, whatever the shift."""
    t = loaded(target, at, columns, padded)
    if HAS_GATE:
        t = tl.where(t == float("-inf"), t, t + gate * loaded(shift, at, columns, padded))
    return t


@triton.jit
def summed(largest, total, x):
    """Take a tile into an online log-sum-exp: the new largest logit, the rescaled sum with it, and the factor."""
    # The start is −1e30, not −inf, whose difference to itself is NaN.
    new = tl.maximum(largest, tl.max(x, axis=0))
    factor = tl.exp(largest - new)
    return new, total * factor + tl.sum(tl.exp(x - new), axis=0), factor


@triton.jit
def _compared(inner, a_sum, a_factor, a_old, a_new, b_old, b_new, a, b):
    """Take a tile into Σ e^(a − a_max) ((a − a_max) − (b − b_max)); ``a_sum`` is the sum before the tile."""
    weight = tl.exp(a - a_new)
    term = tl.where(weight > 0.0, weight * ((a - a_new) - (b - b_new)), 0.0)
    return a_factor * (inner - a_sum * ((a_new - a_old) - (b_new - b_old))) + tl.sum(term, axis=0)


@triton.jit
def _student(z, at, columns, padded, softcap, HAS_CAP: tl.constexpr):
    """A tile of the student's logits, capped; −inf beyond the end of the row."""
    x = _capped(loaded(z, at, columns, padded), softcap, HAS_CAP)
    if HAS_CAP:
        x = tl.where(at < columns, x, float("-inf"))
    return x


@triton.jit
def _mixed(log_p, log_q, of_target, of_student, share):
    """q, the summands of ``MixtureKL``, and g, of which the gradient is q (g − Σ q g); 0 where a probability is 0."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    a, b = log_p + tl.log(share), log_q + tl.log(1.0 - share)
    largest = tl.maximum(a, b)
    # Without a possible token, −inf − (−inf) would be NaN.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    m = tl.exp(a - largest) + tl.exp(b - largest)
    log_m = largest + tl.log(tl.where(m > 0.0, m, 1.0))
    # Ratios to the mixture: they are bounded, however small the probabilities.
    log_p_ratio, log_q_ratio = log_p - log_m, log_q - log_m
    m = m * tl.exp(largest)
    value = of_target * (tl.where(p > 0.0, p * log_p_ratio, 0.0) - p + m)
    value += of_student * (tl.where(q > 0.0, q * log_q_ratio, 0.0) - q + m)
    g = of_student * tl.where(q > 0.0, log_q_ratio, 0.0)
    g -= (1.0 - share) * (of_target * tl.exp(log_p_ratio) + of_student * tl.exp(log_q_ratio))
    return q, value, tl.where(q > 0.0, g, 0.0)


@triton.jit
def _store_gradient(high, low, at, padded, gradient, SUMMANDS: tl.constexpr, LARGEST: tl.constexpr):
    """Store a tile as one number, cut to the largest of its type, or as the sum of two."""
    if LARGEST > 0.0:
        # Comparisons with NaN are false: it stays NaN.
        gradient = tl.where(gradient > LARGEST, LARGEST, tl.where(gradient < -LARGEST, -LARGEST, gradient))
    first = gradient.to(high.dtype.element_ty)
    tl.store(high + at, first, mask=at < padded)
    if SUMMANDS == 2:
        tl.store(low + at, (gradient - first.to(tl.float32)).to(low.dtype.element_ty), mask=at < padded)


@triton.jit
def _gate_kernel(to, origin, gates, to_stride, origin_stride, columns, padded, inverse_nats, BLOCK: tl.constexpr):
    """gates[row] = exp(−KL(softmax(to) ‖ softmax(origin)) / nats), in one pass."""
    row = tl.program_id(0).to(tl.int64)
    to_max, to_sum, origin_max, origin_sum, inner = -1e30, 0.0, -1e30, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = loaded(to + row * to_stride, at, columns, padded)
        b = loaded(origin + row * origin_stride, at, columns, padded)
        new_to_max, new_to_sum, factor = summed(to_max, to_sum, a)
        new_origin_max, new_origin_sum, _ = summed(origin_max, origin_sum, b)
        inner = _compared(inner, to_sum, factor, to_max, new_to_max, origin_max, new_origin_max, a, b)
        to_max, to_sum, origin_max, origin_sum = new_to_max, new_to_sum, new_origin_max, new_origin_sum
    kl = inner / to_sum - tl.log(to_sum) + tl.log(origin_sum)
    tl.store(gates + row, tl.exp(-tl.maximum(kl, 0.0) * inverse_nats))


@triton.jit
def _loss_kernel(
    z,
    target,
    shift,
    gates,
    labels,
    ce,
    kl,
    high,
    low,
    z_stride,
    target_stride,
    shift_stride,
    high_stride,
    columns,
    padded,
    inverse_temperature,
    softcap,
    ce_weight,
    kl_weight,
    gradient_scale,
    of_target,
    of_student,
    share,
    KIND: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SUMMANDS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ce[row], kl[row] and, if SUMMANDS > 0, the gradient of ce_weight · ce + kl_weight · τ · kl w.r.t. z, scaled."""
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    target += row * target_stride
    shift += row * shift_stride
    high += row * high_stride
    low += row * high_stride
    label = tl.load(labels + row)
    gate = tl.load(gates + row) if HAS_GATE else 1.0

    # Pass 1: log-sum-exps of z, of q = z / τ, and of p, the target.
    z_max, z_sum, q_max, q_sum, p_max, p_sum, inner = -1e30, 0.0, -1e30, 0.0, -1e30, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _student(z, at, columns, padded, softcap, HAS_CAP)
        z_max, z_sum, _ = summed(z_max, z_sum, x)
        if KIND != 0:
            y = _target(target, shift, gate, at, columns, padded, HAS_GATE) * inverse_temperature
            new_p_max, new_p_sum, _ = summed(p_max, p_sum, y)
            if TEMPERED or KIND == 2:
                x = x * inverse_temperature
                new_q_max, new_q_sum, factor = summed(q_max, q_sum, x)
                if KIND == 2:
                    inner = _compared(inner, q_sum, factor, q_max, new_q_max, p_max, new_p_max, x, y)
                q_max, q_sum = new_q_max, new_q_sum
            p_max, p_sum = new_p_max, new_p_sum
    z_log_sum = z_max + tl.log(z_sum)
    p_log_sum = p_max + tl.log(p_sum)
    q_log_sum = z_log_sum
    if TEMPERED and KIND != 0:
        q_log_sum = q_max + tl.log(q_sum)
    # KL(q ‖ p), which its gradient subtracts; its value is summed more accurately below.
    mean = 0.0
    if KIND == 2:
        mean = inner / q_sum - tl.log(q_sum) + tl.log(p_sum)
    tl.store(ce + row, z_log_sum - _capped(tl.load(z + label), softcap, HAS_CAP))

    value = 0.0
    if KIND == 3:
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _student(z, at, columns, padded, softcap, HAS_CAP) * inverse_temperature
            y = _target(target, shift, gate, at, columns, padded, HAS_GATE) * inverse_temperature
            q, terms, g = _mixed(y - p_log_sum, x - q_log_sum, of_target, of_student, share)
            value += tl.sum(terms, axis=0)
            mean += tl.sum(q * g, axis=0)

    # The last pass: the divergence and the gradient, which may overwrite z: every thread has read the label's logit.
    tl.debug_barrier()
    if SUMMANDS > 0 or (KIND != 0 and KIND != 3):
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _student(z, at, columns, padded, softcap, HAS_CAP)
            gradient = tl.zeros_like(x)
            if KIND != 0:
                y = _target(target, shift, gate, at, columns, padded, HAS_GATE) * inverse_temperature
                log_q = x * inverse_temperature - q_log_sum
                log_p = y - p_log_sum
                q, p = tl.exp(log_q), tl.exp(log_p)
                # Σ (q − p) is 0 up to rounding, but makes each term at least 0 (losses.divergences.kl).
                if KIND == 3:
                    q, _, g = _mixed(log_p, log_q, of_target, of_student, share)
                    gradient = kl_weight * q * (g - mean)
                elif KIND == 1:
                    value += tl.sum(tl.where(p > 0.0, p * (log_p - log_q), 0.0) - p + q, axis=0)
                    gradient = kl_weight * (q - p)
                else:
                    ratio = log_q - log_p
                    value += tl.sum(tl.where(q > 0.0, q * ratio, 0.0) - q + p, axis=0)
                    gradient = kl_weight * tl.where(q > 0.0, q * (ratio - mean), 0.0)
            if SUMMANDS > 0:
                gradient += ce_weight * (tl.exp(x - z_log_sum) - tl.where(at == label, 1.0, 0.0))
                if HAS_CAP:
                    gradient *= 1.0 - (x / softcap) * (x / softcap)
                gradient *= gradient_scale
                _store_gradient(high, low, at, padded, gradient, SUMMANDS, LARGEST)
    tl.store(kl + row, value)


def gate_rows(to_NV: Tensor, origin_NV: Tensor, nats: float) -> Tensor:
    """Return exp(−KL(softmax(to) ‖ softmax(origin)) / nats), [n] float32, of two [n, V] float32 logits."""
    gate_N = to_NV.new_empty(len(to_NV))
    if len(to_NV):
        with on(to_NV.device):
            _gate_kernel[(len(to_NV),)](
                to_NV,
                origin_NV,
                gate_N,
                to_NV.stride(0),
                origin_NV.stride(0),
                to_NV.shape[1],
                padded_columns(to_NV, origin_NV),
                1.0 / nats,
                BLOCK=block_of(to_NV.shape[1]),
                num_warps=WARPS,
            )
    return gate_N


def loss_rows(
    form: LinearKL,
    z_NV: Tensor,
    target_NV: Tensor | None,
    labels: Tensor,
    summands: Sequence[Tensor],
    scale: float = 1.0,
    softcap: float | None = None,
    shift_NV: Tensor | None = None,
    gate_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute a ``LinearKL`` of n tokens, and write its gradient.

    Args:
        form: the loss.
        z_NV: [n, V] float32, the student's logits before any soft-capping.
        target_NV: [n, V] float32, the target's logits at τ = 1; None at λ = 1.
        labels: [n] int64.
        summands: [n, V] each, with the same distance between rows: written, the gradient w.r.t. ``z_NV`` times
            ``scale``, in float32 (then it may be ``z_NV`` itself), float16 or bfloat16, or as a sum of two bfloat16.
            Empty: no gradient.
        scale: see there.
        softcap: the bound of soft-capping.
        shift_NV, gate_N: [n, V] and [n] float32: the target is ``target_NV + gate_N · shift_NV``; None: it is not.

    Returns:
        The cross-entropy and the KL, [n] nats each; None for the KL at λ = 1.
    """
    ce_N, kl_N = (z_NV.new_empty(len(z_NV)) for _ in range(2))
    kind = _CE if target_NV is None else _kind(form)
    target_NV = z_NV if target_NV is None else target_NV
    shift = target_NV if shift_NV is None else shift_NV
    high = summands[0] if summands else z_NV
    low = summands[1] if len(summands) == 2 else high
    assert high.stride() == low.stride()
    assert all(t.stride(1) == 1 for t in (z_NV, target_NV, shift, high))
    if len(z_NV):
        with on(z_NV.device):
            _loss_kernel[(len(z_NV),)](
                z_NV,
                target_NV,
                shift,
                ce_N if gate_N is None else gate_N,
                labels.contiguous(),
                ce_N,
                kl_N,
                high,
                low,
                z_NV.stride(0),
                target_NV.stride(0),
                shift.stride(0),
                high.stride(0),
                z_NV.shape[1],
                padded_columns(z_NV, target_NV, shift, high),
                1.0 / form.temperature if kind != _CE else 1.0,
                1.0 if softcap is None else softcap,
                form.ce_weight,
                (1 - form.ce_weight) * form.scale / form.temperature,
                scale,
                *_coefficients(form.mixture),
                KIND=kind,
                TEMPERED=form.temperature != 1.0,
                HAS_CAP=softcap is not None,
                HAS_GATE=gate_N is not None,
                SUMMANDS=len(summands),
                LARGEST=65504.0 if high.dtype == torch.float16 else 0.0,
                BLOCK=block_of(z_NV.shape[1]),
                num_warps=WARPS,
            )
    return ce_N, None if kind == _CE else kl_N


def _kind(form: LinearKL) -> int:
    if form.mixture is not None:
        return _MIXTURE
    return _REVERSE if form.reverse else _FORWARD


def _coefficients(mixture: MixtureKL | None) -> tuple[float, float, float]:
    """Return a, b and μ; without a mixture they are not read."""
    return (1.0, 1.0, 0.5) if mixture is None else (mixture.of_target, mixture.of_student, mixture.share)


def padded_columns(*logits: Tensor) -> int:
    """Return how many columns may be loaded and stored: a multiple of 16 if all rows end in as much padding."""
    columns = logits[0].shape[1]
    wide = -(-columns // 16) * 16
    return wide if all(z_NV.stride(0) >= wide for z_NV in logits) else columns


def block_of(columns: int) -> int:
    """Return the columns of a tile."""
    return min(_BLOCK, triton.next_power_of_2(columns))


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
