"""The whole choice of a token in one Triton kernel: noise by key (``noise.py``), two stages (``sampling.py``).

One program per row reads V logits once, 0.6 MB at V = 151,936, and draws N + K ≈ 2√V numbers of some 150 64-bit
operations each. That is 25 µs at the 25 GB/s of one of an H100's multiprocessors, for as many rows as it has; in
PyTorch's own operations Philox alone takes 200 launches, which cost more than a millisecond.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits in a tile, and warps per row.
_TILE = 8192
_WARPS = 8


@triton.jit
def _gumbel(draw, seed, row, first, sample, step):
    """Return −log(−log(1 − u)) in float64, for draws counted from 0 (Philox4x64-10, four words to a counter)."""
    c0 = first + (draw // 4).to(tl.uint64)
    c1 = tl.zeros_like(c0) + sample
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0)
    k0 = tl.zeros_like(c0) + seed
    k1 = tl.zeros_like(c0) + row
    for turn in tl.static_range(10):
        if turn > 0:
            k0 += 0x9E3779B97F4A7C15
            k1 += 0xBB67AE8584CAA73B
        factor0 = tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)
        factor1 = tl.full(c0.shape, 0xCA5A826395121157, tl.uint64)
        high0, high1 = tl.umulhi(c0, factor0), tl.umulhi(c2, factor1)
        low0, low1 = c0 * factor0, c2 * factor1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    word = draw % 4
    bits = tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))
    # A multiple of 2⁻⁵³, so that 1 − u is exact; 0 counts as 2⁻⁵⁴.
    u = (bits >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
    return -tl.log(tl.where(u > 0.0, -tl.log(1.0 - u), 5.551115123125783e-17))


@triton.jit
def _choice_kernel(
    logits,
    words,
    tokens,
    stride,
    columns,
    width,
    blocks,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """tokens[row]: a block of ``width`` neighbours by Gumbel-max over their log-sum-exps, then a token within it."""
    place = tl.program_id(0).to(tl.int64)
    logits += place * stride
    words += place * 5
    seed = tl.load(words).to(tl.uint64)
    row = tl.load(words + 1).to(tl.uint64)
    first = tl.load(words + 2).to(tl.uint64)
    sample = tl.load(words + 3).to(tl.uint64)
    step = tl.load(words + 4).to(tl.uint64)
    within = tl.arange(0, WIDTH)

    best, best_block, spoilt = float("-inf"), 0, 0
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block[:, None] * width + within[None, :]
        inside = (within[None, :] < width) & (at < columns)
        x = tl.load(logits + at, mask=inside, other=float("-inf"))
        largest = tl.max(x, axis=1)
        # Without a possible token, −inf − (−inf) would be NaN.
        shifted = x - tl.where(largest == float("-inf"), 0.0, largest)[:, None]
        score = largest + tl.log(tl.sum(tl.exp(shifted), axis=1))
        score = tl.where(largest == float("-inf"), float("-inf"), score)
        score += _gumbel(block, seed, row, first, sample, step).to(tl.float32)
        score = tl.where(block < blocks, score, float("-inf"))
        spoilt += tl.sum(((x != x) | (x == float("inf"))).to(tl.int32))
        top = tl.max(score, axis=0)
        place_of_top = start + tl.argmax(score, axis=0)
        best_block = tl.where(top > best, place_of_top, best_block)
        best = tl.maximum(top, best)

    at = best_block * width + within
    x = tl.load(logits + at, mask=(within < width) & (at < columns), other=float("-inf"))
    score = x + _gumbel(blocks + within, seed, row, first, sample, step).to(tl.float32)
    token = best_block * width + tl.argmax(score, axis=0)
    tl.store(tokens + place, tl.where((spoilt > 0) | (best == float("-inf")), -1, token).to(tl.int64))


def choose(logits_BV: Tensor, words_B5: Tensor, width: int) -> Tensor:
    """Sample a token per row.

    Args:
        logits_BV: float32; −∞ is a probability of 0.
        words_B5: int64, the bits of each row's seed, row, first counter, sample and step (``noise.counters``).
        width: K, neighbours in a block.

    Returns:
        [B] int64; −1 where a row is no distribution: a NaN, a +∞, or nothing above −∞.
    """
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    rows, columns = logits_BV.shape
    tokens_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    padded = triton.next_power_of_2(width)
    if not rows:
        return tokens_B
    # Triton launches on the current device.
    with torch.cuda.device(logits_BV.device) if logits_BV.is_cuda else nullcontext():
        _choice_kernel[(rows,)](
            logits_BV,
            words_B5,
            tokens_B,
            logits_BV.stride(0),
            columns,
            width,
            -(-columns // width),
            BLOCKS=max(1, _TILE // padded),
            WIDTH=padded,
            num_warps=_WARPS,
        )
    return tokens_B
