"""Random numbers that belong to (seed, row, step, sample, position), the same on every device.

Philox4x64-10 (Salmon et al., SC 2011, doi 10.1145/2063384.2063405) turns a key and a counter into four 64-bit words, in
any order and without state. So a number depends only on its purpose, never on which rows were decoded together or
before. On a CPU NumPy computes it, on an NVIDIA GPU the kernel that chooses a token (``token_kernel.py``), and on other
devices integer arithmetic in torch. No noise is copied from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
#: The multipliers and the increments of the key ("Weyl constants") of Philox4x64.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


class NoiseKey(NamedTuple):
    """Whose noise it is. All numbers are from 0 to 2⁶⁴ − 1.

    Args:
        seed: of the run, or of the sampling.
        row: the row's number in its data set.
        step: 0 outside training; else the optimiser step, counted from 1, for which the row is answered.
        sample: counts the answers to the same row at the same step.
    """

    seed: int
    row: int
    step: int = 0
    sample: int = 0


def uniform(
    keys: Sequence[NoiseKey | None], positions: Sequence[int], count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw uniform numbers in [0, 1), multiples of 2⁻⁵³.

    Args:
        keys: one per row; None for a row whose numbers are not used, which gets zeros.
        positions: the position of each row; different positions share no numbers if ``count`` stays the same.
        count: n, the numbers per row and position.
        device: where they are computed and used.

    Returns:
        [B, n] float64; on the CPU for a device without float64 (MPS).
    """
    blocks = -(-count // 4)
    if torch.device(device).type in ("cpu", "mps"):
        return torch.from_numpy(_by_numpy(keys, positions, blocks)[:, :count])
    return _by_torch(keys, positions, blocks, torch.device(device))[:, :count]


def _by_numpy(keys: Sequence[NoiseKey | None], positions: Sequence[int], blocks: int) -> np.ndarray:
    found = np.zeros((len(keys), 4 * blocks))
    philox = np.random.Philox(key=[0, 0])
    generator = np.random.Generator(philox)
    state = philox.state
    for key, position, row in zip(keys, positions, found, strict=True):
        if key is None:
            continue
        # NumPy increments the counter before each block, so a stream's first block has counter 1.
        state["state"] = {
            "counter": np.array([position * blocks, key.sample, key.step, 0], dtype=np.uint64),
            "key": np.array([key.seed, key.row], dtype=np.uint64),
        }
        state["buffer_pos"] = 4
        philox.state = state
        generator.random(out=row)
    return found


def counters(keys: Sequence[NoiseKey | None], positions: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the words that a row's numbers are made from: seed, row, first counter, sample and step, [B, 5] int64.

    Args:
        keys, positions, count: as for ``uniform``.
        device: where they go, in one small copy that does not block.
    """
    blocks = -(-count // 4)
    known = [NoiseKey(0, 0) if key is None else key for key in keys]
    words = [
        [key.seed, key.row, position * blocks + 1, key.sample, key.step]
        for key, position in zip(known, positions, strict=True)
    ]
    return torch.tensor([[_signed(word) for word in row] for row in words]).to(device, non_blocking=True)


def _by_torch(keys: Sequence[NoiseKey | None], positions: Sequence[int], blocks: int, device: torch.device) -> Tensor:
    words_B5 = counters(keys, positions, 4 * blocks, device)
    seed, row, first, sample, step = (word_B.unsqueeze(1) for word_B in words_B5.unbind(1))
    counter = [first + torch.arange(blocks, device=device), sample, step, torch.zeros_like(step)]
    values_BN4 = torch.stack([word.expand(len(keys), blocks) for word in philox(counter, [seed, row])], dim=-1)
    # The upper 53 bits, as NumPy takes them; the shift of a signed integer is arithmetic, so the sign is masked off.
    uniform_BN = ((values_BN4 >> 11) & (2**53 - 1)).double().mul_(2.0**-53).flatten(1)
    absent = [place for place, key in enumerate(keys) if key is None]
    if absent:
        uniform_BN[absent] = 0.0
    return uniform_BN


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x64-10 in int64 arithmetic, whose products and sums wrap as those of unsigned words do.

    Args:
        counter: four int64 tensors that hold the bits of unsigned words.
        key: two of the same kind; all six broadcast against each other.

    Returns:
        Four int64 tensors of random bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(_ROUNDS):
        if turn:
            k0, k1 = k0 + _signed(_INCREMENTS[0]), k1 + _signed(_INCREMENTS[1])
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 64 bits of a product of unsigned words."""
    low, high = word & _LOW, (word >> 32) & _LOW
    factor_low, factor_high = factor & _LOW, factor >> 32
    crossed = low * factor_high
    crossed_too = high * factor_low
    carry = ((low * factor_low >> 32) & _LOW) + (crossed & _LOW) + (crossed_too & _LOW)
    upper = high * factor_high + ((crossed >> 32) & _LOW) + ((crossed_too >> 32) & _LOW) + (carry >> 32)
    return upper, word * _signed(factor)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned word."""
    return word - _WORD if word >= _WORD // 2 else word
