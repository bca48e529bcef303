"""The bucket for all tokens outside a support (``buckets.py``): its log-sum-exp, and its gradient over its tokens.

The first kernel reads 4 bytes and computes one or two exponentials per logit; the second reads 4 bytes and writes 4, or
2 in half precision. For 8,192 tokens of a vocabulary of 128,256 these are 4.2 GB and 8.4 GB, 4.2 ms at 3 TB/s, beside
some 20 operations per logit, 20 GFLOP. Memory bounds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltakd.kernels.gpu.linear_kl import WARPS, block_of, loaded, on, padded_columns, summed


@triton.jit
def _tail_kernel(
    z, tails, tails_at_one, stride, columns, padded, temperature, TEMPERED: tl.constexpr, BLOCK: tl.constexpr
):
    """tails[row] = τ · logsumexp(z / τ), and the same at τ = 1."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    largest, total, largest_at_one, total_at_one = -1e30, 0.0, -1e30, 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = loaded(z, at, columns, padded)
        largest_at_one, total_at_one, _ = summed(largest_at_one, total_at_one, x)
        if TEMPERED:
            largest, total, _ = summed(largest, total, x / temperature)
    at_one = largest_at_one + tl.log(total_at_one)
    tl.store(tails_at_one + row, at_one)
    if TEMPERED:
        tl.store(tails + row, temperature * (largest + tl.log(total)))


@triton.jit
def _spread_kernel(
    z,
    tails,
    tails_at_one,
    grads,
    grads_at_one,
    high,
    low,
    stride,
    high_stride,
    columns,
    padded,
    temperature,
    scale,
    softcap,
    TEMPERED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SUMMANDS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the tails, times their gradients w.r.t. z, softmax(z / τ) and softmax(z); 0 where z is −inf."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    at_one, grad_at_one = tl.load(tails_at_one + row), tl.load(grads_at_one + row)
    tail, grad = at_one, 0.0
    if TEMPERED:
        tail, grad = tl.load(tails + row), tl.load(grads + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = loaded(z, at, columns, padded)
        gradient = grad_at_one * tl.exp(x - at_one)
        if TEMPERED:
            gradient += grad * tl.exp((x - tail) / temperature)
        if HAS_CAP:
            gradient *= 1.0 - (x / softcap) * (x / softcap)
        gradient = tl.where(x == float("-inf"), 0.0, gradient * scale)
        if LARGEST > 0.0:
            gradient = tl.where(gradient > LARGEST, LARGEST, tl.where(gradient < -LARGEST, -LARGEST, gradient))
        first = gradient.to(high.dtype.element_ty)
        tl.store(high + row * high_stride + at, first, mask=at < padded)
        if SUMMANDS == 2:
            rest = (gradient - first.to(tl.float32)).to(low.dtype.element_ty)
            tl.store(low + row * high_stride + at, rest, mask=at < padded)


def tail_rows(z_NV: Tensor, temperature: float) -> list[Tensor]:
    """Return τ · logsumexp(z / τ) at τ and, if that is not 1, at 1: [n] float32 each.

    Args:
        z_NV: [n, V] float32; −inf on the support.
        temperature: τ.
    """
    tails = [z_NV.new_empty(len(z_NV)) for _ in range(1 if temperature == 1.0 else 2)]
    if len(z_NV):
        with on(z_NV.device):
            _tail_kernel[(len(z_NV),)](
                z_NV,
                tails[0],
                tails[-1],
                z_NV.stride(0),
                z_NV.shape[1],
                padded_columns(z_NV),
                temperature,
                TEMPERED=len(tails) == 2,
                BLOCK=block_of(z_NV.shape[1]),
                num_warps=WARPS,
            )
    return tails


def spread_rows(
    z_NV: Tensor,
    tails: Sequence[Tensor],
    grads: Sequence[Tensor],
    temperature: float,
    summands: Sequence[Tensor],
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Write the gradient w.r.t. logits, from those w.r.t. the tails.

    Args:
        z_NV: as for ``tail_rows``; with soft-capping, after it.
        tails, grads: from ``tail_rows``, and the gradients w.r.t. them, [n] float32.
        temperature: τ.
        summands, scale: as for ``linear_kl.loss_rows``; 0 on the support.
        softcap: the gradient is w.r.t. the logits before this soft-capping.
    """
    high = summands[0]
    if len(z_NV):
        with on(z_NV.device):
            _spread_kernel[(len(z_NV),)](
                z_NV,
                tails[0],
                tails[-1],
                grads[0],
                grads[-1],
                high,
                summands[-1],
                z_NV.stride(0),
                high.stride(0),
                z_NV.shape[1],
                padded_columns(z_NV, high),
                temperature,
                scale,
                1.0 if softcap is None else softcap,
                TEMPERED=len(tails) == 2,
                HAS_CAP=softcap is not None,
                SUMMANDS=len(summands),
                LARGEST=65504.0 if high.dtype == torch.float16 else 0.0,
                BLOCK=block_of(z_NV.shape[1]),
                num_warps=WARPS,
            )
